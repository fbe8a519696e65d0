"""Attention of quantized operands, by the mathematics of `_lsq.py`: Q-Attention of Q-ViT (Li et al., NeurIPS 2022).

    softmax(scale q_hat k_hat^T), quantized too, times v_hat

A quantized tensor or an N x N map is never kept for the backward, which computes them again.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ops import cpu as native_training
from ops.lsq import (
    QParams,
    _Grid,
    _grid,
    _in_steps,
    _into,
    _lsq_backward_,
    _positions_and_steps,
    _product_dtype,
    _Scratch,
    _split,
    _step_gradients,
    _total,
    cache_piece,
)

__all__ = ['quantized_attention']


def quantized_attention(q: Tensor, k: Tensor, v: Tensor, quantizers: tuple[QParams, ...], scale: float,
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
    ranges = [end for quantizer in quantizers for end in (quantizer.qn, quantizer.qp)]
    dtype = _product_dtype(q, quantizers[0].step)  # probabilities and codes are computed in the steps' precision
    return _QuantizedAttention.apply(q, k, v, *steps_and_zeros, ranges, scale, dtype, dropout)


class _QuantizedAttention(torch.autograd.Function):

    @staticmethod
    def forward(ctx, q, k, v, q_step, q_zero, k_step, k_zero, v_step, v_zero, a_step, a_zero, ranges, scale, dtype,
                dropout):
        ctx.ranges, ctx.scale, ctx.dtype = ranges, scale, dtype
        steps = q_step, q_zero, k_step, k_zero, v_step, v_zero, a_step, a_zero
        ctx.save_for_backward(q, k, v, dropout, *steps)
        return _attention(q, k, v, dropout, steps, ranges, scale, dtype)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, dropout, *steps = ctx.saved_tensors
        grads = _attention_backward(grad, q, k, v, dropout, steps, ctx.ranges, ctx.scale, ctx.dtype)
        return *grads, None, None, None, None


@native_training.opaque(
    'attention(Tensor q, Tensor k, Tensor v, Tensor? dropout, Tensor[] steps, int[] ranges, float scale, '
    'ScalarType dtype) -> Tensor', lambda q, *args: q.new_empty(q.shape, dtype=args[-1]))
def _attention(q, k, v, dropout, steps, ranges, scale, dtype):
    """`steps`: steps and zero points of q, k, v and A in turn; `ranges`: so qn and qp."""
    qq, qk, qv, qa = _attention_grids((q, k, v, q), steps, ranges)
    few, one = _attention_pieces(q, qq.native)
    scratch = _Scratch(one < len(q))
    out = q.new_empty(q.shape, dtype=dtype) if scratch.used else None
    for q_few, k_few, v_few, *maps in _split(few, q, k, v, dropout, out):
        q_few, k_few, v_few = (_in_steps(x, grid, scratch(name, x, grid.step.dtype))
                               for name, x, grid in (('q', q_few, qq), ('k', k_few, qk), ('v', v_few, qv)))
        q_few.mul_(scale * qq.step * qk.step)
        v_few.mul_(qv.step * qa.step)
        for q_, k_, v_, dropout_, out_ in _split(one, q_few, k_few, v_few, *maps):
            scores = _scores(q_, k_, dtype, scratch)
            if _fuses(scores, qa, dropout_):
                attn = native_training.softmax_steps_(scores, qa, scores)
            else:
                attn = _softmax(scores, q_.dtype, scratch)
                if dropout_ is not None:
                    attn = attn * dropout_
                attn = _in_steps(attn, qa, scratch('scores', attn, attn.dtype))
            piece = _into(out_, attn.to(dtype), v_.to(dtype))
    return piece if out is None else out


@native_training.opaque(
    'attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? dropout, Tensor[] steps, int[] ranges, '
    'float scale, ScalarType dtype) -> Tensor[]',
    lambda grad, q, k, v, dropout, steps, *args: [*(x.new_empty(x.shape) for x in (q, k, v, *steps))])
def _attention_backward(grad, q, k, v, dropout, steps, ranges, scale, dtype):
    """The gradients of q, k, v and `steps`."""
    qq, qk, qv, qa = _attention_grids((q, k, v, q), steps, ranges)
    wide, sums, sums_a, outs = qq.step.dtype, [], [], [None, None, None]
    few, one = _attention_pieces(q, qq.native)
    scratch = _Scratch(one < len(q))
    if scratch.used:
        outs = [torch.empty(q.shape, dtype=wide, device=q.device) for _ in outs]
    for q_few, k_few, v_few, dropout_few, g_few, *outs_few in _split(few, q, k, v, dropout, grad, *outs):
        g_few = g_few.to(dtype).contiguous()
        (position_q, steps_q), (position_k, steps_k), (position_v, steps_v) = (
            _positions_and_steps(x, grid, scratch.two(name, x, wide))
            for name, x, grid in (('q', q_few, qq), ('k', k_few, qk), ('v', v_few, qv)))
        scaled_q = torch.mul(steps_q, scale * qq.step * qk.step, out=scratch('operand', q_few, wide))
        v_hat = torch.mul(steps_v, qv.step, out=scratch('v_hat', v_few, wide))
        for q_, k_, v_, dropout_, g, *outs_ in _split(one, scaled_q, steps_k, v_hat, dropout_few, g_few, *outs_few):
            scores = _scores(q_, k_, dtype, scratch)
            if _fuses(scores, qa, dropout_):
                steps_a = native_training.softmax_steps_(scores, qa, scratch('steps a', scores, dtype))
                grad_v = _into(outs_[2], steps_a.mT, g)
                grad_scores = _into(steps_a, g, v_.mT)
                piece_sums = native_training.softmax_backward_(grad_scores, scores, qa)
            else:
                softmax = _softmax(scores, wide, scratch)
                attn = softmax if dropout_ is None else softmax * dropout_
                position_a, steps_a = _positions_and_steps(attn, qa, scratch.two('a', attn, wide))
                grad_v = _into(outs_[2], steps_a.to(dtype).mT, g)
                grad_attn, piece_sums = _lsq_backward_(_into(scratch('scores', attn, dtype), g, v_.to(dtype).mT),
                                                       position_a, steps_a, qa)
                if dropout_ is not None:
                    grad_attn = grad_attn * dropout_
                grad_scores = _softmax_backward(grad_attn, softmax, scratch('position a', attn, wide)).to(dtype)
            sums_a.append(piece_sums)
            grad_q = _into(outs_[0], grad_scores, k_.to(dtype))
            grad_k = _into(outs_[1], grad_scores.mT, q_.to(dtype))
        if scratch.used:
            grad_q, grad_k, grad_v = outs_few
        grad_q, sums_q = _lsq_backward_(grad_q.mul_(scale * qk.step), position_q, steps_q, qq)
        grad_k, sums_k = _lsq_backward_(grad_k.mul_(qk.per_step), position_k, steps_k, qk)
        grad_v, sums_v = _lsq_backward_(grad_v.mul_(qa.step), position_v, steps_v, qv)
        sums.append((*sums_q, *sums_k, *sums_v))
    grads, total = outs if scratch.used else (grad_q, grad_k, grad_v), _total(sums)
    numel, a_numel = q.numel(), q.numel() // q.shape[-1] * q.shape[-2]
    return [*(out.to(x.dtype) for out, x in zip(grads, (q, k, v), strict=True)), *_step_gradients(total[:3], qq, numel),
            *_step_gradients(total[3:6], qk, numel), *_step_gradients(total[6:], qv, numel),
            *_step_gradients(_total(sums_a), qa, a_numel)]


def _scores(q: Tensor, k: Tensor, dtype: torch.dtype, scratch: _Scratch) -> Tensor:
    """q k^T in `dtype`: (B, H, N, d), (B, H, N, d) -> (B, H, N, N)."""
    return _into(scratch('scores', q, dtype, q.shape[1], q.shape[2], q.shape[2]), q.to(dtype), k.to(dtype).mT)


def _fuses(scores: Tensor, qa: _Grid, dropout: Tensor | None) -> bool:
    """Whether the kernels of `native_training` compute the softmax with its steps."""
    return qa.native and dropout is None and scores.dtype == qa.step.dtype


def _softmax(scores: Tensor, dtype: torch.dtype, scratch: _Scratch) -> Tensor:
    return torch.softmax(scores, -1, dtype=dtype, out=scratch('softmax', scores, dtype))


def _softmax_backward(grad: Tensor, softmax: Tensor, out: Tensor | None) -> Tensor:
    """The gradient of the scores from that of their softmax, in `out` or fresh."""
    if out is None:
        return torch._softmax_backward_data(grad, softmax, -1, softmax.dtype)
    return torch.ops.aten._softmax_backward_data.out(grad, softmax, -1, softmax.dtype, grad_input=out)


def _attention_grids(tensors: Sequence[Tensor], steps: Sequence[Tensor], ranges: Sequence[int]) -> list[_Grid]:
    """To quantize each of the tensors, by steps and zero points in turn."""
    states = zip(steps[::2], steps[1::2], ranges[::2], ranges[1::2], strict=True)
    return [_grid(QParams(*state), x) for x, state in zip(tensors, states, strict=True)]


def _attention_pieces(q: Tensor, native: bool) -> tuple[int, int]:
    """How many images to compute at a time: their q, k and v, and their N x N maps, which are larger."""
    (_, heads, tokens, width), size = q.shape, len(q)
    one = cache_piece(size, heads * tokens ** 2, q, native)
    return max(one, cache_piece(size, heads * tokens * width, q, native)), one
