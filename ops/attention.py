"""Forward and backward of attention of quantized operands, over the elementwise passes of `kernels`.

    softmax(scale q_hat k_hat^T), quantized too, times v_hat

Neither a quantized tensor nor an N x N map is kept for the backward, which computes them again: that adds a product to
its four, and saves their memory. Outer pieces hold the q, k and v of a few images, inner ones their N x N maps, which
are larger.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ops.grid import Grid
from ops.pieces import Scratch, into, piece_size, scale_gradients, split, total
from ops.torch_kernels import TorchKernels

__all__ = ['attention_backward', 'attention_forward']


def attention_forward(kernels: TorchKernels, q: Tensor, k: Tensor, v: Tensor, dropout: Tensor | None,
                      qparams: list[Tensor], ranges: list[int], scale: float, dtype: torch.dtype) -> Tensor:
    """A_hat v_hat in `dtype`; see `reference.Reference.attention`.

    Args:
        qparams: scales and zero points of q, k, v and A in turn.
        ranges: so their qn and qp.
    """
    of_q, of_k, of_v, of_attn = _grids(qparams, ranges)
    wide = of_q.scale.dtype
    few, one = _pieces(q, kernels.piece_bytes)
    scratch = Scratch(one < len(q))
    out = q.new_empty(q.shape, dtype=dtype) if scratch.used else None
    for q_few, k_few, v_few, *maps in split(few, q, k, v, dropout, out):
        q_few, k_few, v_few = (kernels.centered_codes(x, grid, scratch(name, x, grid.scale.dtype))
                               for name, x, grid in (('q', q_few, of_q), ('k', k_few, of_k), ('v', v_few, of_v)))
        q_few.mul_(scale * of_q.scale * of_k.scale)
        v_few.mul_(of_v.scale * of_attn.scale)
        for q_, k_, v_, dropout_, out_ in split(one, q_few, k_few, v_few, *maps):
            codes = kernels.softmax_codes(_scores(q_, k_, dtype, scratch), of_attn, dropout_, wide, scratch)
            piece = into(out_, codes.to(dtype), v_.to(dtype))
    return piece if out is None else out


def attention_backward(kernels: TorchKernels, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, dropout: Tensor | None,
                       qparams: list[Tensor], ranges: list[int], scale: float, dtype: torch.dtype) -> list[Tensor]:
    """The gradients of q, k, v and `qparams`."""
    of_q, of_k, of_v, of_attn = _grids(qparams, ranges)
    wide, sums, sums_attn, outs = of_q.scale.dtype, [], [], [None, None, None]
    few, one = _pieces(q, kernels.piece_bytes)
    scratch = Scratch(one < len(q))
    if scratch.used:
        outs = [torch.empty(q.shape, dtype=wide, device=q.device) for _ in outs]
    for q_few, k_few, v_few, dropout_few, g_few, *outs_few in split(few, q, k, v, dropout, grad, *outs):
        g_few = g_few.to(dtype).contiguous()
        (codes_q, saved_q), (codes_k, saved_k), (codes_v, saved_v) = (
            kernels.centered_codes_and_saved(x, grid, scratch.two(name, x, wide))
            for name, x, grid in (('q', q_few, of_q), ('k', k_few, of_k), ('v', v_few, of_v)))
        scaled_q = torch.mul(codes_q, scale * of_q.scale * of_k.scale, out=scratch('scaled q', q_few, wide))
        v_hat = torch.mul(codes_v, of_v.scale, out=scratch('v_hat', v_few, wide))
        for q_, k_, v_, dropout_, g, *outs_ in split(one, scaled_q, codes_k, v_hat, dropout_few, g_few, *outs_few):
            scores = _scores(q_, k_, dtype, scratch)
            codes, saved, free = kernels.softmax_codes_and_saved(scores, of_attn, dropout_, wide, scratch)
            grad_v = into(outs_[2], codes.to(dtype).mT, g)
            grad_scores, piece_sums = kernels.softmax_backward(into(free, g, v_.to(dtype).mT), codes, saved, of_attn,
                                                               dropout_, scratch)
            sums_attn.append(piece_sums)
            grad_q = into(outs_[0], grad_scores, k_.to(dtype))
            grad_k = into(outs_[1], grad_scores.mT, q_.to(dtype))
        if scratch.used:
            grad_q, grad_k, grad_v = outs_few
        grad_q, sums_q = kernels.backward_(grad_q.mul_(scale * of_k.scale), codes_q, saved_q, of_q)
        grad_k, sums_k = kernels.backward_(grad_k.mul_(of_k.reciprocal), codes_k, saved_k, of_k)
        grad_v, sums_v = kernels.backward_(grad_v.mul_(of_attn.scale), codes_v, saved_v, of_v)
        sums.append((*sums_q, *sums_k, *sums_v))
    grads, sums = outs if scratch.used else (grad_q, grad_k, grad_v), total(sums)
    numel, attn_numel = q.numel(), q.numel() // q.shape[-1] * q.shape[-2]
    return [*(grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True)),
            *scale_gradients(sums[:3], of_q, numel), *scale_gradients(sums[3:6], of_k, numel),
            *scale_gradients(sums[6:], of_v, numel), *scale_gradients(total(sums_attn), of_attn, attn_numel)]


def _scores(q: Tensor, k: Tensor, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """q k^T in `dtype`: (B, H, N, d), (B, H, N, d) -> (B, H, N, N)."""
    return into(scratch('scores', q, dtype, q.shape[1], q.shape[2], q.shape[2]), q.to(dtype), k.to(dtype).mT)


def _grids(qparams: list[Tensor], ranges: list[int]) -> list[Grid]:
    return [Grid.of(*each) for each in zip(qparams[::2], qparams[1::2], ranges[::2], ranges[1::2], strict=True)]


def _pieces(q: Tensor, piece_bytes: int) -> tuple[int, int]:
    """How many images to compute at a time: of q, k and v, and of the N x N maps."""
    (_, heads, tokens, width), size = q.shape, len(q)
    one = piece_size(size, heads * tokens ** 2, q, piece_bytes)
    return max(one, piece_size(size, heads * tokens * width, q, piece_bytes)), one
