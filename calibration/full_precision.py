"""The full-precision network behind a quantized one: what calibration brings the quantized one close to."""
from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.vision_transformer import LayerScale
from torch import Tensor

from _quan_base import LinearQ
from ops import clipped_gelu
from quant_vision_transformer import QAttention, QBlock, QVisionTransformer

__all__ = ['FullPrecision', 'fold_layer_scale', 'full_precision', 'full_precision_attention',
           'full_precision_block', 'full_precision_merging', 'heads_of', 'join_windows', 'split_windows', 'transitions']


Change = Callable[[nn.Module, Tensor], Tensor]  # a quantizer, and what it would quantize -> what is taken instead


def _unchanged(quantizer: nn.Module, values: Tensor) -> Tensor:
    return values


def full_precision(layer: LinearQ, x: Tensor, change: Change = _unchanged) -> Tensor:
    """What the layer computes without its quantizers."""
    return F.linear(change(layer.act, x), change(layer, layer.weight), layer.bias)


def heads_of(attn: QAttention, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3 H d) -> q, k, v, each (B, H, N, d)."""
    return qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind()


def _is_identity(norm: nn.LayerNorm) -> bool:
    return bool(((norm.weight == 1).all() & (norm.bias == 0).all()).item())


class FullPrecision:
    """The network of a quantized network's weights without any quantizer; it keeps copies of these weights.

    Where IRM is the identity that it starts from, the weights are taken to be of a network without it (a DeiT); else
    IRM is part of the full-precision network (the weights are of a quantized network with more bits).

    Attributes:
        has_irm: whether it is.
        model: what holds the copies; its blocks are computed by `block`.
        depth: number of blocks.
        num_prefix_tokens: number of tokens before the patches.
    """

    def __init__(self, model: QVisionTransformer) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        conv = self.model.patch_embed.proj
        conv.forward = partial(nn.Conv2d.forward, conv)
        self.depth, self.num_prefix_tokens = len(model.blocks), model.num_prefix_tokens
        self._transitions = transitions(self.model)
        norms = [norm for block in model.blocks for norm in (block.attn.norm_q, block.attn.norm_k)]
        self.has_irm = any(isinstance(norm, nn.LayerNorm) and not _is_identity(norm) for norm in norms)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> tokens, (B, N, dim)."""
        return self.model.embed(images)

    def transition(self, index: int, x: Tensor) -> Tensor:
        """What the block of that index gets of the output of the one before it."""
        return full_precision_merging(self._transitions[index], x) if index in self._transitions else x

    def block(self, index: int, x: Tensor) -> Tensor:
        """The output of a block, (B, N, dim)."""
        return full_precision_block(self.model.blocks[index], x, self.has_irm)

    def head(self, x: Tensor) -> Tensor:
        """The last block's output -> logits, (B, classes): the mean of the heads', or of their inputs without heads."""
        heads, inputs = self.model.heads, self.model.head_inputs(self.model.norm(x))
        return sum(full_precision(head, given) if isinstance(head, LinearQ) else given
                   for head, given in zip(heads, inputs, strict=True)) / len(heads)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits, see `head`."""
        x = self.embed(images)
        for index in range(self.depth):
            x = self.block(index, self.transition(index, x))
        return self.head(x)


def full_precision_attention(attn: QAttention, x: Tensor, has_irm: bool, change: Change = _unchanged,
                             ) -> tuple[Tensor, Tensor, Tensor]:
    """What Q-Attention computes without quantizers, (B, N, dim), and the q and k of its scores, (B, H, N, d)."""
    q, k, v = heads_of(attn, full_precision(attn.qkv, x, change))
    if has_irm:
        q, k = attn.norm_q(q), attn.norm_k(k)
    if attn.quantize_attn and change is not _unchanged:  # which is shown the probabilities
        probabilities = attn.probabilities(change(attn.q_act, q), change(attn.k_act, k))
        out = change(attn.attn_act, probabilities) @ change(attn.v_act, v)
    else:
        out = attn.attend(q, k, v)
    return full_precision(attn.proj, out.transpose(1, 2).flatten(2), change), q, k


def full_precision_block(block: QBlock, x: Tensor, has_irm: bool, change: Change = _unchanged) -> Tensor:
    """What a block computes without quantizers, (B, N, dim).

    Args:
        change: takes the place of the quantizers; what they would quantize is left as it is unless given.
    """
    mlp = block.mlp
    attended = full_precision_attention(block.attn, split_windows(block, block.norm1(x)), has_irm, change)[0]
    x = x + block.ls1(join_windows(block, attended))
    hidden = clipped_gelu(full_precision(mlp.fc1, block.norm2(x), change))
    return x + block.ls2(full_precision(mlp.fc2, hidden, change))


def transitions(model: nn.Module) -> dict[int, nn.Module]:
    """By the index of the block behind it, the patch merging of a network of several stages; none of a ViT."""
    return getattr(model, 'transitions', {})


def split_windows(block: nn.Module, x: Tensor) -> Tensor:
    """The tokens that attend to one another: all of (B, N, dim), or those of each window, (B windows, N', dim)."""
    return block.windows.split(x) if hasattr(block, 'windows') else x


def join_windows(block: nn.Module, x: Tensor) -> Tensor:
    """The inverse of `split_windows`."""
    return block.windows.join(x) if hasattr(block, 'windows') else x


def full_precision_merging(merging: nn.Module, x: Tensor) -> Tensor:
    """What patch merging computes without quantizers, (B, N, dim) -> (B, N / 4, 2 dim)."""
    return full_precision(merging.reduction, merging.norm(merging.neighbours(x)))


@torch.no_grad()
def fold_layer_scale(block: QBlock) -> None:
    """Multiplies LayerScale into the layers before it and makes it 1: the same block, in which what the layers give is
    what the residual sum gets."""
    for layer_scale, layer in ((block.ls1, block.attn.proj), (block.ls2, block.mlp.fc2)):
        if isinstance(layer_scale, LayerScale):
            layer.weight.mul_(layer_scale.gamma[:, None])
            layer.bias.mul_(layer_scale.gamma)
            layer_scale.gamma.fill_(1)
