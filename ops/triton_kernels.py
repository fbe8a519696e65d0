"""The elementwise passes of quantized products in Triton, for tensors on a GPU.

A pass goes through memory once; GELU and softmax are computed within, and the backward of attention keeps the scores
alone. Sums over a channel are added up block by block without atomics, so that they are the same every time. What the
kernels do not take (other devices, dropout of attention, a compiler's trace) is left to torch. With TRITON_INTERPRET=1
they run on the CPU, in Triton's interpreter, to be tested there.
"""
from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.grid import Grid
from ops.torch_kernels import GELU_LIMIT, Buffers, TorchKernels

__all__ = ['TritonKernels']

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ROWS, COLUMNS = 32, 64    # of a block of values
MOST_TOKENS = 4096        # of a row of attention, which one block holds
# No fused multiply-add: it would give other positions than torch's, and so other codes.
OPTIONS = {'num_warps': 4, 'enable_fp_fusion': False}
LIMIT = tl.constexpr(GELU_LIMIT)
SQRT_HALF, SQRT_TWO_PI = tl.constexpr(math.sqrt(0.5)), tl.constexpr(math.sqrt(2 * math.pi))


# --- the kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _clamp(x, low, high):
    """With NaN where x is, which the loss then shows."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _round(x):
    """To the nearest whole number, halves to the even one, as a sum with so large a number is rounded."""
    largest = 6755399441055744.0 if x.dtype == tl.float64 else 12582912.0
    return (x + largest) - largest


@triton.jit
def _position_and_code(x, reciprocal, zero, qn, qp):
    """x / scale + zero point, and the centered code there."""
    position = x * reciprocal + zero
    return position, _round(_clamp(position, qn, qp)) - zero


@triton.jit
def _inside(grad, position, qn, qp):
    """A value on a border is inside."""
    return tl.where((position < qn) | (position > qp), 0.0, grad)


@triton.jit
def _gelu(x, dtype: tl.constexpr):
    """clip(GELU(x), -10, 10), rounded to `dtype`, in which torch gives it."""
    y = x * 0.5 * (1.0 + tl.erf(x * SQRT_HALF))
    return _clamp(y.to(dtype).to(x.dtype), -LIMIT, LIMIT)


@triton.jit
def _gelu_backward(grad, x):
    slope = 0.5 * (1.0 + tl.erf(x * SQRT_HALF)) + x * tl.exp(-0.5 * x * x) / SQRT_TWO_PI
    return tl.where(x > LIMIT, 0.0, grad * slope)


@triton.jit
def _block(rows, columns, channels, last: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Places of a block of values of a matrix, which of them exist, and their channels: by columns or by rows."""
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    c = tl.program_id(1).to(tl.int64) * C + tl.arange(0, C)[None, :]
    channel = (c if last else r) % channels
    return r * columns + c, (r < rows) & (c < columns), channel


@triton.jit
def _codes_kernel(x_ptr, out_ptr, reciprocal_ptr, zero_ptr, rows, columns, channels, qn, qp, last: tl.constexpr,
                  gelu: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    place, exists, channel = _block(rows, columns, channels, last, R, C)
    reciprocal, zero = tl.load(reciprocal_ptr + channel), tl.load(zero_ptr + channel)
    x = tl.load(x_ptr + place, exists, 0.0).to(reciprocal.dtype)
    if gelu:
        x = _gelu(x, x_ptr.dtype.element_ty)
    _, codes = _position_and_code(x, reciprocal, zero, qn, qp)
    tl.store(out_ptr + place, codes, exists)


@triton.jit
def _store_sums(sums_ptr, terms, inside, grad, block, other, count, axis: tl.constexpr, SIZE: tl.constexpr):
    """The sums of a block along an axis, into (blocks, 3, count)."""
    at = other.to(tl.int64) * SIZE + tl.arange(0, SIZE)
    start = sums_ptr + block.to(tl.int64) * 3 * count + at
    tl.store(start, tl.sum(terms, axis), at < count)
    tl.store(start + count, tl.sum(inside, axis), at < count)
    tl.store(start + 2 * count, tl.sum(grad, axis), at < count)


@triton.jit
def _backward_kernel(grad_ptr, x_ptr, out_ptr, sums_ptr, reciprocal_ptr, zero_ptr, rows, columns, channels, qn, qp,
                     last: tl.constexpr, gelu: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """The gradient of x, and the block's sums: (blocks, 3, columns) by columns, else (blocks, 3, rows)."""
    place, exists, channel = _block(rows, columns, channels, last, R, C)
    reciprocal, zero = tl.load(reciprocal_ptr + channel), tl.load(zero_ptr + channel)
    grad = tl.load(grad_ptr + place, exists, 0.0).to(reciprocal.dtype)
    given = tl.load(x_ptr + place, exists, 0.0).to(reciprocal.dtype)
    x = _gelu(given, x_ptr.dtype.element_ty) if gelu else given
    position, code = _position_and_code(x, reciprocal, zero, qn, qp)
    inside = _inside(grad, position, qn, qp)
    terms = grad * code - inside * position
    tl.store(out_ptr + place, _gelu_backward(inside, given) if gelu else inside, exists)
    if last:
        _store_sums(sums_ptr, terms, inside, grad, tl.program_id(0), tl.program_id(1), columns, 0, C)
    else:
        _store_sums(sums_ptr, terms, inside, grad, tl.program_id(1), tl.program_id(0), rows, 1, R)


@triton.jit
def _softmax(scores_ptr, at, tokens, dtype: tl.constexpr, N: tl.constexpr):
    column = tl.arange(0, N)
    scores = tl.load(scores_ptr + at * tokens + column, column < tokens, float('-inf')).to(dtype)
    powers = tl.exp(scores - tl.max(scores, 0))
    return powers / tl.sum(powers, 0)


@triton.jit
def _softmax_kernel(scores_ptr, out_ptr, reciprocal_ptr, zero_ptr, tokens, channels, qn, qp, N: tl.constexpr):
    """A row of the scores' softmax, in centered codes."""
    at, column = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    channel = at // tokens % channels
    reciprocal, zero = tl.load(reciprocal_ptr + channel), tl.load(zero_ptr + channel)
    softmax = _softmax(scores_ptr, at, tokens, reciprocal.dtype, N)
    _, codes = _position_and_code(softmax, reciprocal, zero, qn, qp)
    tl.store(out_ptr + at * tokens + column, codes, column < tokens)


@triton.jit
def _softmax_backward_kernel(grad_ptr, scores_ptr, out_ptr, sums_ptr, reciprocal_ptr, zero_ptr, tokens, channels, qn,
                             qp, N: tl.constexpr):
    """A row of the gradient of the scores, and its sums, (rows, 3)."""
    at, column = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    channel = at // tokens % channels
    reciprocal, zero = tl.load(reciprocal_ptr + channel), tl.load(zero_ptr + channel)
    softmax = _softmax(scores_ptr, at, tokens, reciprocal.dtype, N)
    position, code = _position_and_code(softmax, reciprocal, zero, qn, qp)
    grad = tl.load(grad_ptr + at * tokens + column, column < tokens, 0.0).to(reciprocal.dtype)
    inside = _inside(grad, position, qn, qp)
    tl.store(sums_ptr + 3 * at, tl.sum(grad * code - inside * position, 0))
    tl.store(sums_ptr + 3 * at + 1, tl.sum(inside, 0))
    tl.store(sums_ptr + 3 * at + 2, tl.sum(grad, 0))
    tl.store(out_ptr + at * tokens + column, softmax * (inside - tl.sum(inside * softmax, 0)), column < tokens)


# --- what calls them --------------------------------------------------------------------------------------------------


class _Saved(NamedTuple):
    """What the backward of a quantizer needs: its input, and whether the GELU was computed within."""
    x: Tensor
    gelu: bool


class _SavedScores(NamedTuple):
    scores: Tensor


class TritonKernels(TorchKernels):
    """The passes in Triton; their memory is fresh, whatever buffers are offered."""

    interpreted = not isinstance(_codes_kernel, triton.runtime.JITFunction)

    def centered_codes(self, x: Tensor, grid: Grid, out: Tensor | None = None, gelu: bool = False) -> Tensor:
        if not self._takes(x, grid):
            return super().centered_codes(x, grid, out, gelu)
        x = x.contiguous()
        codes = torch.empty_like(x, dtype=grid.scale.dtype)
        rows, columns, channels, last = _matrix(x, grid.scale)
        with torch.cuda.device_of(x):
            _codes_kernel[_blocks(rows, columns)](
                x, codes, grid.reciprocal, _zero(grid), rows, columns, channels, grid.qn, grid.qp, last, gelu, ROWS,
                COLUMNS, **OPTIONS)
        return codes

    def centered_codes_and_saved(self, x: Tensor, grid: Grid, buffers: Buffers = (None, None),
                                 gelu: bool = False) -> tuple[Tensor, Any]:
        if not self._takes(x, grid):
            return super().centered_codes_and_saved(x, grid, buffers, gelu)
        x = x.contiguous()
        return self.centered_codes(x, grid, gelu=gelu), _Saved(x, gelu)

    def backward_(self, grad: Tensor, codes: Tensor | None, saved: Any, grid: Grid, gelu_of: Tensor | None = None,
                  ) -> tuple[Tensor, list[Tensor]]:
        if not isinstance(saved, _Saved):
            return super().backward_(grad, codes, saved, grid, gelu_of)
        x, grad, dtype = saved.x, grad.contiguous(), grid.scale.dtype
        rows, columns, channels, last = _matrix(x, grid.scale)
        blocks = _blocks(rows, columns)
        out = grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
        sums = grad.new_empty(blocks[0 if last else 1], 3, columns if last else rows, dtype=dtype)
        with torch.cuda.device_of(x):
            _backward_kernel[blocks](
                grad, x, out, sums, grid.reciprocal, _zero(grid), rows, columns, channels, grid.qn, grid.qp,
                last, saved.gelu, ROWS, COLUMNS, **OPTIONS)
        # One scale for all takes all columns together; rows of several channels take turns.
        return out, _of_channels(sums.sum(0).view(3, -1, channels).sum(1), grid)

    def softmax_codes(self, scores: Tensor, grid: Grid, dropout: Tensor | None, dtype: torch.dtype, scratch: Any,
                      ) -> Tensor:
        if not self._takes_attention(scores, grid, dropout):
            return super().softmax_codes(scores, grid, dropout, dtype, scratch)
        scores, codes, tokens = scores.contiguous(), torch.empty_like(scores, dtype=dtype), scores.shape[-1]
        with torch.cuda.device_of(scores):
            _softmax_kernel[(scores.numel() // tokens,)](
                scores, codes, grid.reciprocal, _zero(grid), tokens, grid.scale.numel(), grid.qn, grid.qp,
                triton.next_power_of_2(tokens), **OPTIONS)
        return codes

    def softmax_codes_and_saved(self, scores: Tensor, grid: Grid, dropout: Tensor | None, dtype: torch.dtype,
                                scratch: Any) -> tuple[Tensor, Any, Tensor | None]:
        if not self._takes_attention(scores, grid, dropout):
            return super().softmax_codes_and_saved(scores, grid, dropout, dtype, scratch)
        return self.softmax_codes(scores, grid, dropout, dtype, scratch), _SavedScores(scores.contiguous()), None

    def softmax_backward(self, grad: Tensor, codes: Tensor, saved: Any, grid: Grid, dropout: Tensor | None,
                         scratch: Any) -> tuple[Tensor, list[Tensor]]:
        if not isinstance(saved, _SavedScores):
            return super().softmax_backward(grad, codes, saved, grid, dropout, scratch)
        scores, grad, (heads, tokens) = saved.scores, grad.contiguous(), saved.scores.shape[1:3]
        channels = grid.scale.numel()
        sums = grad.new_empty(len(scores), heads, tokens, 3, dtype=grid.scale.dtype)
        with torch.cuda.device_of(scores):
            _softmax_backward_kernel[(scores.numel() // tokens,)](
                grad, scores, grad, sums, grid.reciprocal, _zero(grid), tokens, channels, grid.qn, grid.qp,
                triton.next_power_of_2(tokens), **OPTIONS)
        by_head = sums.sum((0, 2)).t()  # (3, heads)
        return grad, _of_channels(by_head if channels > 1 else by_head.sum(1, keepdim=True), grid)

    def _takes(self, x: Tensor, grid: Grid) -> bool:
        """Not where x has more precision than the scale, in which the code computes."""
        return ((x.is_cuda or self.interpreted) and x.numel() > 0 and x.dtype in DTYPES
                and not torch.compiler.is_compiling()
                and torch.promote_types(x.dtype, grid.scale.dtype) == grid.scale.dtype)

    def _takes_attention(self, scores: Tensor, grid: Grid, dropout: Tensor | None) -> bool:
        return self._takes(scores, grid) and dropout is None and scores.shape[-1] <= MOST_TOKENS


def _zero(grid: Grid) -> Tensor:
    return torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point


def _of_channels(sums: Tensor, grid: Grid) -> list[Tensor]:
    """One tensor of the scale's shape for each kind of sum, from (3, channels)."""
    return list(sums.view(3, *grid.scale.shape)[:1 if grid.zero_point is None else 3])


def _matrix(x: Tensor, scale: Tensor) -> tuple[int, int, int, bool]:
    """x as a matrix: its rows and columns, how many channels take turns, and whether along the columns.

    Raises:
        ValueError: x has another number of channels.
    """
    if scale.numel() == 1:
        return x.numel() // x.shape[-1], x.shape[-1], 1, True
    axis = x.ndim - scale.ndim + next(i for i, size in enumerate(scale.shape) if size > 1)
    if axis < 0 or x.shape[axis] != scale.numel():
        raise ValueError(f'{scale.numel()} scales do not fit x of shape {list(x.shape)}')
    rows, columns = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1:])
    return (rows, x.shape[axis], x.shape[axis], True) if columns == 1 else (
        rows * x.shape[axis], columns, x.shape[axis], False)


def _blocks(rows: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)
