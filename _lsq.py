"""The mathematics of learned step size quantization (LSQ): pure functions of tensors, with their gradients.

LSQ is Esser et al., ICLR 2020 (arXiv 1902.08153); the zero point of the activations is that of LSQ+ (Bhalgat et al.,
2020, arXiv 2004.09576), both as Q-ViT uses them (Li et al., NeurIPS 2022, Section 3.1). With integer codes in [qn, qp]:

    weights       w_hat = round(clamp(w / alpha, qn, qp)) * alpha                 one alpha per output channel
    activations   x_hat = (round(clamp(x / alpha + z, qn, qp)) - z) * alpha       one alpha and z per input channel

Rounding is to nearest even and straight-through; z is rounded to an integer, straight-through too; the gradients of
alpha and z are multiplied by 1 / sqrt(numel * qp).

A quantized tensor is never kept for the backward: the products below keep what their full-precision counterparts keep
and quantize it again. Nothing here reads a tensor's value on the host.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['LSQ', 'code_range', 'codes', 'fake_quantize', 'min_step', 'quantized_attention',
           'quantized_linear', 'zero_outside_']


class LSQ(NamedTuple):
    """A quantizer's state in one call: `step` and `zero` broadcast against the tensor, `zero` is None for weights."""
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
    return LSQ(step, None if q.zero is None else q.zero.detach().round(), q.qn, q.qp)


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
    dz = (dx - grad) alpha, both times 1 / sqrt(numel * qp), where x is all of the quantized tensor's `numel` values or
    a piece of them.
    """
    grad, scale = grad.to(position.dtype), (numel * q.qp) ** -0.5
    grad_sum = None if q.zero is None else grad.sum_to_size(q.zero.shape)
    terms = x_hat.mul_(grad)
    grad_x = zero_outside_(grad, position, *_borders(q, position.dtype))
    grad_step = terms.addcmul_(grad_x, x.to(position.dtype), value=-1).sum_to_size(q.step.shape) / q.step * scale
    if q.zero is None:
        return grad_x.to(x.dtype), grad_step, None
    grad_zero = (grad_x.sum_to_size(q.zero.shape) - grad_sum) * q.step * scale
    return grad_x.to(x.dtype), grad_step, grad_zero


def _borders(q: LSQ, dtype: torch.dtype) -> tuple[float, float]:
    """The range of codes, wider by the smallest of margins: a value on its border is inside."""
    info = torch.finfo(dtype)
    return q.qn - max(-q.qn * info.eps, info.tiny), q.qp * (1 + info.eps)


def zero_outside_(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """`grad` where low < x < high and 0 elsewhere, in place.

    By hardtanh's backward, the one elementwise kernel that masks without a tensor of booleans, which are slow on CPUs.
    """
    if torch.compiler.is_compiling():  # takes no `out`, and needs none: it fuses
        return torch.ops.aten.hardtanh_backward(grad, x, low, high)
    return torch.ops.aten.hardtanh_backward.grad_input(grad, x, low, high, grad_input=grad)


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


PIECE_BYTES = 5 << 19


def _piece(items: int, numel: int, like: Tensor) -> int:
    """How many of a batch's items to compute at a time, with `numel` values each in the largest temporary.

    A pass over a piece that stays in a CPU's cache is several times faster than one over all the batch. GPUs and the
    compiler, which fuses the passes, get all at once.
    """
    if like.device.type != 'cpu' or torch.compiler.is_compiling():
        return items
    most = max(1, PIECE_BYTES // max(1, numel * like.element_size()))
    return math.ceil(items / math.ceil(items / most)) if items else 1  # pieces of equal size


def quantized_linear(x: Tensor, weight: Tensor, qx: LSQ, qw: LSQ, bias: Tensor | None = None,
                     w_hat: Tensor | None = None) -> Tensor:
    """x_hat @ w_hat^T + bias, keeping x and weight for the backward.

    Args:
        x: (..., K)
        weight: (N, K)
        qx, qw: quantizers of x and of the weight.
        bias: (N,)
        w_hat: the quantized weight, where the caller has it already.

    Returns:
        (..., N)
    """
    return _QuantizedLinear.apply(x, weight, bias, qx.step, qx.zero, qw.step, (qx.qn, qx.qp), (qw.qn, qw.qp), w_hat)


class _QuantizedLinear(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, weight, bias, x_step, x_zero, w_step, x_range, w_range, w_hat):
        ctx.x_range, ctx.w_range, ctx.has_bias = x_range, w_range, bias is not None
        ctx.save_for_backward(x, weight, x_step, x_zero, w_step)
        if w_hat is None:
            w_hat = _quantize(weight, _effective(LSQ(w_step, None, *w_range)))
        return F.linear(_quantize(x, _effective(LSQ(x_step, x_zero, *x_range))), w_hat, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, x_step, x_zero, w_step = ctx.saved_tensors
        qx, qw = _effective(LSQ(x_step, x_zero, *ctx.x_range)), _effective(LSQ(w_step, None, *ctx.w_range))
        position_w, w_hat = _positions_and_values(weight, qw)
        w_half = w_hat.to(grad.dtype)  # under autocast the product ran in half precision, and so do its two gradients
        rows, x_rows = grad.flatten(0, -2), x.flatten(0, -2)                        # (M, N), (M, K)
        size = _piece(len(rows), x_rows.shape[-1], x)
        grad_x = x_rows.new_empty(x_rows.shape, dtype=w_hat.dtype) if size < len(rows) else None
        grad_w_hat, sums = None, []
        for g, x_piece, out in _split(size, rows, x_rows, grad_x):
            position, x_hat = _positions_and_values(x_piece, qx)
            x_half = x_hat.to(g.dtype)
            grad_w_hat = g.mT @ x_half if grad_w_hat is None else grad_w_hat.addmm_(g.mT, x_half)
            grad_piece, *grads = _lsq_backward_(_into(out, g, w_half), x_piece, position, x_hat, qx, x.numel())
            sums.append(grads)
        grad_x_step, grad_x_zero = _total(sums)
        grad_w, grad_w_step, _ = _lsq_backward_(grad_w_hat, weight, position_w, w_hat, qw, weight.numel())
        grad_x = (grad_piece if grad_x is None else grad_x.to(x.dtype)).view(x.shape)
        return (grad_x, grad_w, rows.sum(0) if ctx.has_bias else None, grad_x_step, grad_x_zero, grad_w_step,
                None, None, None)


def _split(size: int, *tensors: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """The tensors in pieces of `size` along their first axis; None stays None."""
    count = -(-len(tensors[0]) // size)
    return zip(*([None] * count if tensor is None else tensor.split(size) for tensor in tensors), strict=True)


def _into(out: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in `out` where there is one."""
    if out is None:
        return a @ b
    return torch.matmul(a, b, out=out) if out.dtype == a.dtype else out.copy_(a @ b)


def _total(sums: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Elementwise totals of the pieces' tuples."""
    return [sum(terms[1:], start=terms[0]) for terms in zip(*sums, strict=True)]


def quantized_attention(q: Tensor, k: Tensor, v: Tensor, quantizers: tuple[LSQ, LSQ, LSQ, LSQ], scale: float,
                        dropout: Tensor | None = None) -> Tensor:
    """A_hat v_hat with A = dropout * softmax(scale * q_hat k_hat^T), keeping q, k, v and no N x N map.

    The backward computes the probabilities again: that adds a product to its four, and saves their memory.

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
        size = _attention_piece(q)
        out = torch.empty_like(q, dtype=dtype) if size < len(q) else None
        for q_, k_, v_, dropout_, out_ in _split(size, q, k, v, dropout, out):
            attn = _probabilities(_quantize(q_, qq), _quantize(k_, qk), scale, dtype)
            if dropout_ is not None:
                attn = attn * dropout_
            piece = _into(out_, _quantize(attn, qa).to(dtype), _quantize(v_, qv).to(dtype))
        return piece if out is None else out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *steps, dropout = ctx.saved_tensors
        qq, qk, qv, qa = _attention_quantizers(steps, ctx.ranges)
        dtype, numel, a_numel = ctx.dtype, q.numel(), q.numel() // q.shape[-1] * q.shape[-2]
        size, sums = _attention_piece(q), []
        outs = [None, None, None]
        if size < len(q):
            outs = [torch.empty(q.shape, dtype=qq.step.dtype, device=q.device) for _ in outs]
        for q_, k_, v_, dropout_, g, *outs_ in _split(size, q, k, v, dropout, grad, *outs):
            g = g.to(dtype).contiguous()
            (position_q, q_hat), (position_k, k_hat), (position_v, v_hat) = (
                _positions_and_values(x, quantizer) for x, quantizer in ((q_, qq), (k_, qk), (v_, qv)))
            softmax = _probabilities(q_hat, k_hat, ctx.scale, dtype)
            attn = softmax if dropout_ is None else softmax * dropout_
            position_a, attn_hat = _positions_and_values(attn, qa)

            grad_v_hat, grad_attn_hat = _into(outs_[2], attn_hat.to(dtype).mT, g), g @ v_hat.to(dtype).mT
            grad_attn, *grad_a = _lsq_backward_(grad_attn_hat, attn, position_a, attn_hat, qa, a_numel)
            if dropout_ is not None:
                grad_attn = grad_attn * dropout_
            grad_scores = torch._softmax_backward_data(grad_attn, softmax, -1, softmax.dtype).to(dtype)
            grad_q_hat = _into(outs_[0], grad_scores, k_hat.to(dtype)).mul_(ctx.scale)
            grad_k_hat = _into(outs_[1], grad_scores.mT, q_hat.to(dtype)).mul_(ctx.scale)
            grad_q, *grad_qq = _lsq_backward_(grad_q_hat, q_, position_q, q_hat, qq, numel)
            grad_k, *grad_qk = _lsq_backward_(grad_k_hat, k_, position_k, k_hat, qk, numel)
            grad_v, *grad_qv = _lsq_backward_(grad_v_hat, v_, position_v, v_hat, qv, numel)
            sums.append((*grad_qq, *grad_qk, *grad_qv, *grad_a))
        grads = (grad_q, grad_k, grad_v) if size == len(q) else (out.to(q.dtype) for out in outs)
        return *grads, *_total(sums), None, None, None, None


def _attention_quantizers(steps: list[Tensor], ranges: tuple[tuple[int, int], ...]) -> list[LSQ]:
    """Of q, k, v and A, from their steps and zero points in turn."""
    return [_effective(LSQ(step, zero, *code_range))
            for step, zero, code_range in zip(steps[::2], steps[1::2], ranges, strict=True)]


def _attention_piece(q: Tensor) -> int:
    """How many images to compute at a time, so that an N x N map of theirs stays in the cache."""
    return _piece(len(q), q.shape[1] * q.shape[2] ** 2, q)
