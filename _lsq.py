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


def _lsq_backward(grad: Tensor, x: Tensor, position: Tensor, x_hat: Tensor,
                  q: LSQ) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, alpha and z from `grad`, that of x_hat. `x_hat` is used up.

    dx = grad inside the range and 0 outside. Summed over a channel, dalpha = (grad x_hat - dx x) / alpha and
    dz = (dx - grad) alpha, both times 1 / sqrt(numel * qp).
    """
    # hardtanh's backward is the one elementwise kernel that masks without a tensor of booleans, which are slow on CPUs.
    # Its bounds are exclusive, but a value on the border is inside the range: hence the smallest of margins.
    info, grad = torch.finfo(position.dtype), grad.to(position.dtype)
    low, high = q.qn - max(-q.qn * info.eps, info.tiny), q.qp * (1 + info.eps)
    grad_x = torch.ops.aten.hardtanh_backward(grad, position, low, high)
    scale = (x.numel() * q.qp) ** -0.5
    grad_step = x_hat.mul_(grad).addcmul_(grad_x, x.to(position.dtype), value=-1).sum_to_size(q.step.shape)
    grad_step = grad_step / q.step * scale
    if q.zero is None:
        return grad_x.to(x.dtype), grad_step, None
    grad_zero = grad_x.sum_to_size(q.zero.shape) - grad.sum_to_size(q.zero.shape)
    return grad_x.to(x.dtype), grad_step, grad_zero * q.step * scale


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
        return *_lsq_backward(grad, x, *_positions_and_values(x, q), q), None, None


# --- products of quantized operands ------------------------------------------------------------------------------------


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
        position_x, x_hat = _positions_and_values(x, qx)
        position_w, w_hat = _positions_and_values(weight, qw)
        # Under autocast the product ran in half precision, and so do its two gradients.
        operands = x_hat.to(grad.dtype), w_hat.to(grad.dtype)
        grad_bias = None
        if ctx.conv is None:
            rows = grad.flatten(0, -2)
            grad_x_hat, grad_w_hat = grad @ operands[1], rows.mT @ operands[0].flatten(0, -2)
            if ctx.has_bias:
                grad_bias = rows.sum(0)
        else:
            grad_x_hat, grad_w_hat, _ = torch.ops.aten.convolution_backward(
                grad, *operands, None, ctx.conv.stride, ctx.conv.padding, ctx.conv.dilation, False, (0, 0),
                ctx.conv.groups, (True, True, False))
            if ctx.has_bias:
                grad_bias = grad.sum((0, 2, 3))
        grad_x, grad_x_step, grad_x_zero = _lsq_backward(grad_x_hat, x, position_x, x_hat, qx)
        grad_w, grad_w_step, _ = _lsq_backward(grad_w_hat, weight, position_w, w_hat, qw)
        return grad_x, grad_w, grad_bias, grad_x_step, grad_x_zero, grad_w_step, None, None, None, None


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
    """softmax(scale * q_hat k_hat^T), products in `dtype`: (B, H, N, d), (B, H, N, d) -> (B, H, N, N)."""
    scores = (q_hat * scale).to(dtype) @ k_hat.to(dtype).mT
    return scores.softmax(-1, dtype=q_hat.dtype)


class _QuantizedAttention(torch.autograd.Function):

    @staticmethod
    def forward(ctx, q, k, v, q_step, q_zero, k_step, k_zero, v_step, v_zero, a_step, a_zero, ranges, scale, dtype,
                dropout):
        ctx.ranges, ctx.scale, ctx.dtype = ranges, scale, dtype
        ctx.save_for_backward(q, k, v, q_step, q_zero, k_step, k_zero, v_step, v_zero, a_step, a_zero, dropout)
        q_hat = _quantize(q, _effective(LSQ(q_step, q_zero, *ranges[0])))
        k_hat = _quantize(k, _effective(LSQ(k_step, k_zero, *ranges[1])))
        v_hat = _quantize(v, _effective(LSQ(v_step, v_zero, *ranges[2])))
        attn = _probabilities(q_hat, k_hat, scale, dtype)
        if dropout is not None:
            attn = attn * dropout
        attn_hat = _quantize(attn, _effective(LSQ(a_step, a_zero, *ranges[3])))
        return attn_hat.to(dtype) @ v_hat.to(dtype)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *steps, dropout = ctx.saved_tensors
        quantizers = [_effective(LSQ(step, zero, *code_range))
                      for step, zero, code_range in zip(steps[::2], steps[1::2], ctx.ranges, strict=True)]
        qq, qk, qv, qa = quantizers
        (position_q, q_hat), (position_k, k_hat), (position_v, v_hat) = (
            _positions_and_values(x, quantizer) for x, quantizer in ((q, qq), (k, qk), (v, qv)))
        softmax = _probabilities(q_hat, k_hat, ctx.scale, ctx.dtype)
        attn = softmax if dropout is None else softmax * dropout
        position_a, attn_hat = _positions_and_values(attn, qa)

        grad = grad.to(ctx.dtype)
        grad_v_hat = attn_hat.to(ctx.dtype).mT @ grad
        grad_attn, *grad_a = _lsq_backward(grad @ v_hat.to(ctx.dtype).mT, attn, position_a, attn_hat, qa)
        if dropout is not None:
            grad_attn = grad_attn * dropout
        grad_scores = torch._softmax_backward_data(grad_attn, softmax, -1, softmax.dtype).to(ctx.dtype)
        grad_q_hat = (grad_scores @ k_hat.to(ctx.dtype)).mul_(ctx.scale)
        grad_k_hat = (grad_scores.mT @ q_hat.to(ctx.dtype)).mul_(ctx.scale)
        grad_q, *grad_qq = _lsq_backward(grad_q_hat, q, position_q, q_hat, qq)
        grad_k, *grad_qk = _lsq_backward(grad_k_hat, k, position_k, k_hat, qk)
        grad_v, *grad_qv = _lsq_backward(grad_v_hat, v, position_v, v_hat, qv)
        return grad_q, grad_k, grad_v, *grad_qq, *grad_qk, *grad_qv, *grad_a, None, None, None, None
