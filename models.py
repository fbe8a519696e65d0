"""Full-precision DeiT and Swin: teachers, and the networks that quantized ones start from.

They are timm's, under timm's names (`deit_tiny_distilled_patch16_224`) and, the DeiTs, under those of the published
commands (`vit_deit_tiny_distilled_patch16_224`). Importing this module registers the latter.
"""
from collections.abc import Callable
from itertools import zip_longest
from typing import NamedTuple

import timm
import torch
import torch.nn as nn
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import WindowAttention
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from utils import UserError

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


class BlockOutputs(NamedTuple):
    """What losses compare of a block.

    Attributes:
        tokens: the block's output, (B, N, D).
        q, k: queries and keys as the scores are computed from them, before any quantization, (B, H, N, d); of a Swin
            transformer those of every window, (B windows, H, N, d).
    """
    tokens: Tensor | None = None
    q: Tensor | None = None
    k: Tensor | None = None


class Teacher:
    """A frozen full-precision network that gives logits and, if asked, what happens in its blocks.

    Not an nn.Module on purpose: its weights stay out of state dicts, optimizers and DDP. The model is put in evaluation
    mode and frozen in place; moving it to the device of the images is up to the caller. timm's networks do not return
    what is inside them, so it is taken by forward hooks; without a request no hook is placed.

    Args:
        model: any classifier; with `return_qk` a timm vision transformer (or one with the same attention modules), with
            `return_tokens` a network of `blocks`.
        return_qk: give q and k of every block.
        return_tokens: give the output of every block.

    Raises:
        UserError: `return_qk` with a model whose blocks have no timm attention.
    """

    def __init__(self, model: nn.Module, return_qk: bool = False, return_tokens: bool = False) -> None:
        self.model = model.eval().requires_grad_(False)
        self.return_qk, self.return_tokens = return_qk, return_tokens
        self.num_prefix_tokens = count_prefix_tokens(model)
        self._tokens: list[Tensor] = []
        self._queries: list[Tensor] = []
        self._keys: list[Tensor] = []
        attentions = timm_attentions(model) if return_qk else []
        if attentions is None:
            raise UserError(_no_qk_message(model))
        self._depth = len(attentions)
        for attention in attentions:
            if isinstance(attention, WindowAttention):
                attention.qkv.register_forward_hook(_appending_qk(attention.num_heads, self._queries, self._keys))
                continue
            attention.q_norm.register_forward_hook(_appending(self._queries))
            attention.k_norm.register_forward_hook(_appending(self._keys))
        for block in network_blocks(model) if return_tokens else ():
            block.register_forward_hook(_appending(self._tokens, Tensor.flatten, 1, -2))

    # no_grad, not inference_mode: the outputs enter products with tensors that require a gradient, and autograd refuses
    # to save inference tensors for backward.
    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, list[BlockOutputs]]:
        """One forward on images (B, 3, H, W): logits (B, classes), and what was asked for of every block.

        The list is empty where nothing was. Precision is that of the caller's autocast region.
        """
        self._take()
        logits = self.model(images)
        tokens, queries, keys = self._take()
        if not len(queries) == len(keys) == self._depth:
            raise UserError(_no_qk_message(self.model))
        return logits, [BlockOutputs(*outputs) for outputs in zip_longest(tokens, queries, keys)]

    def _take(self) -> list[list[Tensor]]:
        """What the hooks gathered, which the caller alone keeps alive from now on."""
        gathered = self._tokens, self._queries, self._keys
        taken = [list(values) for values in gathered]
        for values in gathered:
            values.clear()
        return taken


def _appending(values: list[Tensor], change: Callable[..., Tensor] | None = None, *args: int) -> Callable[..., None]:
    """A forward hook that adds a module's output to `values`, by change(output, *args) where there is a change."""
    def keep(_module: nn.Module, _inputs: tuple, output: Tensor | tuple) -> None:
        output = output if isinstance(output, Tensor) else output[0]  # a quantized block gives q and k as well
        values.append(output if change is None else change(output, *args))
    return keep


def _appending_qk(heads: int, queries: list[Tensor], keys: list[Tensor]) -> Callable[..., None]:
    """A forward hook that adds the q and k in a qkv layer's output, (B, H, N, d) each."""
    def keep(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        q, k, _ = output.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        queries.append(q)
        keys.append(k)
    return keep


def network_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a network in forward order, those of a Swin transformer stage by stage; none of other networks."""
    if hasattr(model, 'blocks'):
        return list(model.blocks)
    return [block for stage in getattr(model, 'layers', ()) for block in getattr(stage, 'blocks', ())]


def count_prefix_tokens(model: nn.Module) -> int:
    """How many tokens of a network come before those of patches; a Swin transformer has none."""
    return getattr(model, 'num_prefix_tokens', 0 if hasattr(model, 'layers') else 1)


def is_quantized(model: nn.Module) -> bool:
    """Whether it is a quantized network, which gives what docs/architecture.md asks of one."""
    return hasattr(model, 'quant')


class QuantizedNetwork:
    """How quantized networks are called; timm's class is to stand behind this one among their bases."""

    def run_block(self, block: nn.Module, x: Tensor, is_recomputed: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The block's output, and its q and k; in training, `is_recomputed` lets the backward compute them again."""
        if is_recomputed and self.training:
            return checkpoint(block, x, True, use_reentrant=False)
        return block(x, return_qk=True)

    def forward(self, x: Tensor, return_blocks: bool = False) -> Tensor | tuple[Tensor, list[BlockOutputs]]:
        """(B, C, H, W) -> logits; with return_blocks (logits, [BlockOutputs of every block]).

        Raises:
            UserError: the call is one of torch.jit.trace or torch.onnx.export, which cannot follow it.
        """
        if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
            raise UserError('torch.jit.trace and torch.onnx.export cannot follow a quantized network: python deploy.py '
                            'onnx FILE --output model.onnx writes its ONNX file, torch.export.export its graph')
        if not return_blocks:
            return self.forward_head(self.forward_features(x))
        x, outputs = self.forward_features(x, return_blocks=True)
        return self.forward_head(x), outputs


def take_fixed_options(options: dict, fixed: dict) -> None:
    """Takes those options of a timm network out that have only one value in the quantized one; ValueError: another."""
    for name, only in fixed.items():
        value = options.pop(name, only)
        if value is not None and value != only:
            raise ValueError(f'{name}={value!r} is not an option of the quantized network')


def timm_attentions(model: nn.Module) -> list[nn.Module] | None:
    """The attention modules of a timm vision or Swin transformer by layer, or None.

    timm's ViT passes q and k, (B, heads, N, d), through `q_norm` and `k_norm`, which are identities unless the model
    normalises them: their outputs are in every case what the attention multiplies. Its Swin multiplies them as they
    are projected.
    """
    attentions = [getattr(block, 'attn', None) for block in network_blocks(model)]
    names = ('qkv', 'num_heads', 'q_norm', 'k_norm')
    is_timm = all(isinstance(attention, WindowAttention) or all(hasattr(attention, name) for name in names)
                  for attention in attentions)
    return attentions if attentions and is_timm else None


def _no_qk_message(model: nn.Module) -> str:
    return (f'teacher {type(model).__name__} has no timm attention to take q and k from: '
            'pass --dgd-weight 0 or choose a timm vision transformer as the teacher')
