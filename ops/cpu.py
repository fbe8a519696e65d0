"""C++ kernels of training on the CPU: the quantizers (`lsq_kernels.cpp`).

A quantizer is one pass forward and one backward where torch takes four to nine; GELU and softmax are fused with the
quantizers behind them. The mathematics is that of `_lsq.py`, `_lsq_attention.py` and `losses.py`, which call the
kernels where they are enabled; sums are added in another order, and GELU and softmax round differently.
"""
from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ops.cpp_library import load

if TYPE_CHECKING:
    from ops.lsq import _Grid

__all__ = ['backward_', 'enable', 'enabled', 'is_on', 'opaque', 'softmax_backward_',
           'softmax_steps_', 'steps', 'takes', 'weight']

FOLDER = Path(__file__).parent
SOURCES = {  # with flags of the compiler
    'lsq_kernels.cpp': ['-ffp-contract=off'],  # what is fused is as in torch: the same positions and so codes
}
DTYPES = {torch.float32: 'float32', torch.float64: 'float64'}
_functions: dict[tuple[str, torch.dtype], ctypes._CFuncPtr] = {}
_on = False


def enable(on: bool = True) -> None:
    """Lets quantizers and DGD of CPU tensors use the kernels from now on, or not any more.

    Raises:
        NativeUnavailable: they cannot be compiled here.
    """
    global _on
    _on = False
    if not on:
        return
    lsq, = (load(FOLDER / source, ['-fopenmp', *flags]) for source, flags in SOURCES.items())
    size, pointer, number, flag = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double, ctypes.c_int
    grid = [pointer] * 2 + [size] + [number] * 4
    for library, name, arguments in (
            (lsq, 'lsq_steps', [pointer] * 2 + [size] * 6 + [flag, *grid]),
            (lsq, 'lsq_weight', [pointer] * 4 + [size, *grid]),
            (lsq, 'lsq_backward', [pointer] * 3 + [size] * 6 + [flag, *grid]),
            (lsq, 'lsq_softmax', [pointer] * 3 + [size] * 2 + grid),
            (lsq, 'lsq_softmax_backward', [pointer] * 3 + [size] * 2 + grid)):
        for dtype, suffix in DTYPES.items():
            function = getattr(library, f'{name}_{suffix}')
            function.restype, function.argtypes = None, [*arguments, ctypes.c_int]  # the last: threads
            _functions[name, dtype] = function
    _on = True


def is_on() -> bool:
    """Whether the kernels are enabled."""
    return _on


def enabled(like: Tensor) -> bool:
    """Whether the kernels are to compute where tensors are like this one, as the steps of a quantizer are."""
    return _on and like.device.type == 'cpu' and like.dtype in DTYPES and not torch.compiler.is_compiling()


def opaque(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Decorates a function of tensors that uses the kernels: in a compiled graph, where they are enabled, it is one
    operator that the compiler doesn't look into. Its outputs share no memory with its inputs.

    Args:
        schema: 'name(...) -> ...', as of `torch.library.custom_op`.
        fake: from the same arguments, empty tensors as the function returns them.
    """
    def decorate(function: Callable) -> Callable:
        name, parenthesis, arguments = schema.partition('(')
        operator = torch.library.custom_op(f'qvit::{name}', function, mutates_args=(), schema=parenthesis + arguments)
        operator.register_fake(fake)

        @functools.wraps(function)
        def call(*args):
            return operator(*args) if _on and torch.compiler.is_compiling() else function(*args)
        return call
    return decorate


def takes(x: Tensor, step: Tensor) -> bool:
    """Whether the kernels read x where it lies: contiguous, or heads (B, H, N, d) as views of a layer's output."""
    return x.is_contiguous() or x.ndim == 4 and x.stride(-1) == 1 and step.shape == (x.shape[1], 1, 1)


def _layout(x: Tensor, step: Tensor) -> tuple[int, tuple[int, ...]]:
    """Channels of x, with a step for each; and outer, rows and inner of x as (outer, channels, rows, inner), with the
    strides of outer, channels and rows. The kernels' threads share outer * channels.

    Raises:
        ValueError: x has another number of channels, or lies elsewhere or not as `takes` says.
    """
    if not x.is_contiguous():
        if not takes(x, step):
            raise ValueError(f'x of shape {list(x.shape)} has strides {x.stride()}: make it contiguous')
        outer, channels, rows, inner = x.shape
        return channels, (outer, rows, inner, *x.stride()[:3])
    if step.numel() == 1:
        inner = max(1, x.shape[-1]) if x.ndim else 1
        return 1, (x.numel() // inner, 1, inner, inner, 0, 0)
    axis = x.ndim - step.ndim + next(i for i, size in enumerate(step.shape) if size > 1)
    if axis < 0 or x.shape[axis] != step.numel() or x.device != step.device:
        raise ValueError(f'{step.numel()} steps on {step.device} do not fit x of shape {list(x.shape)} on {x.device}')
    outer, channels, inner = math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1:])
    return channels, (outer, 1, inner, channels * inner, inner, 0)


def _threads(x: Tensor) -> int:
    """As torch does, one thread for each 32768 values."""
    return max(1, min(torch.get_num_threads(), -(-x.numel() // 32768)))


def steps(x: Tensor, q: _Grid, out: Tensor | None = None, gelu: bool = False) -> Tensor:
    """x_hat / alpha, or with `gelu` that of clipped_gelu(x), in `out`, contiguous and of the step's dtype, or fresh.

    x is of that dtype and lies as `takes` says.
    """
    out = x.new_empty(x.shape) if out is None else out
    channels, layout = _layout(x, q.step)
    _call('lsq_steps', (x, out), (*layout, gelu), q, channels, _threads(x))
    return out


def weight(w: Tensor, q: _Grid, scale: Tensor | None = None) -> Tensor:
    """w_hat of w, (N, K), contiguous, with a step for each row; times `scale`, (K,) contiguous, where there is one."""
    if q.step.shape != (len(w), 1) or scale is not None and scale.shape != w.shape[1:]:
        raise ValueError(f'{q.step.numel()} steps do not fit a weight of shape {list(w.shape)}')
    out = torch.empty_like(w)
    _call('lsq_weight', (w, q.step, scale, out), (w.shape[1],), q, len(w), _threads(w))
    return out


def backward_(grad: Tensor, x: Tensor, q: _Grid, gelu: bool = False) -> list[Tensor]:
    """Makes `grad`, contiguous, of x_hat, or with `gelu` of the quantized clipped_gelu(x), that of x.

    Returns:
        Of every channel the sums of grad c - dx p, and with a zero point of dx and of grad: of the step's shape.
    """
    threads, (channels, layout) = _threads(x), _layout(x, q.step)
    sums = x.new_zeros(threads, 3, channels)
    _call('lsq_backward', (grad, x, sums), (*layout, gelu), q, channels, threads)
    return _total(sums, q)


def softmax_steps_(scores: Tensor, q: _Grid, out: Tensor | None = None) -> Tensor:
    """Makes scores, (B, H, N, N), their softmax over the last axis; returns its steps, in `out` or fresh.

    All are contiguous. `out` may be `scores`: then the softmax is not kept.
    """
    _check_heads(scores, q)
    out, tokens = torch.empty_like(scores) if out is None else out, scores.shape[-1]
    _call('lsq_softmax', (scores, scores, out), (scores.numel() // tokens, tokens), q, q.step.numel(), _threads(scores))
    return out


def softmax_backward_(grad: Tensor, softmax: Tensor, q: _Grid) -> list[Tensor]:
    """Makes `grad`, of the quantized softmax, (B, H, N, N), that of the scores; returns what `backward_` returns."""
    _check_heads(softmax, q)
    threads, tokens, channels = _threads(softmax), softmax.shape[-1], q.step.numel()
    sums = softmax.new_zeros(threads, 3, channels)
    _call('lsq_softmax_backward', (grad, softmax, sums), (softmax.numel() // tokens, tokens), q, channels, threads)
    return _total(sums, q)


def _call(name: str, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...], q: _Grid, channels: int,
          threads: int) -> None:
    zero, dtype = torch.zeros_like(q.step) if q.zero is None else q.zero, tensors[0].dtype
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    _functions[name, dtype](*pointers, *sizes, q.per_step.data_ptr(), zero.data_ptr(), channels, q.qn, q.qp,
                            *q.borders(dtype), threads)


def _total(sums: Tensor, q: _Grid) -> list[Tensor]:
    """Over the threads, of (threads, 3, channels)."""
    total = sums[0] if len(sums) == 1 else sums.sum(0)
    return list(total.view(3, *q.step.shape)[:1 if q.zero is None else 3])


def _check_heads(maps: Tensor, q: _Grid) -> None:
    if q.step.numel() not in (1, maps.shape[1]):
        raise ValueError(f'{q.step.numel()} steps do not fit attention of shape {list(maps.shape)}')
