"""Scales and zero points of least squared error, for many channels at once."""
from __future__ import annotations

import torch
from torch import Tensor

from _quan_base import min_scale

__all__ = ['activation_qparams', 'weight_scales']


class _Best:
    """The scale and zero point of least squared error among the candidates so far, for each row of x by itself."""

    def __init__(self, x: Tensor, qn: int, qp: int, importance: Tensor | None = None) -> None:
        self.problem = x, qn, qp, importance
        self.error = x.new_full((len(x), 1), torch.inf)
        self.scale, self.zero = torch.ones_like(self.error), torch.zeros_like(self.error)

    def consider(self, scale: Tensor, zero: Tensor | None = None) -> None:
        """scale and zero: (rows, 1)"""
        x, qn, qp, importance = self.problem
        zero = torch.zeros_like(scale) if zero is None else zero
        error = (x / scale).add_(zero).clamp_(qn, qp).round_().sub_(zero).mul_(scale).sub_(x).square_()
        error = (error if importance is None else error.mul_(importance)).sum(1, keepdim=True)
        better = error < self.error
        self.scale, self.zero, self.error = (torch.where(better, new, old) for new, old in (
            (scale, self.scale), (zero, self.zero), (error, self.error)))


def weight_scales(weight: Tensor, qn: int, qp: int, importance: Tensor | None = None) -> Tensor:
    """The scale of least squared error of every row, among 60 from 0.15 to 1.1 times max|w| / qp.

    Args:
        weight: (out, in)
        importance: (in,) or (out, in), weight of each squared error.

    Returns:
        (out,)
    """
    largest = weight.abs().amax(1, keepdim=True).clamp_min(min_scale(weight.dtype)) / qp
    best = _Best(weight, qn, qp, importance)
    for share in torch.linspace(1.1, 0.15, 60).tolist():
        best.consider(largest * share)
    return best.scale[:, 0]


def activation_qparams(x: Tensor, qn: int, qp: int, whole: bool = True, importance: Tensor | None = None,
                       ) -> tuple[Tensor, Tensor]:
    """Step and zero point of least squared error of every row: a search over clipped ranges, then around the best.

    Args:
        x: (channels, values)
        whole: zero points are integers, as quantizers use them.
        importance: weight of each squared error, of x's shape.

    Returns:
        (channels,) each.
    """
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    # A channel that hardly varies would get a scale far below its values, and a zero point beyond what float32 counts.
    least = x.abs().amax(1, keepdim=True).mul(1e-4).clamp_min(min_scale(x.dtype))
    tails = x.quantile(x.new_tensor([0.02, 0.1, 0.9, 0.98]), dim=1)[..., None]  # (4, C, 1)
    best = _Best(x, qn, qp, importance)
    for bottom in (low, low * 0.7, low * 0.45, *tails[:2]):
        for top in (high, high * 0.7, high * 0.45, *tails[2:]):
            for width in (1., 1.25):
                scale = ((top - bottom) * width / (qp - qn)).maximum(least)
                zero = (qn + qp) / 2 - (bottom + top) / 2 / scale
                best.consider(scale, zero.round())
                if not whole:
                    best.consider(scale, zero)
    for change, by in zip((0.15, 0.07, 0.03), (1, 1, 1) if whole else (0.4, 0.2, 0.1), strict=True):
        scale, zero = best.scale.maximum(least), best.zero
        for factor in (1 - change, 1., 1 + change):
            for shift in (-by, 0, by):
                best.consider(scale * factor, zero + shift)
    return best.scale[:, 0], best.zero[:, 0]
