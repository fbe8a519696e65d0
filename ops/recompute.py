"""Quantized products that keep what their full-precision counterparts keep, and quantize again in the backward.

LSQ's gradients (Esser et al., ICLR 2020, arXiv 1902.08153) are derived by hand here, over elementwise passes that are
given (`torch_kernels.py`, `cpu_kernels.py`). Nothing reads a tensor's value on the host. On a CPU a product goes piece
by piece through the batch, because a pass over a piece that stays in the caches is several times faster.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ops import registry
from ops.attention import attention_backward, attention_forward
from ops.gram import gram_distance
from ops.grid import Grid, Quantization
from ops.linear import linear_backward, linear_forward
from ops.pieces import product_dtype, scale_gradients
from ops.reference import Pair, Reference
from ops.torch_kernels import TorchKernels, clipped_gelu

__all__ = ['OpaqueRecomputing', 'Recomputing']


class Recomputing(Reference):
    """The products over the elementwise passes of `kernels`, with the signatures and results of the reference.

    Args:
        name: by which `registry` knows this implementation.
        kernels: the elementwise passes.
    """

    fuses_in_graphs = False  # whether a compiled graph takes the products whole, with the GELU in them

    def __init__(self, name: str, kernels: TorchKernels) -> None:
        self.name, self.kernels = name, kernels

    def codes(self, x: Tensor, q: Quantization) -> Tensor:
        grid = Grid.of_quantization(q)
        centered = self.kernels.centered_codes(x.detach(), grid)
        return (centered if grid.zero_point is None else centered + grid.zero_point).to(torch.int32)

    def fake_quantize(self, x: Tensor, q: Quantization) -> Tensor:
        return _FakeQuantize.apply(x, q.scale, q.zero_point, q.qn, q.qp, self.name)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, qx: Quantization, qw: Quantization, *,
               w_hat: Tensor | None = None, gelu: bool = False) -> Tensor:
        if gelu and torch.compiler.is_compiling() and not self.fuses_in_graphs:
            x, gelu = clipped_gelu(x), False  # the compiler fuses it, and chooses by itself what to keep
        return _Linear.apply(x, weight, bias, qx.scale, qx.zero_point, qw.scale, (qx.qn, qx.qp), (qw.qn, qw.qp), w_hat,
                             gelu, self.name)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, quantizers: Sequence[Quantization], scale: float,
                  dropout: Tensor | None = None) -> Tensor:
        qparams = [tensor for each in quantizers for tensor in (each.scale, each.zero_point)]
        ranges = [end for each in quantizers for end in (each.qn, each.qp)]
        dtype = product_dtype(q, quantizers[0].scale)
        return _Attention.apply(q, k, v, *qparams, ranges, scale, dtype, dropout, self.name)

    def conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None, qx: Quantization, qw: Quantization, stride: Pair,
               padding: Pair, dilation: Pair, groups: int, *, w_hat: Tensor | None = None) -> Tensor:
        kernel = tuple(weight.shape[2:])
        tiles = all(n % k == 0 for n, k in zip(x.shape[-2:], kernel, strict=True))
        if not tiles or (stride, padding, dilation, groups) != (kernel, (0, 0), (1, 1), 1):
            return super().conv2d(x, weight, bias, qx, qw, stride, padding, dilation, groups, w_hat=w_hat)
        # Filters that tile the image are a linear layer of its patches, whose backward is several times faster on CPUs.
        (h, w), channels = kernel, x.shape[1]
        patches = x.unflatten(3, (-1, w)).unflatten(2, (-1, h))                                # (B, C, H', h, W', w)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)                                 # (B, H', W', C h w)
        scale, zero_point = (value.expand(channels, h, w).flatten() for value in (qx.scale, qx.zero_point))
        out = self.linear(patches, weight.flatten(1), bias, qx._replace(scale=scale, zero_point=zero_point),
                          qw._replace(scale=qw.scale.flatten(1)), w_hat=None if w_hat is None else w_hat.flatten(1))
        return out.permute(0, 3, 1, 2)

    def gram_distance(self, a: Tensor, b: Tensor) -> Tensor:
        return gram_distance(a, b)

    # What the autograd functions below call; `OpaqueRecomputing` hides it from a compiler.

    def linear_forward(self, *args: Any) -> Tensor:
        return linear_forward(self.kernels, *args)

    def linear_backward(self, *args: Any) -> list[Tensor]:
        return linear_backward(self.kernels, *args)

    def attention_forward(self, *args: Any) -> Tensor:
        return attention_forward(self.kernels, *args)

    def attention_backward(self, *args: Any) -> list[Tensor]:
        return attention_backward(self.kernels, *args)


class OpaqueRecomputing(Recomputing):
    """For kernels that a compiler cannot trace: in its graphs each product is one operator of torch.library."""

    fuses_in_graphs = True

    def __init__(self, name: str, kernels: TorchKernels) -> None:
        super().__init__(name, kernels)
        self._linear = _operator(
            'linear(Tensor x, Tensor weight, Tensor? bias, Tensor x_scale, Tensor x_zero_point, Tensor w_scale, '
            'int[] x_range, int[] w_range, Tensor? w_hat, bool gelu, ScalarType dtype) -> Tensor',
            super().linear_forward,
            lambda x, weight, *args: x.new_empty(*x.shape[:-1], len(weight), dtype=args[-1]))
        self._linear_backward = _operator(
            'linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor x_scale, Tensor x_zero_point, '
            'Tensor w_scale, int[] x_range, int[] w_range, bool gelu, bool has_bias) -> Tensor[]',
            super().linear_backward, _fake_linear_backward)
        self._attention = _operator(
            'attention(Tensor q, Tensor k, Tensor v, Tensor? dropout, Tensor[] qparams, int[] ranges, float scale, '
            'ScalarType dtype) -> Tensor',
            super().attention_forward, lambda q, *args: q.new_empty(q.shape, dtype=args[-1]))
        self._attention_backward = _operator(
            'attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? dropout, Tensor[] qparams, '
            'int[] ranges, float scale, ScalarType dtype) -> Tensor[]',
            super().attention_backward,
            lambda grad, q, k, v, dropout, qparams, *args: [x.new_empty(x.shape) for x in (q, k, v, *qparams)])

    def linear_forward(self, *args: Any) -> Tensor:
        return self._linear(*args) if torch.compiler.is_compiling() else super().linear_forward(*args)

    def linear_backward(self, *args: Any) -> list[Tensor]:
        return self._linear_backward(*args) if torch.compiler.is_compiling() else super().linear_backward(*args)

    def attention_forward(self, *args: Any) -> Tensor:
        return self._attention(*args) if torch.compiler.is_compiling() else super().attention_forward(*args)

    def attention_backward(self, *args: Any) -> list[Tensor]:
        return self._attention_backward(*args) if torch.compiler.is_compiling() else super().attention_backward(*args)


def _operator(schema: str, function: Callable, fake: Callable) -> Callable:
    """`function` as an operator qvit::..., which a compiler does not look into.

    Args:
        schema: 'name(...) -> ...' in the language of torch.library. Outputs share no memory with inputs.
        fake: gives, for the same arguments, empty tensors of the outputs' shapes and types.
    """
    name, parenthesis, arguments = schema.partition('(')
    operator = torch.library.custom_op(f'qvit::{name}', function, mutates_args=(), schema=parenthesis + arguments)
    operator.register_fake(fake)
    return operator


def _fake_linear_backward(grad: Tensor, x: Tensor, weight: Tensor, x_scale: Tensor, x_zero_point: Tensor,
                          w_scale: Tensor, *args: Any) -> list[Tensor]:
    grad_bias = grad.new_empty(len(weight) if args[-1] else 0)
    grad_x, grad_w, *others = (like.new_empty(like.shape) for like in (x, weight, x_scale, x_zero_point, w_scale))
    return [grad_x, grad_w, grad_bias, *others]


class _FakeQuantize(torch.autograd.Function):
    """Keeps x for the backward, not x_hat."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, qn, qp, implementation):
        ctx.code_range, ctx.implementation = (qn, qp), implementation
        ctx.save_for_backward(x, scale, zero_point)
        grid = Grid.of(scale, zero_point, qn, qp)
        return registry.get(implementation).kernels.centered_codes(x, grid).mul_(grid.scale)

    @staticmethod
    def backward(ctx, grad):
        x, scale, zero_point = ctx.saved_tensors
        grid, kernels = Grid.of(scale, zero_point, *ctx.code_range), registry.get(ctx.implementation).kernels
        codes, saved = kernels.centered_codes_and_saved(x, grid)
        grad_x, sums = kernels.backward_(grad.clone(), codes, saved, grid)
        return grad_x.to(x.dtype), *scale_gradients(sums, grid, x.numel()), None, None, None


class _Linear(torch.autograd.Function):
    """Keeps x and the weight, as a full-precision layer does; with a GELU its input, not its output."""

    @staticmethod
    def forward(ctx, x, weight, bias, x_scale, x_zero_point, w_scale, x_range, w_range, w_hat, gelu, implementation):
        ctx.ranges, ctx.gelu, ctx.has_bias, ctx.implementation = (x_range, w_range), gelu, bias is not None, \
            implementation
        ctx.save_for_backward(x, weight, x_scale, x_zero_point, w_scale)
        return registry.get(implementation).linear_forward(x, weight, bias, x_scale, x_zero_point, w_scale, x_range,
                                                           w_range, w_hat, gelu, product_dtype(x, x_scale))

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_w, grad_bias, *of_qparams = registry.get(ctx.implementation).linear_backward(
            grad, *ctx.saved_tensors, *ctx.ranges, ctx.gelu, ctx.has_bias)
        return grad_x, grad_w, grad_bias if ctx.has_bias else None, *of_qparams, None, None, None, None, None


class _Attention(torch.autograd.Function):
    """Keeps q, k and v, and no N x N map."""

    @staticmethod
    def forward(ctx, q, k, v, q_scale, q_zero, k_scale, k_zero, v_scale, v_zero, a_scale, a_zero, ranges, scale, dtype,
                dropout, implementation):
        qparams = [q_scale, q_zero, k_scale, k_zero, v_scale, v_zero, a_scale, a_zero]
        ctx.ranges, ctx.scale, ctx.dtype, ctx.implementation = ranges, scale, dtype, implementation
        ctx.save_for_backward(q, k, v, dropout, *qparams)
        return registry.get(implementation).attention_forward(q, k, v, dropout, qparams, ranges, scale, dtype)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, dropout, *qparams = ctx.saved_tensors
        grads = registry.get(ctx.implementation).attention_backward(grad, q, k, v, dropout, qparams, ctx.ranges,
                                                                    ctx.scale, ctx.dtype)
        return *grads, None, None, None, None, None
