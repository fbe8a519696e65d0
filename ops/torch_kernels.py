"""The elementwise passes of quantized products in plain torch, on any device.

With p = x / scale + zero_point, where a value lies on the grid, and its centered code c = round(clamp(p)) - zero_point,
the quantized value is c * scale. A product multiplies centered codes and brings the scales in through its smaller
operand. What a pass keeps for its backward is `saved`, which only the kernels that made it understand.
"""
from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.grid import Grid

__all__ = ['Buffers', 'TorchKernels', 'clipped_gelu']

GELU_LIMIT = 10.  # Q-MLP clips the GELU's output to it
# Memory that a pass may use for what it saves and for its codes; None where it is to take fresh memory.
Buffers = tuple[Tensor | None, Tensor | None]


class TorchKernels:
    """See the module's text. Sums over a channel are those of grad c - grad_x p, grad_x and grad, the latter two with a
    zero point only: LSQ's gradients of scale and zero point follow from them."""

    piece_bytes = 1 << 20  # of the largest temporary, for each thread: it stays in the caches of a CPU's core

    def centered_codes(self, x: Tensor, grid: Grid, out: Tensor | None = None, gelu: bool = False) -> Tensor:
        """The centered codes of x, or with `gelu` those of clipped_gelu(x), in `out` or fresh memory."""
        if gelu:
            x = _clipped_gelu(x, out if out is not None and out.dtype == x.dtype else None)
        return _center_(_positions(x, grid, out).clamp_(grid.qn, grid.qp).round_(), grid)

    def centered_codes_and_saved(self, x: Tensor, grid: Grid, buffers: Buffers = (None, None),
                                 gelu: bool = False) -> tuple[Tensor, Any]:
        """`centered_codes`, and what `backward_` needs beside them."""
        for_positions, for_codes = buffers
        if gelu:
            same = for_positions is not None and for_positions.dtype == x.dtype
            x = _clipped_gelu(x, for_positions if same else None)
        positions = _positions(x, grid, for_positions)
        return _center_(torch.clamp(positions, grid.qn, grid.qp, out=for_codes).round_(), grid), positions

    def backward_(self, grad: Tensor, codes: Tensor | None, saved: Any, grid: Grid, gelu_of: Tensor | None = None,
                  ) -> tuple[Tensor, list[Tensor]]:
        """The gradient of x from `grad`, that of x_hat, and the sums over each channel.

        The memory of `grad`, `codes` and `saved` is used up.

        Args:
            gelu_of: x, where clipped_gelu(x) was quantized: its gradient is returned then.
        """
        grad = grad.to(saved.dtype)
        terms = codes.mul_(grad)
        grad_sums = [] if grid.zero_point is None else [grad.sum_to_size(grid.zero_point.shape)]
        grad_x = _zero_outside_(grad, saved, *grid.borders(saved.dtype))
        inside_sums = [] if grid.zero_point is None else [grad_x.sum_to_size(grid.zero_point.shape)]
        terms.addcmul_(grad_x, saved, value=-1)
        sums = [terms.sum_to_size(grid.scale.shape), *inside_sums, *grad_sums]
        return grad_x if gelu_of is None else _clipped_gelu_backward_(grad_x, gelu_of), sums

    def quantized_weight(self, weight: Tensor, grid: Grid, factor: Tensor) -> Tensor:
        """w_hat * factor, with a factor for each column or one for all."""
        return self.centered_codes(weight, grid).mul_(grid.scale).mul_(factor)

    def quantized_weight_and_saved(self, weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None, Any]:
        """w_hat, its codes where `backward_` needs them, and what that needs beside."""
        codes, saved = self.centered_codes_and_saved(weight, grid)
        return codes * grid.scale, codes, saved

    # --- the attention's probabilities, (B, H, N, N), from their scores -----------------------------------------------

    def softmax_codes(self, scores: Tensor, grid: Grid, dropout: Tensor | None, dtype: torch.dtype, scratch: Any,
                      ) -> Tensor:
        """The centered codes of dropout * softmax(scores), computed in `dtype`. The scores are used up."""
        attn = torch.softmax(scores, -1, dtype=dtype, out=scratch('softmax', scores, dtype))
        if dropout is not None:
            attn = attn * dropout
        return self.centered_codes(attn, grid, scratch('scores', attn, attn.dtype))

    def softmax_codes_and_saved(self, scores: Tensor, grid: Grid, dropout: Tensor | None, dtype: torch.dtype,
                                scratch: Any) -> tuple[Tensor, Any, Tensor | None]:
        """`softmax_codes`, what `softmax_backward` needs beside them, and memory of the scores' shape and type that is
        free as soon as the codes have been multiplied with the gradient (None: take fresh memory)."""
        softmax = torch.softmax(scores, -1, dtype=dtype, out=scratch('softmax', scores, dtype))
        attn = softmax if dropout is None else softmax * dropout
        codes, saved = self.centered_codes_and_saved(attn, grid, scratch.two('attention', attn, dtype))
        return codes, (softmax, saved), scratch('scores', attn, scores.dtype)

    def softmax_backward(self, grad: Tensor, codes: Tensor, saved: Any, grid: Grid, dropout: Tensor | None,
                         scratch: Any) -> tuple[Tensor, list[Tensor]]:
        """The gradient of the scores, in the type of `grad`, and the sums over each channel."""
        softmax, of_attn = saved
        dtype = grad.dtype
        grad, sums = self.backward_(grad, codes, of_attn, grid)
        if dropout is not None:
            grad = grad * dropout
        out = scratch('saved attention', softmax, softmax.dtype)
        if out is None:
            grad = torch._softmax_backward_data(grad, softmax, -1, softmax.dtype)
        else:
            grad = torch.ops.aten._softmax_backward_data.out(grad, softmax, -1, softmax.dtype, grad_input=out)
        return grad.to(dtype), sums


def _positions(x: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
    """x / scale + zero_point, in `out` or fresh memory.

    By the reciprocal, because on a CPU a division takes as long as two multiplications.
    """
    if grid.zero_point is None:
        return torch.mul(x, grid.reciprocal, out=out)
    if grid.zero_point.shape[-1] > 1:
        return torch.addcmul(grid.zero_point, x, grid.reciprocal, out=out)
    return torch.mul(x, grid.reciprocal, out=out).add_(grid.zero_point)  # torch does not vectorize addcmul for heads


def _center_(codes: Tensor, grid: Grid) -> Tensor:
    return codes if grid.zero_point is None else codes.sub_(grid.zero_point)


def _zero_outside_(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """`grad` where low < x < high and 0 elsewhere, in place.

    It is the backward of hardtanh, the one elementwise kernel that masks without a tensor of booleans, which are slow
    on CPUs.
    """
    if torch.compiler.is_compiling():  # the compiler takes no `out`, and needs none, because it fuses the passes
        return torch.ops.aten.hardtanh_backward(grad, x, low, high)
    return torch.ops.aten.hardtanh_backward.grad_input(grad, x, low, high, grad_input=grad)


# --- the activation of Q-MLP ------------------------------------------------------------------------------------------


def clipped_gelu(x: Tensor) -> Tensor:
    """clip(GELU(x), -10, 10), differentiable; keeps x alone."""
    return _ClippedGELU.apply(x)


class _ClippedGELU(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _clipped_gelu(x)

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        return _zero_above_limit_(torch.ops.aten.gelu_backward(grad, x), x)


def _clipped_gelu(x: Tensor, out: Tensor | None = None) -> Tensor:
    y = F.gelu(x) if out is None else torch.ops.aten.gelu.out(x, out=out)
    return y.clamp_(-GELU_LIMIT, GELU_LIMIT)


def _clipped_gelu_backward_(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of clipped_gelu(x), in place."""
    torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)
    return _zero_above_limit_(grad, x)


def _zero_above_limit_(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient where the GELU is not clipped, in place. GELU(x) is above the limit where x is; the limit itself is
    inside, as every border."""
    return _zero_outside_(grad, x, -math.inf, GELU_LIMIT * (1 + torch.finfo(x.dtype).eps))
