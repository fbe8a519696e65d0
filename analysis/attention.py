"""What the attention of every block is computed from: queries, keys and values of one forward.

Networks are quantized ones, which give what docs/architecture.md lists, and timm's vision transformers. They are
watched in evaluation mode and left as they were.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from _quan_base import ActQ
from models import is_quantized
from utils import UserError

__all__ = ['AttentionInputs', 'Stages', 'attention_inputs', 'attention_probabilities', 'attentions', 'is_rectified',
           'watched']


class Stages(NamedTuple):
    """Queries or keys of a block on their way to the scores, (B, H, N, d) each.

    Attributes:
        projected: as the qkv layer gives them.
        rectified: after IRM (or timm's q_norm, k_norm); equal to `projected` in a network without.
        act: the quantizer that they pass next, None where they are not quantized.
    """
    projected: Tensor
    rectified: Tensor
    act: ActQ | None

    @property
    @torch.no_grad()
    def used(self) -> Tensor:
        """What the scores are computed from: the quantized values, or `rectified` where nothing is quantized."""
        return self.rectified if self.act is None else self.act(self.rectified)

    @property
    def codes(self) -> Tensor | None:
        """The integer codes of `used`, None where nothing is quantized."""
        return None if self.act is None else self.act.to_int(self.rectified)


class AttentionInputs(NamedTuple):
    """What a block's attention is computed from; v is that before quantization, (B, H, N, d)."""
    q: Stages
    k: Stages
    v: Tensor


@contextmanager
def watched(model: nn.Module, modules: Iterable[nn.Module], hook: Callable) -> Iterator[None]:
    """The model in evaluation mode and without gradients, with the hook on the given modules; then as before.

    The body calls `model.forward`: `model(...)` may be compiled, without the hooks.
    """
    hooks, was_training = [module.register_forward_hook(hook) for module in modules], model.training
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        for handle in hooks:
            handle.remove()


def attentions(model: nn.Module) -> list[nn.Module]:
    """The attention of every block.

    Raises:
        UserError: the network is no vision transformer, or its attention is of another kind.
    """
    found = []
    for block in getattr(model, 'blocks', []):
        attention = getattr(block, 'attn', None)
        norms = ('norm_q', 'norm_k') if is_rectified(attention) else ('q_norm', 'k_norm')
        if not all(hasattr(attention, name) for name in ('qkv', 'num_heads', 'head_dim', *norms)):
            break
        found.append(attention)
    if not found or len(found) < len(model.blocks):
        raise UserError(f'{type(model).__name__} has no blocks with the attention of a vision transformer: '
                        'choose a DeiT or another of timm\'s vision transformers')
    return found


def is_rectified(attention: nn.Module) -> bool:
    """Whether the attention is a quantized one, in which q and k pass through IRM (or an identity in its place)."""
    return hasattr(attention, 'norm_q')


def attention_inputs(model: nn.Module, images: Tensor) -> list[AttentionInputs]:
    """Queries, keys and values of every block in one forward on images (B, 3, H, W).

    The quantized network itself returns the queries and keys that it rectified; timm's networks do not.

    Raises:
        UserError: see `attentions`.
    """
    blocks, projected, found = attentions(model), {}, []

    def keep(qkv: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        projected[qkv] = output

    with watched(model, [attention.qkv for attention in blocks], keep):
        if is_quantized(model):
            _, outputs = model.forward(images, return_blocks=True)
        else:
            outputs = model.forward(images)
        for index, attention in enumerate(blocks):
            qkv = projected[attention.qkv].unflatten(-1, (3, attention.num_heads, attention.head_dim))
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # (B, H, N, d) each
            if is_rectified(attention):
                rectified = outputs[index].q, outputs[index].k
            else:
                rectified = attention.q_norm(q), attention.k_norm(k)
            found.append(AttentionInputs(Stages(q, rectified[0], getattr(attention, 'q_act', None)),
                                         Stages(k, rectified[1], getattr(attention, 'k_act', None)), v))
    return found


def attention_probabilities(inputs: AttentionInputs) -> Tensor:
    """softmax(q k^T / sqrt(d)) of the queries and keys in use, before its own quantization: (B, H, N, N)."""
    q, k = inputs.q.used, inputs.k.used
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
