"""What the recomputing products share: pieces of a batch, memory for their temporaries, gradients of the scales."""
from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ops.grid import Grid
from ops.torch_kernels import Buffers

__all__ = ['Scratch', 'into', 'piece_size', 'product_dtype', 'scale_gradients', 'split', 'total']


def piece_size(items: int, numel: int, like: Tensor, piece_bytes: int) -> int:
    """How many of a batch's items to compute at a time, so that a temporary has at most `piece_bytes` for each thread.

    A pass over a piece that stays in the caches of a CPU's cores is several times faster than one over all the batch.
    GPUs, and the compiler, which fuses the passes, get all at once.

    Args:
        items: in the batch.
        numel: values of an item in the largest temporary.
        like: a tensor of the temporary's device and type.
    """
    if like.device.type != 'cpu' or torch.compiler.is_compiling():
        return items
    most = max(1, torch.get_num_threads() * piece_bytes // max(1, numel * like.element_size()))
    return math.ceil(items / math.ceil(items / most)) if items else 1  # pieces of equal size


def product_dtype(x: Tensor, scale: Tensor) -> torch.dtype:
    """The type of a matrix product with the quantized x, as autocast would choose it."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(x.dtype, scale.dtype)


def scale_gradients(sums: list[Tensor], grid: Grid, numel: int) -> tuple[Tensor, Tensor | None]:
    """LSQ's gradients of scale and zero point from the kernels' sums over a tensor of `numel` values.

    With the position p = x / scale + zero_point, the centered code c and the gradient grad_x of x:

        d scale = sum grad c - grad_x (p - zero_point),    d zero_point = sum (grad_x - grad) scale

    both times 1 / sqrt(numel qp), by which learned scales move about as fast as weights do (Esser et al., Section 2.2).
    """
    factor, dtype = (numel * grid.qp) ** -0.5, grid.scale.dtype
    if grid.zero_point is None:
        return (sums[0] * factor).to(dtype), None
    terms, inside, grad = sums
    of_scale = (terms + grid.zero_point * inside) * factor
    return of_scale.to(dtype), ((inside - grad) * grid.scale * factor).to(dtype)


def total(sums: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """The kernels' sums of all pieces together."""
    return [sum(terms[1:], start=terms[0]) for terms in zip(*sums, strict=True)]


class Scratch:
    """Memory that the temporaries of one piece after another share, because fresh memory is not in the cache.

    Where everything is computed at once it gives None, which means fresh memory that is freed as soon as it can be.
    """

    def __init__(self, used: bool) -> None:
        self.used, self._tensors = used, {}

    def __call__(self, name: str, like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor | None:
        """Contiguous memory of the shape of `like`, or of (len(like), *shape). Later pieces are never larger."""
        if not self.used:
            return None
        if (name, dtype) not in self._tensors:
            self._tensors[name, dtype] = like.new_empty((len(like), *(shape or like.shape[1:])), dtype=dtype)
        return self._tensors[name, dtype][:len(like)]

    def two(self, name: str, like: Tensor, dtype: torch.dtype) -> Buffers:
        """Memory for what a pass saves and for its codes."""
        return self(f'saved {name}', like, dtype), self(f'codes {name}', like, dtype)


def split(size: int, *tensors: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """The tensors in pieces of `size` along their first axis; None stays None."""
    count = -(-len(tensors[0]) // size)
    return zip(*([None] * count if tensor is None else tensor.split(size) for tensor in tensors), strict=True)


def into(out: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in `out` where there is one."""
    if out is None:
        return a @ b
    return torch.matmul(a, b, out=out) if out.dtype == a.dtype else out.copy_(a @ b)
