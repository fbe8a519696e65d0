"""The distance of normalised Gram matrices that DGD is made of, by d x d products instead of the N x N matrices."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ops.pieces import piece_size
from ops.torch_kernels import TorchKernels

__all__ = ['gram_distance']


def gram_distance(a: Tensor, b: Tensor) -> Tensor:
    """Distances of the normalised Gram matrices, computed in float32 or more.

    Args:
        a: (L, B, ..., N, d), of which the pieces are those of the second axis.
        b: (L, B, ..., N, d'), to which no gradient goes.

    Returns:
        (L, B, ...)
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    if a.shape[-1] != b.shape[-1]:  # columns of zeros leave the Gram matrix as it is
        width = max(a.shape[-1], b.shape[-1])
        a, b = F.pad(a, (0, width - a.shape[-1])), F.pad(b, (0, width - b.shape[-1]))
    return _GramDistance.apply(a, b)


class _GramDistance(torch.autograd.Function):
    """|| A A^T / ||A A^T||_F - B B^T / ||B B^T||_F ||_F by d x d products: a, b (..., N, d) -> (...). No gradient to b.

    With <A A^T, B B^T>_F = ||A^T B||_F^2 the squared distance is 2 - 2 cos; but 1 - cos in float32 leaves no digit of a
    distance below 3e-4, and a gradient of noise. So scale A and B to norm 1 (the distance stays), take M = A - B, and
    expand in what vanishes with M. With K = M^T M, X = M^T B, C = B^T B:

        s = ||A A^T - B B^T||^2    = <K, K + 4 X + 2 C> + 2 <X, X^T>
        t = <A A^T - B B^T, B B^T> = <X, X + 2 C>,             e = s + 2 t
        b2 = ||B B^T|| = ||C||,    a2 = ||A A^T|| = sqrt(b2^2 + e),    a2 - b2 = e / (a2 + b2)
        distance^2 = 2 (1 - cos) = 2 / (a2 (a2 + b2)) * (s - t (a2 - b2) / b2)
        d(distance^2)/dA = 4 (cos / a2^2 A A^T A - 1 / (a2 b2) B B^T A)
                         = 4 M (p A^T A) + 4 B (p (K + X) + r (X^T + C))
        p = cos / a2^2,    r = p - 1 / (a2 b2) = -((a2 - b2) + (1 - cos) b2) / (a2^2 b2)

    Rounding errors are then relative to A - B. (For B = A Q, Q a rotation, the error is again that of 1 - cos.) A zero
    matrix has a zero normalised Gram matrix: distance 1 to any other, 0 to another zero. The gradient there, and the
    subgradient wherever the distance is 0, is 0.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, a: Tensor, b: Tensor) -> Tensor:
        # The gradient is computed here, while a piece of a and b is in the cache: it alone is kept.
        distance, grad = a.new_empty(a.shape[:-2]), a.new_empty(a.shape)
        images = piece_size(a.shape[1], a[:, :1].numel() // 2, a, TorchKernels.piece_bytes)
        for tensors in zip(*(tensor.split(images, 1) for tensor in (a, b, distance, grad)), strict=True):
            _distance_and_gradient_(*tensors)
        ctx.save_for_backward(grad)
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * grad[..., None, None], None


def _distance_and_gradient_(a: Tensor, b: Tensor, distance: Tensor, grad: Tensor) -> None:
    """Into `distance`, (...), that of a and b, (..., N, d), and into `grad`, (..., N, d), its gradient to a."""
    # What norms, sums and products run over is contiguous: strided, each of them takes a multiple of the time.
    m, b = torch.empty_like(grad), b.contiguous()
    norm_a, norm_b = (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) for x in (a, b))  # (..., 1, 1)
    has_a, has_b = norm_a != 0, norm_b != 0
    norm_a, norm_b = torch.where(has_a, norm_a, 1), torch.where(has_b, norm_b, 1)
    torch.mul(a, norm_b / norm_a, out=m).sub_(b)  # M and B times ||B||: their products, (..., d, d), times its square
    k, x_t, c = m.mT @ m, b.mT @ m, b.mT @ b
    x = x_t.mT.contiguous()
    u, v = k + x, x_t + c  # K + X and X^T + C
    inverse = norm_b ** -2

    def inner(first: Tensor, second: Tensor) -> Tensor:
        """Of the products without ||B||^2, (..., 1, 1)."""
        return torch.linalg.vecdot(first.flatten(-2), second.flatten(-2))[..., None, None] * inverse * inverse

    t = inner(x_t, v + c)
    s = inner(k, u.add(x_t).add_(v, alpha=2)) + 2 * inner(x, x_t)
    e = s + 2 * t
    # At norm 1, a Gram matrix of rank at most d has ||C||^2 >= 1/d: the floor is reached by zero matrices alone.
    b4 = inner(c, c).clamp_min(1e-12)
    a2, b2 = (b4 + e).clamp_min(1e-12).sqrt(), b4.sqrt()
    difference = e / (a2 + b2)
    one_minus_cos = (s - t * difference / b2) / (a2 * (a2 + b2))
    nonzero = has_a & has_b
    far = torch.where(nonzero, (2 * one_minus_cos).clamp_min(0).sqrt(), (has_a ^ has_b).to(a.dtype))
    distance.copy_(far[..., 0, 0])

    # d(distance) = d(distance^2) / (2 distance); the divisions by the norms undo the scaling of A, M, B and products.
    factor = torch.where(nonzero & (far > 0), 2 / far, 0) / (norm_a * norm_b) * inverse
    p = factor * (1 - one_minus_cos) / a2.square()
    r = -factor * (difference + one_minus_cos * b2) / (a2.square() * b2)
    u *= p
    torch.matmul(m, torch.addcmul(u, v, p), out=grad)
    grad.flatten(0, -3).baddbmm_(b.flatten(0, -3), u.addcmul_(v, r).flatten(0, -3))
