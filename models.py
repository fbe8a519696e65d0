"""Full-precision DeiT: teachers, and the networks that quantized ones start from.

They are timm's, under timm's names (`deit_tiny_distilled_patch16_224`) and under those of the published commands
(`vit_deit_tiny_distilled_patch16_224`). Importing this module registers the latter.
"""
from collections import deque

import timm
import torch
import torch.nn as nn
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from utils import UserError

Pair = tuple[Tensor, Tensor]

__all__: list[str] = []  # the aliases, added as they are registered

_TARGETS = {f'vit_deit_{size}{distilled}_patch16_224': f'deit_{size}{distilled}_patch16_224'
            for size in ('tiny', 'small', 'base') for distilled in ('', '_distilled')}

default_cfgs = generate_default_cfgs({
    f'{alias}.fb_in1k': timm.get_pretrained_cfg(target).to_dict() for alias, target in _TARGETS.items()})


def _register_alias(alias: str, target: str) -> None:
    def model(pretrained: bool = False, **kwargs) -> nn.Module:
        return timm.create_model(target, pretrained=pretrained, **kwargs)

    model.__name__ = model.__qualname__ = alias
    model.__doc__ = f"timm's {target} under the name of the published commands."
    globals()[alias] = register_model(model)


for _alias, _target in _TARGETS.items():
    _register_alias(_alias, _target)


class BlockHooks:
    """The tokens, (B, N, D), behind every block in a network's last forward, until they are taken."""

    def __init__(self, model: nn.Module) -> None:
        self._tokens: deque[Tensor] = deque(maxlen=len(model.blocks))
        for block in model.blocks:
            block.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: tuple, output: Tensor | tuple) -> None:
        self._tokens.append(output if isinstance(output, Tensor) else output[0])

    def take(self) -> list[Tensor]:
        tokens = list(self._tokens)
        self._tokens.clear()  # the loss alone keeps them alive
        return tokens


class Teacher:
    """A frozen full-precision network that gives logits and, if asked, the queries and keys of every layer.

    Not an nn.Module on purpose: its weights stay out of state dicts, optimizers and DDP. The model is put in evaluation
    mode and frozen in place; moving it to the device of the images is up to the caller.

    Args:
        model: any classifier; with `return_qk` a timm vision transformer (or one with the same attention modules).
        return_qk: collect q and k by forward hooks. Without it no hook is placed.
        keep_tokens: keep the blocks' outputs, too, for `take_tokens`.

    Raises:
        UserError: `return_qk` with a model whose blocks have no timm attention.
    """

    def __init__(self, model: nn.Module, return_qk: bool, keep_tokens: bool = False) -> None:
        self.model = model.eval().requires_grad_(False)
        self._tokens = BlockHooks(model) if keep_tokens else None
        self.return_qk = return_qk
        self.num_prefix_tokens: int = getattr(model, 'num_prefix_tokens', 1)
        self._captured: list[Tensor] = []  # q, k, q, k, ... in the order of the layers
        attentions = timm_attentions(model) if return_qk else []
        if attentions is None:
            raise UserError(_no_qk_message(model))
        self._depth = len(attentions)
        for attention in attentions:
            attention.q_norm.register_forward_hook(self._capture)
            attention.k_norm.register_forward_hook(self._capture)

    def _capture(self, _module: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> None:
        self._captured.append(output)

    # no_grad, not inference_mode: the outputs enter products with tensors that require a gradient, and autograd refuses
    # to save inference tensors for backward.
    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, list[Pair]]:
        """One forward on images (B, 3, H, W): logits (B, classes) and per layer (q, k), each (B, heads, N, d).

        The list is empty without `return_qk`. Precision is that of the caller's autocast region.
        """
        self._captured = []
        logits = self.model(images)
        captured, self._captured = self._captured, []  # the loss alone keeps q and k alive
        if len(captured) != 2 * self._depth:
            raise UserError(_no_qk_message(self.model))
        return logits, list(zip(captured[::2], captured[1::2], strict=True))

    def take_tokens(self) -> list[Tensor]:
        """Of the last forward the outputs of every block, (B, N, D); given once."""
        return self._tokens.take()


def timm_attentions(model: nn.Module) -> list[nn.Module] | None:
    """The attention modules of a timm vision transformer by layer, or None.

    timm passes q and k, (B, heads, N, d), through `q_norm` and `k_norm`, which are identities unless the model
    normalises them: their outputs are in every case what the attention multiplies.
    """
    attentions = [getattr(block, 'attn', None) for block in getattr(model, 'blocks', [])]
    is_timm = all(hasattr(attn, name) for attn in attentions for name in ('qkv', 'num_heads', 'q_norm', 'k_norm'))
    return attentions if attentions and is_timm else None


def _no_qk_message(model: nn.Module) -> str:
    return (f'teacher {type(model).__name__} has no timm attention to take q and k from: '
            'pass --dgd-weight 0 or choose a timm vision transformer as the teacher')
