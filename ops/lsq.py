"""The mathematics of learned step size quantization (QParams): pure functions of tensors, with their gradients.

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

from ops import cpu as native_training

__all__ = ['QParams', 'cache_piece', 'clipped_gelu', 'code_range', 'codes', 'fake_quantize', 'min_scale',
           'quantized_linear']


class QParams(NamedTuple):
    """A quantizer's state in one call: `step` and `zero` broadcast against the tensor, `zero` is None for weights."""
    step: Tensor
    zero: Tensor | None
    qn: int
    qp: int


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """(qn, qp), the smallest and the largest integer code."""
    return (-2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2 ** bits - 1)


def min_scale(dtype: torch.dtype) -> float:
    """Smallest step in use: far below any trained one, large enough to divide by in `dtype`."""
    return max(1e-8, torch.finfo(dtype).tiny)


class _Grid(NamedTuple):
    """A quantizer in use: a positive step, its reciprocal and an integer zero point, none with a gradient.

    `native`: by the kernels of `native_training`, which find the position of a value from the value itself: where
    functions return or take positions, these are then x, of the step's dtype.
    """
    step: Tensor
    per_step: Tensor
    zero: Tensor | None
    qn: int
    qp: int
    native: bool

    def borders(self, dtype: torch.dtype) -> tuple[float, float]:
        """The range of codes, wider by the smallest of margins: a value on its border is inside."""
        info = torch.finfo(dtype)
        return self.qn - max(-self.qn * info.eps, info.tiny), self.qp * (1 + info.eps)


def _grid(q: QParams, x: Tensor) -> _Grid:
    """To quantize x with; of more precision than the step, torch computes it."""
    step = q.step.detach().clamp_min(min_scale(q.step.dtype))
    return _Grid(step, step.reciprocal(), None if q.zero is None else q.zero.detach().round(), q.qn, q.qp,
                 native_training.enabled(step) and torch.promote_types(x.dtype, step.dtype) == step.dtype)


def _for_kernels(x: Tensor, q: _Grid) -> Tensor | None:
    """x as the kernels take it; None where torch is to compute."""
    if q.native:
        x = x.to(q.step.dtype)
        return x if native_training.takes(x, q.step) else x.contiguous()
    return None


def _fuses_gelu(x: Tensor, q: _Grid) -> bool:
    """Whether the kernels compute the GELU of x as well; of half precision it is rounded to that first, by torch."""
    return q.native and x.dtype == q.step.dtype


def _positions(x: Tensor, q: _Grid, out: Tensor | None = None) -> Tensor:
    """x / alpha + z, in `out` or fresh: where each value lies on the grid of codes, before clamping and rounding.

    By the reciprocal: on CPUs a division takes as long as two multiplications.
    """
    if q.zero is None:
        return torch.mul(x, q.per_step, out=out)
    if q.zero.shape[-1] > 1:
        return torch.addcmul(q.zero, x, q.per_step, out=out)
    return torch.mul(x, q.per_step, out=out).add_(q.zero)  # by heads: addcmul's loop over such is not vectorized


def _centred_(codes: Tensor, q: _Grid) -> Tensor:
    """codes - z, in place: x_hat in steps."""
    return codes if q.zero is None else codes.sub_(q.zero)


def _in_steps(x: Tensor, q: _Grid, out: Tensor | None = None, gelu: bool = False) -> Tensor:
    """x_hat / alpha, whole numbers, in `out` or fresh; with `gelu` those of clipped_gelu(x)."""
    fused = gelu and _fuses_gelu(x, q)
    if gelu and not fused:
        x = _clipped_gelu(x, out if out is not None and out.dtype == x.dtype else None)
    taken = _for_kernels(x, q)
    if taken is not None:
        return native_training.steps(taken, q, out, fused)
    return _centred_(_positions(x, q, out).clamp_(q.qn, q.qp).round_(), q)


def _positions_and_steps(x: Tensor, q: _Grid, outs: tuple[Tensor | None, ...] = (None, None),
                         gelu: bool = False) -> tuple[Tensor, Tensor]:
    """x / alpha + z and x_hat / alpha, in `outs` or fresh; with `gelu` those of clipped_gelu(x)."""
    fused = gelu and _fuses_gelu(x, q)
    if gelu and not fused:
        x = _clipped_gelu(x, outs[0] if outs[0] is not None and outs[0].dtype == x.dtype else None)
    taken = _for_kernels(x, q)
    if taken is not None:
        return taken, native_training.steps(taken, q, outs[1], fused)
    position = _positions(x, q, outs[0])
    return position, _centred_(torch.clamp(position, q.qn, q.qp, out=outs[1]).round_(), q)


def codes(x: Tensor, q: QParams) -> Tensor:
    """The integer codes of x, int32, in [qn, qp]."""
    return _positions(x, _grid(q, x)).clamp_(q.qn, q.qp).round_().to(torch.int32)


def fake_quantize(x: Tensor, q: QParams) -> Tensor:
    """x_hat, differentiable in x, step and zero point; keeps x for the backward."""
    return _FakeQuantize.apply(x, *q)


def _lsq_backward_(grad: Tensor, position: Tensor, steps: Tensor, q: _Grid,
                   gelu_of: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """The gradient of x from `grad`, that of x_hat, and sums for `_step_gradients`, of the whole tensor or a piece.

    With p = x / alpha + z (`position`) and c = x_hat / alpha (`steps`), dx is grad inside the range and 0 outside; the
    sums over a channel are those of grad c - dx p, dx and grad. `grad` and `steps` are used up: memory is dear. Where
    clipped_gelu(x) was quantized, `gelu_of` is x, whose gradient is given then.
    """
    grad = grad.to(position.dtype)
    if q.native:
        grad, fused = grad.contiguous(), gelu_of is not None and _fuses_gelu(gelu_of, q)
        sums = native_training.backward_(grad, position, q, fused)
        return grad if gelu_of is None or fused else _clipped_gelu_backward_(grad, gelu_of), sums
    terms = steps.mul_(grad)
    grad_sums = [] if q.zero is None else [grad.sum_to_size(q.zero.shape)]
    grad_x = _zero_outside_(grad, position, *q.borders(position.dtype))
    inside_sums = [] if q.zero is None else [grad_x.sum_to_size(q.zero.shape)]
    sums = [terms.addcmul_(grad_x, position, value=-1).sum_to_size(q.step.shape), *inside_sums, *grad_sums]
    return grad_x if gelu_of is None else _clipped_gelu_backward_(grad_x, gelu_of), sums


def _step_gradients(sums: list[Tensor], q: _Grid, numel: int) -> tuple[Tensor, Tensor | None]:
    """Gradients of alpha and z from `_lsq_backward_`'s sums over the quantized tensor of `numel` values.

    dalpha = sum grad c - dx (p - z) and dz = sum (dx - grad) alpha, both times 1 / sqrt(numel * qp).
    """
    scale, dtype = (numel * q.qp) ** -0.5, q.step.dtype
    if q.zero is None:
        return (sums[0] * scale).to(dtype), None
    terms, inside, grad = sums
    return ((terms + q.zero * inside) * scale).to(dtype), ((inside - grad) * q.step * scale).to(dtype)


def _zero_outside_(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
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
        q = _grid(QParams(step, zero, qn, qp), x)
        return _in_steps(x, q).mul_(q.step)

    @staticmethod
    def backward(ctx, grad):
        x, step, zero = ctx.saved_tensors
        q = _grid(QParams(step, zero, *ctx.code_range), x)
        grad_x, sums = _lsq_backward_(grad.clone(), *_positions_and_steps(x, q), q)
        return grad_x.to(x.dtype), *_step_gradients(sums, q, x.numel()), None, None


# --- the activation of Q-MLP ------------------------------------------------------------------------------------------


def clipped_gelu(x: Tensor) -> Tensor:
    """clip(GELU(x), -10, 10), differentiable; keeps x and the output, as the layer behind it does anyway."""
    return _ClippedGELU.apply(x)


class _ClippedGELU(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x):
        y = _clipped_gelu(x)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return _zero_outside_(torch.ops.aten.gelu_backward(grad, x), y, -10., 10.)


def _clipped_gelu(x: Tensor, out: Tensor | None = None) -> Tensor:
    """In `out` or fresh."""
    y = F.gelu(x) if out is None else torch.ops.aten.gelu.out(x, out=out)
    return y.clamp_(-10., 10.)


def _clipped_gelu_backward_(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of clipped_gelu(x), in place."""
    torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)
    return _zero_outside_(grad, x, -math.inf, 10.)  # GELU(x) is above 10 where x is


# --- products of quantized operands -----------------------------------------------------------------------------------


PIECE_BYTES = 1 << 20  # a thread
PIECE_BYTES_OF_KERNELS = 1 << 22  # measured: with few passes, fewer and larger products are faster


def cache_piece(items: int, numel: int, like: Tensor, native: bool = False) -> int:
    """How many of a batch's items to compute at a time, with `numel` values each in the largest temporary.

    A pass over a piece that stays in the caches of a CPU's cores is several times faster than one over all the batch.
    GPUs and the compiler, which fuses the passes, get all at once. `native`: the passes are those of `native_training`.
    """
    if like.device.type != 'cpu' or torch.compiler.is_compiling():
        return items
    piece = torch.get_num_threads() * (PIECE_BYTES_OF_KERNELS if native else PIECE_BYTES)
    most = max(1, piece // max(1, numel * like.element_size()))
    return math.ceil(items / math.ceil(items / most)) if items else 1  # pieces of equal size


def _product_dtype(x: Tensor, step: Tensor) -> torch.dtype:
    """Of a matrix product with the quantized x: as autocast would choose."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.promote_types(
        x.dtype, step.dtype)


def quantized_linear(x: Tensor, weight: Tensor, qx: QParams, qw: QParams, bias: Tensor | None = None,
                     w_hat: Tensor | None = None, gelu: bool = False) -> Tensor:
    """x_hat @ w_hat^T + bias, keeping x and weight for the backward.

    Args:
        x: (..., K)
        weight: (N, K)
        qx, qw: quantizers of x and of the weight.
        bias: (N,)
        w_hat: the quantized weight, where the caller has it already.
        gelu: quantize clipped_gelu(x) instead of x. It is computed again in the backward, not kept.

    Returns:
        (..., N)
    """
    return _QuantizedLinear.apply(x, weight, bias, qx.step, qx.zero, qw.step, (qx.qn, qx.qp), (qw.qn, qw.qp), w_hat,
                                  gelu)


class _QuantizedLinear(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, weight, bias, x_step, x_zero, w_step, x_range, w_range, w_hat, gelu):
        ctx.x_range, ctx.w_range, ctx.has_bias, ctx.gelu = x_range, w_range, bias is not None, gelu
        ctx.save_for_backward(x, weight, x_step, x_zero, w_step)
        dtype = _product_dtype(x, x_step)
        return _linear(x, weight, bias, x_step, x_zero, w_step, x_range, w_range, w_hat, gelu, dtype)

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_w, grad_bias, *grads_of_steps = _linear_backward(
            grad, *ctx.saved_tensors, ctx.x_range, ctx.w_range, ctx.gelu, ctx.has_bias)
        return grad_x, grad_w, grad_bias if ctx.has_bias else None, *grads_of_steps, None, None, None, None


@native_training.opaque(
    'linear(Tensor x, Tensor weight, Tensor? bias, Tensor x_step, Tensor x_zero, Tensor w_step, int[] x_range, '
    'int[] w_range, Tensor? w_hat, bool gelu, ScalarType dtype) -> Tensor',
    lambda x, weight, *args: x.new_empty(*x.shape[:-1], len(weight), dtype=args[-1]))
def _linear(x, weight, bias, x_step, x_zero, w_step, x_range, w_range, w_hat, gelu, dtype):
    qx, qw = _grid(QParams(x_step, x_zero, *x_range), x), _grid(QParams(w_step, None, *w_range), weight)
    w_scaled = _quantized_weight(weight, qw, qx.step) if w_hat is None else w_hat * qx.step
    w_t = w_scaled.to(dtype).t()  # x_hat @ w_hat^T with the steps of x in the smaller operand
    rows = x.flatten(0, -2)  # (M, K)
    size, out = cache_piece(len(rows), rows.shape[-1], x, qx.native), None
    bias = rows.new_zeros(len(weight), dtype=dtype) if bias is None else bias.to(dtype)
    if size >= len(rows):
        out = torch.addmm(bias, _in_steps(rows, qx, gelu=gelu).to(dtype), w_t)
    else:
        out, scratch = rows.new_empty(len(rows), len(weight), dtype=dtype), _Scratch(True)
        for x_piece, out_piece in _split(size, rows, out):
            steps = _in_steps(x_piece, qx, scratch('steps', x_piece, x_step.dtype), gelu)
            torch.addmm(bias, steps.to(dtype), w_t, out=out_piece)
    return out.view(*x.shape[:-1], len(weight))


def _weight_for_kernel(weight: Tensor, qw: _Grid) -> Tensor | None:
    return _for_kernels(weight, qw) if qw.step.shape == (len(weight), 1) else None


def _quantized_weight(weight: Tensor, qw: _Grid, scale: Tensor) -> Tensor:
    """w_hat * scale, a scale for each column or one for all."""
    taken = _weight_for_kernel(weight, qw)
    if taken is not None:
        return native_training.weight(taken, qw, scale.expand(weight.shape[1]).contiguous())
    return _in_steps(weight, qw).mul_(qw.step).mul_(scale)


def _quantized_weight_and_steps(weight: Tensor, qw: _Grid) -> tuple[Tensor, Tensor | None, Tensor]:
    """Positions and steps for `_lsq_backward_`, and w_hat."""
    taken = _weight_for_kernel(weight, qw)
    if taken is not None:
        return taken, None, native_training.weight(taken, qw)
    position, steps = _positions_and_steps(weight, qw)
    return position, steps, steps * qw.step


def _fake_linear_backward(grad, x, weight, x_step, x_zero, w_step, *args):
    grad_bias = grad.new_empty(len(weight) if args[-1] else 0)
    grad_x, grad_w, *grads_of_steps = (like.new_empty(like.shape) for like in (x, weight, x_step, x_zero, w_step))
    return [grad_x, grad_w, grad_bias, *grads_of_steps]


@native_training.opaque(
    'linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor x_step, Tensor x_zero, Tensor w_step, '
    'int[] x_range, int[] w_range, bool gelu, bool has_bias) -> Tensor[]', _fake_linear_backward)
def _linear_backward(grad, x, weight, x_step, x_zero, w_step, x_range, w_range, gelu, has_bias):
    """The gradients of x, weight, bias (of size 0 where there is none), x_step, x_zero and w_step."""
    qx, qw = _grid(QParams(x_step, x_zero, *x_range), x), _grid(QParams(w_step, None, *w_range), weight)
    position_w, steps_w, w_hat = _quantized_weight_and_steps(weight, qw)
    w_half = w_hat.to(grad.dtype)  # under autocast the product ran in half precision, and so do its two gradients
    rows, x_rows = grad.flatten(0, -2), x.flatten(0, -2)                        # (M, N), (M, K)
    size = cache_piece(len(rows), x_rows.shape[-1], x, qx.native)
    scratch, grad_w_hat, sums = _Scratch(size < len(rows)), None, []
    grad_x = x_rows.new_empty(x_rows.shape, dtype=w_hat.dtype) if scratch.used else None
    for g, x_piece, out in _split(size, rows, x_rows, grad_x):
        position, steps = _positions_and_steps(x_piece, qx, scratch.two('x', x_piece, w_hat.dtype), gelu)
        steps_half = steps.to(g.dtype)  # whole numbers: exact
        grad_w_hat = g.mT @ steps_half if grad_w_hat is None else grad_w_hat.addmm_(g.mT, steps_half)
        grad_piece, piece_sums = _lsq_backward_(_into(out, g, w_half), position, steps, qx, x_piece if gelu else None)
        sums.append(piece_sums)
    grad_w, w_sums = _lsq_backward_(grad_w_hat.to(w_hat.dtype).mul_(qx.step), position_w, steps_w, qw)
    grad_w_step, _ = _step_gradients(w_sums, qw, weight.numel())
    grad_x = (grad_piece if grad_x is None else grad_x).to(x.dtype).view(x.shape)
    grad_bias = rows.sum(0) if has_bias else rows.new_empty(0)
    return [grad_x, grad_w.to(weight.dtype), grad_bias, *_step_gradients(_total(sums), qx, x.numel()), grad_w_step]


class _Scratch:
    """Memory for the temporaries of one piece after another, which so stays in the cache: fresh memory is not there.

    Where all is computed at once it gives None, for tensors that are freed as soon as they can be.
    """

    def __init__(self, used: bool) -> None:
        self.used, self._tensors = used, {}

    def __call__(self, name: str, like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor | None:
        """Contiguous memory of the shape of `like`, or of (len(like), *shape); pieces do not grow."""
        if not self.used:
            return None
        if (name, dtype) not in self._tensors:
            self._tensors[name, dtype] = like.new_empty((len(like), *(shape or like.shape[1:])), dtype=dtype)
        return self._tensors[name, dtype][:len(like)]

    def two(self, name: str, like: Tensor, dtype: torch.dtype, *shape: int) -> tuple[Tensor | None, Tensor | None]:
        """For a position and its code."""
        return self(f'position {name}', like, dtype, *shape), self(f'steps {name}', like, dtype, *shape)


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
