"""Quantized products as plain compositions of the quantizer's equation: the definition of what `ops` computes.

Every other implementation has these signatures and gives these values and gradients. This one keeps all that autograd
keeps, and follows a change of the equation (`QParams.fake_quantize` in `_quan_base.py`) by itself.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.grid import Quantization
from ops.torch_kernels import clipped_gelu

__all__ = ['Reference']

Pair = tuple[int, int]


class Reference:
    """The plain compositions."""

    name = 'reference'

    def codes(self, x: Tensor, q: Quantization) -> Tensor:
        """The integer codes of x, int32, in [qn, qp]: those that `fake_quantize` computes x_hat from."""
        return q.codes(x)

    def fake_quantize(self, x: Tensor, q: Quantization) -> Tensor:
        """x_hat, differentiable in x, scale and zero point."""
        return q.fake_quantize(x)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, qx: Quantization, qw: Quantization, *,
               w_hat: Tensor | None = None, gelu: bool = False) -> Tensor:
        """x_hat @ w_hat^T + bias.

        Args:
            x: (..., K)
            weight: (N, K)
            bias: (N,)
            qx, qw: quantizers of x, by channels of its last axis, and of the weight, by its rows.
            w_hat: the quantized weight, where the caller has it already. Gradients go to `weight` all the same.
            gelu: quantize clipped_gelu(x) instead of x.

        Returns:
            (..., N)
        """
        x = clipped_gelu(x) if gelu else x
        return F.linear(qx.fake_quantize(x), _weight(self, weight, qw, w_hat), bias)

    def conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None, qx: Quantization, qw: Quantization, stride: Pair,
               padding: Pair, dilation: Pair, groups: int, *, w_hat: Tensor | None = None) -> Tensor:
        """The convolution of x_hat, (B, C, H, W), with w_hat, (N, C / groups, h, w); see `linear`."""
        return F.conv2d(self.fake_quantize(x, qx), _weight(self, weight, qw, w_hat), bias, stride, padding, dilation,
                        groups)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, quantizers: Sequence[Quantization], scale: float,
                  dropout: Tensor | None = None) -> Tensor:
        """A_hat v_hat with A = dropout * softmax(scale * q_hat k_hat^T).

        Args:
            q, k, v: (B, H, N, d)
            quantizers: of q, k, v and A, by heads.
            scale: of the scores, d ** -0.5.
            dropout: (B, H, N, N), 0 or 1 / (1 - p) each; None for no dropout.

        Returns:
            (B, H, N, d)
        """
        of_q, of_k, of_v, of_attn = quantizers
        attn = (of_q.fake_quantize(q) @ of_k.fake_quantize(k).mT * scale).softmax(-1)
        attn = attn if dropout is None else attn * dropout
        return of_attn.fake_quantize(attn) @ of_v.fake_quantize(v)

    def gram_distance(self, a: Tensor, b: Tensor) -> Tensor:
        """|| A A^T / ||A A^T||_F - B B^T / ||B B^T||_F ||_F: a (..., N, d), b (..., N, d') -> (...). No gradient to b.

        A zero matrix has a zero normalised Gram matrix.
        """
        of_a, of_b = (gram / torch.linalg.matrix_norm(gram, keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
                      for gram in (a @ a.mT, (b @ b.mT).detach()))
        return torch.linalg.matrix_norm(of_a - of_b)


def _weight(ops: Reference, weight: Tensor, qw: Quantization, w_hat: Tensor | None) -> Tensor:
    """The quantized weight: what the caller has, unless a gradient is to go through it."""
    return ops.fake_quantize(weight, qw) if w_hat is None or torch.is_grad_enabled() else w_hat
