"""Forward and backward of a linear layer of quantized operands, over the elementwise passes of `kernels`.

The codes are whole numbers, exact in every type of the product; x's scales are multiplied into the weight, which is the
smaller operand. The backward quantizes x and weight again instead of keeping their quantized copies.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ops.grid import Grid
from ops.pieces import Scratch, into, piece_size, scale_gradients, split, total
from ops.torch_kernels import TorchKernels

__all__ = ['linear_backward', 'linear_forward']


def linear_forward(kernels: TorchKernels, x: Tensor, weight: Tensor, bias: Tensor | None, x_scale: Tensor,
                   x_zero_point: Tensor, w_scale: Tensor, x_range: list[int], w_range: list[int], w_hat: Tensor | None,
                   gelu: bool, dtype: torch.dtype) -> Tensor:
    """x_hat @ w_hat^T + bias in `dtype`; see `reference.Reference.linear`. `x_range`, `w_range`: (qn, qp)."""
    of_x, of_w = Grid.of(x_scale, x_zero_point, *x_range), Grid.of(w_scale, None, *w_range)
    scaled = kernels.quantized_weight(weight, of_w, of_x.scale) if w_hat is None else w_hat * of_x.scale  # (N, K)
    scaled_t = scaled.to(dtype).t()
    rows = x.flatten(0, -2)                                                                               # (M, K)
    size = piece_size(len(rows), rows.shape[-1], x, kernels.piece_bytes)
    bias = rows.new_zeros(len(weight), dtype=dtype) if bias is None else bias.to(dtype)
    if size >= len(rows):
        out = torch.addmm(bias, kernels.centered_codes(rows, of_x, gelu=gelu).to(dtype), scaled_t)
    else:
        out, scratch = rows.new_empty(len(rows), len(weight), dtype=dtype), Scratch(True)
        for x_piece, out_piece in split(size, rows, out):
            codes = kernels.centered_codes(x_piece, of_x, scratch('codes', x_piece, x_scale.dtype), gelu)
            torch.addmm(bias, codes.to(dtype), scaled_t, out=out_piece)
    return out.view(*x.shape[:-1], len(weight))


def linear_backward(kernels: TorchKernels, grad: Tensor, x: Tensor, weight: Tensor, x_scale: Tensor,
                    x_zero_point: Tensor, w_scale: Tensor, x_range: list[int], w_range: list[int], gelu: bool,
                    has_bias: bool) -> list[Tensor]:
    """The gradients of x, weight, bias (empty where there is none), x_scale, x_zero_point and w_scale."""
    of_x, of_w = Grid.of(x_scale, x_zero_point, *x_range), Grid.of(w_scale, None, *w_range)
    w_hat, w_codes, w_saved = kernels.quantized_weight_and_saved(weight, of_w)
    w_half = w_hat.to(grad.dtype)  # under autocast the product ran in half precision, and so do its two gradients
    rows, x_rows = grad.flatten(0, -2), x.flatten(0, -2)                        # (M, N), (M, K)
    size = piece_size(len(rows), x_rows.shape[-1], x, kernels.piece_bytes)
    scratch, grad_w_hat, sums = Scratch(size < len(rows)), None, []
    grad_x = x_rows.new_empty(x_rows.shape, dtype=w_hat.dtype) if scratch.used else None
    for g, x_piece, out in split(size, rows, x_rows, grad_x):
        codes, saved = kernels.centered_codes_and_saved(x_piece, of_x, scratch.two('x', x_piece, w_hat.dtype), gelu)
        codes_half = codes.to(g.dtype)
        grad_w_hat = g.mT @ codes_half if grad_w_hat is None else grad_w_hat.addmm_(g.mT, codes_half)
        grad_piece, piece_sums = kernels.backward_(into(out, g, w_half), codes, saved, of_x, x_piece if gelu else None)
        sums.append(piece_sums)
    grad_w_hat = grad_w_hat.to(w_hat.dtype).mul_(of_x.scale)
    grad_w, w_sums = kernels.backward_(grad_w_hat, w_codes, w_saved, of_w)
    grad_w_scale, _ = scale_gradients(w_sums, of_w, weight.numel())
    grad_x = (grad_piece if grad_x is None else grad_x).to(x.dtype).view(x.shape)
    grad_bias = rows.sum(0) if has_bias else rows.new_empty(0)
    return [grad_x, grad_w.to(weight.dtype), grad_bias, *scale_gradients(total(sums), of_x, x.numel()), grad_w_scale]
