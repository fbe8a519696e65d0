"""What the products know of a quantizer, and its state as their kernels use it."""
from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ['Grid', 'Quantization', 'min_scale']


def min_scale(dtype: torch.dtype) -> float:
    """The smallest scale in use: far below any trained one, and large enough to divide by in `dtype`."""
    return max(1e-8, torch.finfo(dtype).tiny)


class Quantization(Protocol):
    """How a tensor is quantized: `_quan_base.QParams`, with its parameters and its equation."""
    scale: Tensor
    zero_point: Tensor | None
    qn: int
    qp: int

    def codes(self, x: Tensor) -> Tensor: ...

    def fake_quantize(self, x: Tensor) -> Tensor: ...


class Grid(NamedTuple):
    """The grid that values are rounded to: a positive scale, its reciprocal and a whole zero point, without gradients.

    Attributes:
        scale, reciprocal: they broadcast against the tensor.
        zero_point: of the scale's shape; None for weights, which have none.
        qn, qp: the smallest and the largest code.
    """
    scale: Tensor
    reciprocal: Tensor
    zero_point: Tensor | None
    qn: int
    qp: int

    @classmethod
    def of_quantization(cls, q: Quantization) -> Grid:
        return cls.of(q.scale, q.zero_point, q.qn, q.qp)

    @classmethod
    def of(cls, scale: Tensor, zero_point: Tensor | None, qn: int, qp: int) -> Grid:
        scale = scale.detach().clamp_min(min_scale(scale.dtype))
        return cls(scale, scale.reciprocal(), None if zero_point is None else zero_point.detach().round(), qn, qp)

    def borders(self, dtype: torch.dtype) -> tuple[float, float]:
        """What lies strictly between these is inside the range of codes.

        They are the smallest margins beyond qn and qp, because a value on its border is inside.
        """
        info = torch.finfo(dtype)
        return self.qn - max(-self.qn * info.eps, info.tiny), self.qp * (1 + info.eps)
