"""The mathematics of learned step size quantization (LSQ): pure functions of tensors, with their gradients.

LSQ is Esser et al., ICLR 2020 (arXiv 1902.08153); the zero point of the activations is that of LSQ+ (Bhalgat et al., 2020,
arXiv 2004.09576), both as Q-ViT uses them (Li et al., NeurIPS 2022, Section 3.1). With the integer range [qn, qp]:

    weights       w_hat = round(clamp(w / alpha, qn, qp)) * alpha                 one alpha per output channel
    activations   x_hat = (round(clamp(x / alpha + z, qn, qp)) - z) * alpha       one alpha and z per input channel

Rounding is to nearest even and straight-through; z is rounded to an integer, straight-through too; the gradients of alpha
and z are multiplied by 1 / sqrt(numel * qp).

A quantized tensor is never kept for the backward: the products below keep what their full-precision counterparts keep and
quantize it again. Nothing here reads a tensor's value on the host.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['LSQ', 'Convolution', 'code_range', 'codes', 'fake_quantize', 'min_step', 'quantized_attention',
           'quantized_product']


class LSQ(NamedTuple):
    """A quantizer's state during one call: `step` and `zero` broadcast against the tensor, `zero` is None for weights."""
    step: Tensor
    zero: Tensor | None
    qn: int
    qp: int


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """(qn, qp), the smallest and the largest integer code."""
    return (-2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2 ** bits - 1)


def min_step(dtype: torch.dtype) -> float:
    """Smallest step in use: far below any trained one, large enough to divide by in `dtype`."""
    return max(1e-8, torch.finfo(dtype).tiny)


def _effective(q: LSQ) -> LSQ:
    """The quantizer with a positive step and an integer zero point; both are straight-through for the gradient."""
    step = q.step.detach().clamp_min(min_step(q.step.dtype))
    return q._replace(step=step, zero=None if q.zero is None else q.zero.detach().round())


def _positions(x: Tensor, q: LSQ) -> Tensor:
    """x / alpha + z, a fresh tensor: where each value lies on the grid of codes, before clamping and rounding."""
    position = x / q.step
    return position if q.zero is None else position.add_(q.zero)


def _dequantize_(codes: Tensor, q: LSQ) -> Tensor:
    """(codes - z) * alpha, in place."""
    if q.zero is not None:
        codes = codes.sub_(q.zero)
    return codes.mul_(q.step)


def _quantize(x: Tensor, q: LSQ) -> Tensor:
    """x_hat."""
    return _dequantize_(_positions(x, q).clamp_(q.qn, q.qp).round_(), q)


def _positions_and_values(x: Tensor, q: LSQ) -> tuple[Tensor, Tensor]:
    """x / alpha + z and x_hat."""
    position = _positions(x, q)
    return position, _dequantize_(position.clamp(q.qn, q.qp).round_(), q)


def codes(x: Tensor, q: LSQ) -> Tensor:
    """The integer codes of x, int32, in [qn, qp]."""
    return _positions(x, _effective(q)).clamp_(q.qn, q.qp).round_().to(torch.int32)


def fake_quantize(x: Tensor, q: LSQ) -> Tensor:
    """x_hat, differentiable in x, step and zero point; keeps x for the backward."""
    return _FakeQuantize.apply(x, *q)


def _lsq_backward_(grad: Tensor, x: Tensor, position: Tensor, x_hat: Tensor, q: LSQ,
                   numel: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, alpha and z from `grad`, that of x_hat. `grad` and `x_hat` are used up: large tensors are dear.

    dx = grad inside the range and 0 outside. Summed over a channel, dalpha = (grad x_hat - dx x) / alpha and
    dz = (dx - grad) alpha, both times 1 / sqrt(numel * qp), where x is all of the quantized tensor's `numel` values or a
    piece of them.
    """
    grad, scale = grad.to(position.dtype), (numel * q.qp) ** -0.5
    grad_sum = None if q.zero is None else grad.sum_to_size(q.zero.shape)
    terms = x_hat.mul_(grad)
    # hardtanh's backward is the one elementwise kernel that masks without a tensor of booleans, which are slow on CPUs.
    # Its bounds are exclusive, but a value on the border is inside the range: hence the smallest of margins.
    info = torch.finfo(position.dtype)
    low, high = q.qn - max(-q.qn * info.eps, info.tiny), q.qp * (1 + info.eps)
    grad_x = torch.ops.aten.hardtanh_backward.grad_input(grad, position, low, high, grad_input=grad)
    grad_step = terms.addcmul_(grad_x, x.to(position.dtype), value=-1).sum_to_size(q.step.shape) / q.step * scale
    if q.zero is None:
        return grad_x.to(x.dtype), grad_step, None
    grad_zero = (grad_x.sum_to_size(q.zero.shape) - grad_sum) * q.step * scale
    return grad_x.to(x.dtype), grad_step, grad_zero


class _FakeQuantize(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, step, zero, qn, qp):
        ctx.code_range = qn, qp
        ctx.save_for_backward(x, step, zero)
        return _quantize(x, _effective(LSQ(step, zero, qn, qp)))

    @staticmethod
    def backward(ctx, grad):
        x, step, zero = ctx.saved_tensors
        q = _effective(LSQ(step, zero, *ctx.code_range))
        return *_lsq_backward_(grad.clone(), x, *_positions_and_values(x, q), q, x.numel()), None, None


# --- products of quantized operands -----------------------------------------------------------------------------------


PIECE_BYTES = 2 << 20


def _piece(items: int, numel: int, like: Tensor) -> int:
    """How many of a batch's items to compute at a time, with `numel` values each in the largest temporary.

    A pass over a piece that stays in a CPU's cache is several times faster than one over all the batch. GPUs and the
    compiler, which fuses the passes, get all at once.
    """
    if like.device.type != 'cpu' or torch.compiler.is_compiling():
        return items
    return max(1, min(items, PIECE_BYTES // max(1, numel * like.element_size())))


class Convolution(NamedTuple):
    """The arguments that make the product of images and filters a convolution."""
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def quantized_product(x: Tensor, weight: Tensor, qx: LSQ, qw: LSQ, bias: Tensor | None = None,
                      conv: Convolution | None = None, w_hat: Tensor | None = None) -> Tensor:
    """x_hat @ w_hat^T + bias (or the convolution), keeping x and weight for the backward.

    Args:
        x: (..., K), or images (B, K, H, W) for a convolution.
        weight: (N, K), or filters (N, K / groups, h, w).
        qx, qw: quantizers of x and of the weight.
        bias: (N,)
        conv: makes it a convolution.
        w_hat: the quantized weight, where the caller has it already.

    Returns:
        (..., N), or (B, N, H', W').
    """
    return _QuantizedProduct.apply(x, weight, bias, qx.step, qx.zero, qw.step, (qx.qn, qx.qp), (qw.qn, qw.qp), conv, w_hat)


class _QuantizedProduct(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, weight, bias, x_step, x_zero, w_step, x_range, w_range, conv, w_hat):
        ctx.x_range, ctx.w_range, ctx.conv, ctx.has_bias = x_range, w_range, conv, bias is not None
        ctx.save_for_backward(x, weight, x_step, x_zero, w_step)
        x_hat = _quantize(x, _effective(LSQ(x_step, x_zero, *x_range)))
        if w_hat is None:
            w_hat = _quantize(weight, _effective(LSQ(w_step, None, *w_range)))
        return F.linear(x_hat, w_hat, bias) if conv is None else F.conv2d(x_hat, w_hat, bias, *conv)

    @staticmethod
    def backward(ctx, grad):
        x, weight, x_step, x_zero, w_step = ctx.saved_tensors
        qx, qw = _effective(LSQ(x_step, x_zero, *ctx.x_range)), _effective(LSQ(w_step, None, *ctx.w_range))
        position_w, w_hat = _positions_and_values(weight, qw)
        if ctx.conv is None:
            grads_x, grad_w_hat = _linear_backward(grad, x, qx, w_hat)
        else:
            position_x, x_hat = _positions_and_values(x, qx)
            grad_x_hat, grad_w_hat, _ = torch.ops.aten.convolution_backward(
                grad, x_hat.to(grad.dtype), w_hat.to(grad.dtype), None, ctx.conv.stride, ctx.conv.padding,
                ctx.conv.dilation, False, (0, 0), ctx.conv.groups, (True, True, False))
            grads_x = _lsq_backward_(grad_x_hat, x, position_x, x_hat, qx, x.numel())
        grad_w, grad_w_step, _ = _lsq_backward_(grad_w_hat, weight, position_w, w_hat, qw, weight.numel())
        grad_bias = None
        if ctx.has_bias:
            grad_bias = grad.flatten(0, -2).sum(0) if ctx.conv is None else grad.sum((0, 2, 3))
        grad_x, grad_x_step, grad_x_zero = grads_x
        return grad_x, grad_w, grad_bias, grad_x_step, grad_x_zero, grad_w_step, None, None, None, None


def _linear_backward(grad: Tensor, x: Tensor, qx: LSQ, w_hat: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Gradients of (x, its step, its zero point), and of w_hat. grad: (..., N), x: (..., K), w_hat: (N, K)."""
    rows, x_rows = grad.flatten(0, -2), x.flatten(0, -2)
    w_hat = w_hat.to(grad.dtype)  # under autocast the product ran in half precision, and so do its two gradients
    size = _piece(len(rows), x.shape[-1], x)
    grads_x, grad_w_hat = [], None
    for g, piece in zip(rows.split(size), x_rows.split(size), strict=True):
        position, x_hat = _positions_and_values(piece, qx)
        x_hat_half = x_hat.to(grad.dtype)
        grad_w_hat = g.mT @ x_hat_half if grad_w_hat is None else grad_w_hat.addmm_(g.mT, x_hat_half)
        grads_x.append(_lsq_backward_(g @ w_hat, piece, position, x_hat, qx, x.numel()))
    grad_x, grad_step, grad_zero = _join(grads_x)
    return (grad_x.view(x.shape), grad_step, grad_zero), grad_w_hat


def _join(grads: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a tensor, its step and its zero point from those of its pieces."""
    if len(grads) == 1:
        return grads[0]
    values, steps, zeros = zip(*grads, strict=True)
    return torch.cat(values), sum(steps), sum(zeros)


def quantized_attention(q: Tensor, k: Tensor, v: Tensor, quantizers: tuple[LSQ, LSQ, LSQ, LSQ], scale: float,
                        dropout: Tensor | None = None) -> Tensor:
    """A_hat v_hat with A = dropout * softmax(scale * q_hat k_hat^T), keeping q, k, v and no N x N map.

    The backward computes the probabilities again: that costs one of its six products, and saves their memory.

    Args:
        q, k, v: (B, H, N, d)
        quantizers: of q, k, v and A.
        scale: of the scores, d ** -0.5.
        dropout: (B, H, N, N), 0 or 1 / (1 - p) each; None for no dropout.

    Returns:
        (B, H, N, d)
    """
    steps_and_zeros = [tensor for quantizer in quantizers for tensor in (quantizer.step, quantizer.zero)]
    ranges = tuple((quantizer.qn, quantizer.qp) for quantizer in quantizers)
    # As autocast would choose for the products; probabilities and codes are computed in the steps' precision.
    device = q.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.promote_types(
        q.dtype, quantizers[0].step.dtype)
    return _QuantizedAttention.apply(q, k, v, *steps_and_zeros, ranges, scale, dtype, dropout)


def _probabilities(q_hat: Tensor, k_hat: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """softmax(scale * q_hat k_hat^T), the product in `dtype`: (B, H, N, d), (B, H, N, d) -> (B, H, N, N)."""
    scores = (q_hat * scale).to(dtype) @ k_hat.to(dtype).mT
    return scores.softmax(-1, dtype=q_hat.dtype)


class _QuantizedAttention(torch.autograd.Function):

    @staticmethod
    def forward(ctx, q, k, v, q_step, q_zero, k_step, k_zero, v_step, v_zero, a_step, a_zero, ranges, scale, dtype,
                dropout):
        ctx.ranges, ctx.scale, ctx.dtype = ranges, scale, dtype
        steps = q_step, q_zero, k_step, k_zero, v_step, v_zero, a_step, a_zero
        ctx.save_for_backward(q, k, v, *steps, dropout)
        qq, qk, qv, qa = _attention_quantizers(steps, ranges)
        out = []
        for q_, k_, v_, dropout_ in _attention_pieces(q, k, v, dropout):
            attn = _probabilities(_quantize(q_, qq), _quantize(k_, qk), scale, dtype)
            if dropout_ is not None:
                attn = attn * dropout_
            out.append(_quantize(attn, qa).to(dtype) @ _quantize(v_, qv).to(dtype))
        return out[0] if len(out) == 1 else torch.cat(out)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *steps, dropout = ctx.saved_tensors
        qq, qk, qv, qa = _attention_quantizers(steps, ctx.ranges)
        dtype, numel, grads = ctx.dtype, q.numel(), []
        for q_, k_, v_, dropout_, g in _attention_pieces(q, k, v, dropout, grad.to(dtype)):
            (position_q, q_hat), (position_k, k_hat), (position_v, v_hat) = (
                _positions_and_values(x, quantizer) for x, quantizer in ((q_, qq), (k_, qk), (v_, qv)))
            softmax = _probabilities(q_hat, k_hat, ctx.scale, dtype)
            attn = softmax if dropout_ is None else softmax * dropout_
            position_a, attn_hat = _positions_and_values(attn, qa)

            grad_v_hat, grad_attn_hat = attn_hat.to(dtype).mT @ g, g @ v_hat.to(dtype).mT
            grad_attn, *grad_a = _lsq_backward_(grad_attn_hat, attn, position_a, attn_hat, qa, numel // q.shape[-1] *
                                                q.shape[-2])
            if dropout_ is not None:
                grad_attn = grad_attn * dropout_
            grad_scores = torch._softmax_backward_data(grad_attn, softmax, -1, softmax.dtype).to(dtype)
            grad_q_hat = (grad_scores @ k_hat.to(dtype)).mul_(ctx.scale)
            grad_k_hat = (grad_scores.mT @ q_hat.to(dtype)).mul_(ctx.scale)
            grads.append((_lsq_backward_(grad_q_hat, q_, position_q, q_hat, qq, numel),
                          _lsq_backward_(grad_k_hat, k_, position_k, k_hat, qk, numel),
                          _lsq_backward_(grad_v_hat, v_, position_v, v_hat, qv, numel), (g[:0], *grad_a)))
        (grad_q, *grad_qq), (grad_k, *grad_qk), (grad_v, *grad_qv), (_, *grad_a) = (
            _join(pieces) for pieces in zip(*grads, strict=True))
        return grad_q, grad_k, grad_v, *grad_qq, *grad_qk, *grad_qv, *grad_a, None, None, None, None


def _attention_quantizers(steps: list[Tensor], ranges: tuple[tuple[int, int], ...]) -> list[LSQ]:
    """Of q, k, v and A, from their steps and zero points in turn."""
    return [_effective(LSQ(step, zero, *code_range))
            for step, zero, code_range in zip(steps[::2], steps[1::2], ranges, strict=True)]


def _attention_pieces(q: Tensor, k: Tensor, v: Tensor, dropout: Tensor | None, *more: Tensor) -> Iterator[tuple]:
    """The arguments, split along the batch."""
    size = _piece(len(q), q[0, ..., 0].numel() * q.shape[-2], q)
    dropouts = [None] * -(-len(q) // size) if dropout is None else dropout.split(size)
    return zip(q.split(size), k.split(size), v.split(size), dropouts, *(tensor.split(size) for tensor in more),
               strict=True)
