"""The elementwise passes of quantized products in C++ (`lsq_kernels.cpp`), for tensors on the CPU.

A pass of a quantizer goes through memory once where torch needs four to nine passes; GELU and softmax are computed
within. The equations are those of `torch_kernels.py`; sums are added in another order, and GELU and softmax round
differently. What the C++ code does not take (other devices, half precision, a compiler's trace) is left to torch.
"""
from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops.cpp_library import load
from ops.grid import Grid
from ops.torch_kernels import Buffers, TorchKernels, _clipped_gelu, _clipped_gelu_backward_

__all__ = ['CppKernels']

SOURCE = Path(__file__).with_name('lsq_kernels.cpp')
# A product that is fused with the sum behind it would give other positions than torch's, and so other codes.
FLAGS = ['-fopenmp', '-ffp-contract=off']
DTYPES = {torch.float32: 'float32', torch.float64: 'float64'}
VALUES_OF_A_THREAD = 32768  # as torch has it: fewer are not worth a thread


class _Saved(NamedTuple):
    """What the C++ backward of a quantizer needs: its input, and whether the GELU was computed within."""
    x: Tensor
    gelu: bool = False


class _SavedSoftmax(NamedTuple):
    softmax: Tensor


class CppKernels(TorchKernels):
    """Loads, and if need be compiles, the C++ code.

    Raises:
        NativeUnavailable: it cannot be compiled here.
    """

    piece_bytes = 1 << 22  # measured: with few passes over memory, fewer and larger products are faster

    def __init__(self) -> None:
        library = load(SOURCE, FLAGS)
        size, pointer, number, flag = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double, ctypes.c_int
        grid = [pointer] * 2 + [size] + [number] * 4
        signatures = {
            'lsq_codes': [pointer] * 2 + [size] * 6 + [flag, *grid],
            'lsq_weight': [pointer] * 4 + [size, *grid],
            'lsq_backward': [pointer] * 3 + [size] * 6 + [flag, *grid],
            'lsq_softmax': [pointer] * 3 + [size] * 2 + grid,
            'lsq_softmax_backward': [pointer] * 3 + [size] * 2 + grid}
        self._functions = {}
        for name, arguments in signatures.items():
            for dtype, suffix in DTYPES.items():
                function = getattr(library, f'{name}_{suffix}')
                function.restype, function.argtypes = None, [*arguments, ctypes.c_int]  # the last: threads
                self._functions[name, dtype] = function

    def centered_codes(self, x: Tensor, grid: Grid, out: Tensor | None = None, gelu: bool = False) -> Tensor:
        if not _is_for_cpp(x, grid):
            return super().centered_codes(x, grid, out, gelu)
        x, fused = _prepared(x, grid, out, gelu)
        return self._codes(x, grid, out, fused)

    def centered_codes_and_saved(self, x: Tensor, grid: Grid, buffers: Buffers = (None, None),
                                 gelu: bool = False) -> tuple[Tensor, Any]:
        if not _is_for_cpp(x, grid):
            return super().centered_codes_and_saved(x, grid, buffers, gelu)
        x, fused = _prepared(x, grid, buffers[0], gelu)
        return self._codes(x, grid, buffers[1], fused), _Saved(x, fused)

    def _codes(self, x: Tensor, grid: Grid, out: Tensor | None, gelu: bool) -> Tensor:
        out = x.new_empty(x.shape) if out is None else out
        channels, layout = _layout(x, grid.scale)
        self._call('lsq_codes', (x, out), (*layout, gelu), grid, channels, _threads(x))
        return out

    def backward_(self, grad: Tensor, codes: Tensor | None, saved: Any, grid: Grid, gelu_of: Tensor | None = None,
                  ) -> tuple[Tensor, list[Tensor]]:
        if not isinstance(saved, _Saved):
            return super().backward_(grad, codes, saved, grid, gelu_of)
        grad, (channels, layout) = grad.to(saved.x.dtype).contiguous(), _layout(saved.x, grid.scale)
        threads = _threads(saved.x)
        sums = saved.x.new_zeros(threads, 3, channels)
        self._call('lsq_backward', (grad, saved.x, sums), (*layout, saved.gelu), grid, channels, threads)
        grad = grad if gelu_of is None or saved.gelu else _clipped_gelu_backward_(grad, gelu_of)
        return grad, _total(sums, grid)

    def quantized_weight(self, weight: Tensor, grid: Grid, factor: Tensor) -> Tensor:
        if not _is_for_cpp_weight(weight, grid):
            return super().quantized_weight(weight, grid, factor)
        return self._weight(weight.to(grid.scale.dtype).contiguous(), grid,
                            factor.expand(weight.shape[1]).contiguous())

    def quantized_weight_and_saved(self, weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None, Any]:
        if not _is_for_cpp_weight(weight, grid):
            return super().quantized_weight_and_saved(weight, grid)
        weight = weight.to(grid.scale.dtype).contiguous()
        return self._weight(weight, grid, None), None, _Saved(weight)

    def _weight(self, weight: Tensor, grid: Grid, factor: Tensor | None) -> Tensor:
        out = torch.empty_like(weight)
        self._call('lsq_weight', (weight, grid.scale, factor, out), (weight.shape[1],), grid, len(weight),
                   _threads(weight))
        return out

    def softmax_codes(self, scores: Tensor, grid: Grid, dropout: Tensor | None, dtype: torch.dtype, scratch: Any,
                      ) -> Tensor:
        if not _fuses_softmax(scores, grid, dropout):
            return super().softmax_codes(scores, grid, dropout, dtype, scratch)
        return self._softmax_codes(scores, grid, out=scores)

    def softmax_codes_and_saved(self, scores: Tensor, grid: Grid, dropout: Tensor | None, dtype: torch.dtype,
                                scratch: Any) -> tuple[Tensor, Any, Tensor | None]:
        if not _fuses_softmax(scores, grid, dropout):
            return super().softmax_codes_and_saved(scores, grid, dropout, dtype, scratch)
        out = scratch('codes attention', scores, scores.dtype)
        codes = self._softmax_codes(scores, grid, torch.empty_like(scores) if out is None else out)
        return codes, _SavedSoftmax(scores), codes

    def _softmax_codes(self, scores: Tensor, grid: Grid, out: Tensor) -> Tensor:
        """The codes in `out`; the scores become their softmax, unless `out` is the scores itself."""
        if grid.scale.numel() not in (1, scores.shape[1]):
            raise ValueError(f'{grid.scale.numel()} scales do not fit attention of shape {list(scores.shape)}')
        tokens = scores.shape[-1]
        self._call('lsq_softmax', (scores, scores, out), (scores.numel() // tokens, tokens), grid, grid.scale.numel(),
                   _threads(scores))
        return out

    def softmax_backward(self, grad: Tensor, codes: Tensor, saved: Any, grid: Grid, dropout: Tensor | None,
                         scratch: Any) -> tuple[Tensor, list[Tensor]]:
        if not isinstance(saved, _SavedSoftmax):
            return super().softmax_backward(grad, codes, saved, grid, dropout, scratch)
        softmax = saved.softmax
        threads, tokens, channels = _threads(softmax), softmax.shape[-1], grid.scale.numel()
        sums = softmax.new_zeros(threads, 3, channels)
        self._call('lsq_softmax_backward', (grad, softmax, sums), (softmax.numel() // tokens, tokens), grid, channels,
                   threads)
        return grad, _total(sums, grid)

    def _call(self, name: str, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...], grid: Grid, channels: int,
              threads: int) -> None:
        zero_point = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
        dtype = tensors[0].dtype
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        self._functions[name, dtype](*pointers, *sizes, grid.reciprocal.data_ptr(), zero_point.data_ptr(), channels,
                                     grid.qn, grid.qp, *grid.borders(dtype), threads)


# --- what the C++ code takes, and how a tensor lies in memory ---------------------------------------------------------


def _is_for_cpp(x: Tensor, grid: Grid) -> bool:
    """Whether C++ quantizes x: not where x has more precision than the scale, in which the code computes."""
    scale = grid.scale
    return (scale.device.type == 'cpu' and scale.dtype in DTYPES and not torch.compiler.is_compiling()
            and torch.promote_types(x.dtype, scale.dtype) == scale.dtype)


def _is_for_cpp_weight(weight: Tensor, grid: Grid) -> bool:
    return _is_for_cpp(weight, grid) and grid.scale.shape == (len(weight), 1)


def _fuses_softmax(scores: Tensor, grid: Grid, dropout: Tensor | None) -> bool:
    return _is_for_cpp(scores, grid) and dropout is None and scores.dtype == grid.scale.dtype


def _prepared(x: Tensor, grid: Grid, buffer: Tensor | None, gelu: bool) -> tuple[Tensor, bool]:
    """x in the scale's type and as the code reads it, and whether the code is to compute the GELU, too.

    The GELU of half precision is rounded to half precision before it is quantized, which torch does here.
    """
    fused = gelu and x.dtype == grid.scale.dtype
    if gelu and not fused:
        x = _clipped_gelu(x, buffer if buffer is not None and buffer.dtype == x.dtype else None)
    x = x.to(grid.scale.dtype)
    return (x if _lies_well(x, grid.scale) else x.contiguous()), fused


def _lies_well(x: Tensor, scale: Tensor) -> bool:
    """Whether the code reads x where it lies: contiguous, or heads (B, H, N, d) as views of a layer's output."""
    return x.is_contiguous() or x.ndim == 4 and x.stride(-1) == 1 and scale.shape == (x.shape[1], 1, 1)


def _layout(x: Tensor, scale: Tensor) -> tuple[int, tuple[int, ...]]:
    """The number of channels, with a scale for each; and how x is (outer, channels, rows, inner).

    The second value holds outer, rows and inner, and the strides of outer, channels and rows. Threads share out outer
    or outer * channels.

    Raises:
        ValueError: x has another number of channels, or is on another device.
    """
    if not x.is_contiguous():
        outer, channels, rows, inner = x.shape
        return channels, (outer, rows, inner, *x.stride()[:3])
    if scale.numel() == 1:
        inner = max(1, x.shape[-1]) if x.ndim else 1
        return 1, (x.numel() // inner, 1, inner, inner, 0, 0)
    axis = x.ndim - scale.ndim + next(i for i, size in enumerate(scale.shape) if size > 1)
    if axis < 0 or x.shape[axis] != scale.numel() or x.device != scale.device:
        raise ValueError(f'{scale.numel()} scales on {scale.device} do not fit x of shape {list(x.shape)} on '
                         f'{x.device}')
    outer, channels, inner = math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1:])
    return channels, (outer, 1, inner, channels * inner, inner, 0)


def _threads(x: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), -(-x.numel() // VALUES_OF_A_THREAD)))


def _total(sums: Tensor, grid: Grid) -> list[Tensor]:
    """The sums over the threads, from (threads, 3, channels): one tensor of the scale's shape for each kind."""
    total = sums[0] if len(sums) == 1 else sums.sum(0)
    return list(total.view(3, *grid.scale.shape)[:1 if grid.zero_point is None else 3])
