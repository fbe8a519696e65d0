"""The quantizers of training in C++ kernels on the CPU: `lsq_kernels.cpp`, one pass where torch takes four to nine.

The mathematics is that of `_lsq.py`, which calls them where they are enabled; sums are added in another order.
"""
from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cpp_library import load

if TYPE_CHECKING:
    from _lsq import _Grid

__all__ = ['backward_', 'enable', 'enabled', 'steps']

SOURCE = Path(__file__).with_name('lsq_kernels.cpp')
FLAGS = ['-fopenmp', '-ffp-contract=off']  # what is fused is as in torch: the same positions and so codes
DTYPES = {torch.float32: 'float32', torch.float64: 'float64'}
_functions: dict[tuple[str, torch.dtype], ctypes._CFuncPtr] = {}


def enable(on: bool = True) -> None:
    """Lets the quantizers of CPU tensors use the kernels from now on, or not any more.

    Raises:
        NativeUnavailable: they cannot be compiled here.
    """
    _functions.clear()
    if not on:
        return
    library = load(SOURCE, FLAGS)
    size, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
    for name, tensors, numbers in (('steps', 2, 2), ('backward', 3, 4)):
        for dtype, suffix in DTYPES.items():
            function = getattr(library, f'lsq_{name}_{suffix}')
            function.restype = None
            function.argtypes = [pointer] * tensors + [size] * 3 + [pointer] * 2 + [number] * numbers + [ctypes.c_int]
            _functions[name, dtype] = function


def enabled(step: Tensor) -> bool:
    """Whether tensors with this step are to be quantized by the kernels."""
    return bool(_functions) and step.device.type == 'cpu' and step.dtype in DTYPES \
        and not torch.compiler.is_compiling()


def _layout(x: Tensor, step: Tensor) -> tuple[int, int, int]:
    """(outer, channels, inner) of x, with a step for each of the channels; the kernels' threads share outer * channels.

    Raises:
        ValueError: x has another number of channels, or lies elsewhere.
    """
    if step.numel() == 1:
        inner = max(1, x.shape[-1]) if x.ndim else 1
        return x.numel() // inner, 1, inner
    axis = x.ndim - step.ndim + next(i for i, size in enumerate(step.shape) if size > 1)
    if axis < 0 or x.shape[axis] != step.numel() or x.device != step.device:
        raise ValueError(f'{step.numel()} steps on {step.device} do not fit x of shape {list(x.shape)} on {x.device}')
    return math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1:])


def _threads(x: Tensor) -> int:
    """As torch does, one thread for each 32768 values."""
    return max(1, min(torch.get_num_threads(), -(-x.numel() // 32768)))


def steps(x: Tensor, q: _Grid, out: Tensor | None = None) -> Tensor:
    """x_hat / alpha in `out`, contiguous and of the step's dtype, or fresh; x is contiguous and of that dtype."""
    out, zero = torch.empty_like(x) if out is None else out, _zero(q)
    _functions['steps', x.dtype](x.data_ptr(), out.data_ptr(), *_layout(x, q.step), q.per_step.data_ptr(),
                                 zero.data_ptr(), q.qn, q.qp, _threads(x))
    return out


def backward_(grad: Tensor, x: Tensor, q: _Grid, borders: tuple[float, float]) -> list[Tensor]:
    """Makes `grad`, of x_hat, that of x. Both are contiguous.

    Returns:
        Of every channel the sums of grad c - dx p, and with a zero point of dx and of grad: of the step's shape.
    """
    threads, (outer, channels, inner) = _threads(x), _layout(x, q.step)
    sums, zero = x.new_zeros(threads, 3, channels), _zero(q)
    _functions['backward', x.dtype](grad.data_ptr(), x.data_ptr(), sums.data_ptr(), outer, channels, inner,
                                    q.per_step.data_ptr(), zero.data_ptr(), q.qn, q.qp, *borders, threads)
    total = sums[0] if threads == 1 else sums.sum(0)
    return list(total.view(3, *q.step.shape)[:1 if q.zero is None else 3])


def _zero(q: _Grid) -> Tensor:
    return torch.zeros_like(q.step) if q.zero is None else q.zero
