"""A distillation token that starts as a copy of the class token, and is made to change nothing.

Weights of a network without a distillation token give a quantized network two tokens that are alike in every block:
twins. Softmax then counts the class token twice. That is made up for in the keys: with log 2 less in their scores, the
two together have the weight that one had.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from calibration.full_precision import FullPrecision, full_precision, heads_of
from quant_vision_transformer import QVisionTransformer

__all__ = ['halve_attention_to_twins']


@torch.no_grad()
def halve_attention_to_twins(model: QVisionTransformer, images: Tensor) -> None:
    """Changes the weights of the keys so that twins together get the attention of one; without twins, does nothing.

    The key of a token x (after the LayerNorm) becomes k + c u(x), where u is linear in x, 1 for the twins and 0 for
    patches, and q c / sqrt(d) = -log 2 for all q. Both hold in the least squares over the images, which on a DeiT is
    next to exact, because biases set the class token apart and the queries have much in common.

    Args:
        model: holds full-precision weights, without IRM.
        images: (B, 3, H, W).
    """
    if not model.has_twin_tokens:
        return
    full = FullPrecision(model)
    x = full.embed(images)
    for index, block in enumerate(model.blocks):
        attn, inputs = block.attn, block.norm1(x)
        heads, d = attn.num_heads, attn.head_dim
        q, _, _ = heads_of(attn, full_precision(attn.qkv, inputs))
        x = full.block(index, x)
        slope, constant = _indicator_of_twins(inputs.double(), attn.qkv.bias is not None)
        for head in range(heads):
            rows = slice((heads + head) * d, (heads + head + 1) * d)
            change = _direction_of_score(q[:, head].flatten(0, 1).double(), -math.log(2) * d ** 0.5)
            attn.qkv.weight[rows] += (change[:, None] * slope).to(x.dtype)
            if constant is not None:
                attn.qkv.bias[rows] += (change * constant).to(x.dtype)
    model.has_twin_tokens = False


def _indicator_of_twins(inputs: Tensor, has_constant: bool) -> tuple[Tensor, Tensor | None]:
    """slope (dim,) and constant of the linear function that is 1 for the two first tokens and 0 for the others."""
    images, tokens, _ = inputs.shape
    if has_constant:
        inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)
    weights = inputs.new_ones(tokens)
    weights[:2] = (tokens - 2) / 4  # the twins count half as much as all patches together
    rows, weights = inputs.flatten(0, 1), weights.repeat(images)[:, None]
    wanted = torch.zeros_like(inputs[..., :1])
    wanted[:, :2] = 1
    found = _solve(rows.mT @ (weights * rows), rows.mT @ (weights * wanted.flatten(0, 1)))[:, 0]
    return (found[:-1], found[-1]) if has_constant else (found, None)


def _direction_of_score(q: Tensor, score: float) -> Tensor:
    """c, (d,), so that q c is `score` for all rows of q, (n, d), in the least squares."""
    return _solve(q.mT @ q, score * q.sum(0)[:, None])[:, 0]


def _solve(gram: Tensor, wanted: Tensor) -> Tensor:
    """The solution of gram x = wanted, also where some directions never occur."""
    return torch.linalg.solve(gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram)).to(gram), wanted)
