"""IRM at the start: LayerNorms of q and k that let the attention be that of a network without them."""
from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from quant_vision_transformer import QAttention

__all__ = ['fit_layer_norm', 'prepare_irm']

CONSTANT = 8.  # of `prepare_irm`, in units of the root mean square of |q|


def fit_layer_norm(norm: nn.LayerNorm, x: Tensor, target: Tensor) -> None:
    """gamma and beta that bring norm(x) closest to the target, both (..., d), in squared error."""
    x = F.layer_norm(x.double(), norm.normalized_shape, eps=norm.eps).flatten(0, -2)
    target = target.double().flatten(0, -2)
    x_mean, target_mean = x.mean(0), target.mean(0)
    x, target = x - x_mean, target - target_mean
    gamma = (x * target).mean(0) / x.square().mean(0).clamp_min(1e-12)
    norm.weight.copy_(gamma)
    norm.bias.copy_(target_mean - gamma * x_mean)


def prepare_irm(attn: QAttention, q: Tensor, k: Tensor) -> None:
    """Rewrites the weights of q and k, so that a network with IRM can compute the attention of one without.

    A LayerNorm takes the mean and the length of each q away, and the attention of the full-precision network depends on
    both. Two of the d dimensions of a head are spent on keeping them. q and k are rotated alike, which leaves q k^T as
    it is, into the d - 2 directions of the most energy (at random among these: equal spreads suit one scale for all),
    and the last two dimensions become -s/2 + c and -s/2 - c, where s is the sum of the others and c a constant far
    larger than |q|. The mean is then 0 and the variance nearly constant: LayerNorm is nearly linear. gamma takes the
    last two dimensions out. The mean of k, which softmax does not see, is taken off beforehand.

    Args:
        q, k: of the full-precision network, (B, H, N, d).
    """
    heads, d = attn.num_heads, attn.head_dim
    weight, bias = attn.qkv.weight.view(3, heads, d, -1), attn.qkv.bias.view(3, heads, d)
    bias[1] -= k.mean((0, 2))
    k = k - k.mean((0, 2), keepdim=True)
    generator = torch.Generator().manual_seed(0)
    for head in range(heads):
        energy = sum(gram / gram.trace() for gram in (
            rows.mT @ rows for rows in (t[:, head].flatten(0, 1).double() for t in (q, k))))
        kept = torch.linalg.eigh(energy).eigenvectors[:, 2:]                         # (d, d - 2)
        spin = torch.linalg.qr(torch.randn(d - 2, d - 2, generator=generator, dtype=torch.float64)).Q
        turn = (kept @ spin.to(kept)).mT                                             # (d - 2, d)
        for part, t in enumerate((q, k)):
            constant = CONSTANT * t.square().sum(-1).mean().sqrt()
            for values in (weight[part, head], bias[part, head]):
                values[:-2] = (turn @ values.double()).to(values.dtype)
                values[-2:] = -values[:-2].sum(0) / 2
            bias[part, head, -2] += constant
            bias[part, head, -1] -= constant
