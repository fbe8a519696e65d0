"""Calibration of a quantized DeiT to the full-precision network whose weights it holds: closed forms, layer by layer.

The images run through two networks at once, the full-precision one and the one that is quantized so far. In forward
order each layer gets the scales, weight and bias that bring its output, computed from inputs that its predecessors
quantize, closest to what the full-precision network has at that place:

    activations   the scale and zero point of least squared error, per channel; where the bias of a LayerNorm or of v
                  can shift them and the next layer's bias make up for that, zero points need not be whole
    weight        W minimises E|W x_hat - t|^2 + ridge |W - W_0|^2, t the full-precision output; its scales have the
                  least squared error weighted by E[x_hat^2]. Then each column in turn takes over the rounding errors
                  of those before it (GPTQ: Frantar et al., ICLR 2023, arXiv 2210.17323)
    bias          E[t] - W_hat E[x_hat]
    residual      t of `proj` and `fc2` is what the sum lacks: they correct the errors of the layers before
    IRM           gamma and beta by least squares, see `_prepare_irm`

The result is a network of the same form as ever: another calibration gives other values of the same parameters.
"""
from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from _quan_base import SIGNED_THRESHOLD, ActQ, Conv2dQ, LinearQ, code_range, min_scale, named_quantizers
from ops import clipped_gelu
from quant_vision_transformer import QAttention, QBlock, QVisionTransformer
from utils import UserError

__all__ = ['activation_qparams', 'calibrate_to_full_precision', 'compensate_rounding', 'fit_layer_norm', 'ridge_fit',
           'weight_scales']

# In units of the inputs' mean variance. With 64 images a ridge of 0.01 fits these alone: at 3 bits the network is
# right on 12 % of other images instead of 41 %.
RIDGE, DAMPING = 1., 0.1
SAMPLES = 2048  # values of a channel that its scale is fitted to
CONSTANT = 8.  # of `_prepare_irm`, in units of the root mean square of |q|


# --- scales -----------------------------------------------------------------------------------------------------------


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


def activation_qparams(x: Tensor, qn: int, qp: int, whole: bool = True) -> tuple[Tensor, Tensor]:
    """Step and zero point of least squared error of every row: a search over clipped ranges, then around the best.

    Args:
        x: (channels, values)
        whole: zero points are integers, as quantizers use them.

    Returns:
        (channels,) each.
    """
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    # A channel that hardly varies would get a scale far below its values, and a zero point beyond what float32 counts.
    least = x.abs().amax(1, keepdim=True).mul(1e-4).clamp_min(min_scale(x.dtype))
    shares = x.new_tensor([0.001, 0.02, 0.1, 0.9, 0.98, 0.999])
    tails = x.quantile(shares, dim=1)[..., None]  # (6, C, 1)
    best = _Best(x, qn, qp)
    for bottom in (low, *tails[:3]):
        for top in (high, *tails[3:]):
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


def _fit_activation(act: ActQ, x: Tensor, channel_axis: int = -1, shift: Tensor | None = None) -> Tensor:
    """Fits `act` to x, by at most SAMPLES values of each channel; returns x_hat.

    Args:
        shift: is filled with what the caller is to add to each channel of x, through the bias that x comes from; the
            returned x_hat is that of x + shift. Zero points are then effectively not whole. A grid that must contain 0
            has more error: 0.052 instead of 0.041 of the variance at 3 bits.
    """
    rows = x.movedim(channel_axis, 0).flatten(1)
    samples = SAMPLES if channel_axis == -1 else 16 * SAMPLES  # few channels of many values
    if act.alpha.numel() == 1:
        rows, samples = rows.reshape(1, -1), 64 * SAMPLES
    if not torch.isfinite(rows).all():
        raise ValueError('calibration met NaN or infinite values: check the images and the weights')
    signed = bool((rows.amin() < SIGNED_THRESHOLD).item())
    if rows.shape[1] > samples:
        drawn = torch.randint(rows.shape[1], (samples,), generator=torch.Generator().manual_seed(0))
        rows = rows[:, drawn.to(x.device)]
    scale, zero = activation_qparams(rows.contiguous(), *code_range(act.bits, signed), whole=shift is None)
    act.set_qparams(scale, zero.round(), signed)
    if shift is not None:
        shift.copy_((zero - zero.round()) * scale)
        x = x + shift.view(-1, *[1] * (x.ndim - 1 - channel_axis % x.ndim))
    return act(x)


# --- weights ----------------------------------------------------------------------------------------------------------


def ridge_fit(weight: Tensor, covariance: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """W that minimises E|W x - t|^2 + ridge * mean(E[x^2]) * |W - weight|^2, x and t without their means.

    Args:
        weight: (out, in)
        covariance: E[x x^T], (in, in)
        cross: E[t x^T], (out, in)
    """
    return weight + torch.linalg.solve(_damped(covariance, ridge), (cross - weight @ covariance).mT).mT


def _damped(covariance: Tensor, share: float) -> Tensor:
    """With `share` of the mean variance added to every variance."""
    added = share * covariance.diagonal().mean().clamp_min(torch.finfo(covariance.dtype).tiny ** 0.5)
    return covariance + added * torch.eye(len(covariance)).to(covariance)


def compensate_rounding(weight: Tensor, scale: Tensor, covariance: Tensor, qn: int, qp: int) -> Tensor:
    """Weights whose rounding to the grid nearly minimises E|(W_hat - W) x|^2 (GPTQ).

    Columns are rounded by falling E[x^2], the later ones adjusted to the errors so far.

    Args:
        weight: (out, in)
        scale: (out,)
        covariance: E[x x^T] with damping, positive definite, (in, in).

    Returns:
        (out, in), each value as it was when rounded.
    """
    order = covariance.diagonal().argsort(descending=True)
    rest, covariance = weight[:, order].clone(), covariance[order][:, order]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(covariance)), upper=True)
    for first in range(0, len(order), 64):  # the columns after these 64 are adjusted once for all of them
        last = min(first + 64, len(order))
        errors = torch.empty_like(rest[:, first:last])
        for i in range(first, last):
            column = rest[:, i]
            errors[:, i - first] = (column - (column / scale).clamp(qn, qp).round() * scale) / inverse[i, i]
            rest[:, i + 1:last] -= errors[:, i - first, None] * inverse[i, i + 1:last]
        rest[:, last:] -= errors @ inverse[first:last, last:]
    adjusted = torch.empty_like(rest)
    adjusted[:, order] = rest
    return adjusted


def _fit_linear(layer: LinearQ, x: Tensor, target: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
    """Fits the layer to `target` (..., out) for x (..., in), its input before quantization; returns its output.

    Args:
        norm: what x comes from; its bias is moved to where the codes fit best, which the layer's bias makes up for.
    """
    shift = None if norm is None else torch.zeros_like(layer.act.alpha)
    x_hat = _fit_activation(layer.act, x, shift=shift)
    if norm is not None:
        norm.bias.add_(shift)
    x_hat, target = (t.flatten(0, -2).double() for t in (x_hat, target))
    x_mean, target_mean = x_hat.mean(0), target.mean(0)
    x_hat = x_hat - x_mean
    covariance, cross = x_hat.mT @ x_hat / len(x_hat), (target - target_mean).mT @ x_hat / len(x_hat)
    weight = ridge_fit(layer.weight.double(), covariance, cross, RIDGE)
    importance = covariance.diagonal().clamp_min(1e-12 * covariance.diagonal().mean())
    layer.set_qparams(weight_scales(weight, *layer.code_range, importance))
    layer.weight.copy_(compensate_rounding(weight, layer.scale.double(), _damped(covariance, DAMPING),
                                           *layer.code_range))
    if layer.bias is not None:
        layer.bias.copy_(target_mean - layer.quantized_weight().double() @ x_mean)
    return layer.linear(x if shift is None else x + shift)


# --- IRM --------------------------------------------------------------------------------------------------------------


def fit_layer_norm(norm: nn.LayerNorm, x: Tensor, target: Tensor) -> None:
    """gamma and beta that bring norm(x) closest to the target, both (..., d), in squared error."""
    x = F.layer_norm(x.double(), norm.normalized_shape, eps=norm.eps).flatten(0, -2)
    target = target.double().flatten(0, -2)
    x_mean, target_mean = x.mean(0), target.mean(0)
    x, target = x - x_mean, target - target_mean
    gamma = (x * target).mean(0) / x.square().mean(0).clamp_min(1e-12)
    norm.weight.copy_(gamma)
    norm.bias.copy_(target_mean - gamma * x_mean)


def _is_identity(norm: nn.LayerNorm) -> bool:
    return bool(((norm.weight == 1).all() & (norm.bias == 0).all()).item())


def _prepare_irm(attn: QAttention, q: Tensor, k: Tensor) -> None:
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


def _heads(attn: QAttention, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3 H d) -> q, k, v, each (B, H, N, d)."""
    return qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind()


# --- networks ---------------------------------------------------------------------------------------------------------


def _full_precision(layer: LinearQ, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _fit_attention(block: QBlock, stream_full: Tensor, stream: Tensor, is_fitted: bool) -> tuple[Tensor, Tensor]:
    """Fits Q-Attention; returns the full-precision output and its own, each (B, N, dim).

    Args:
        stream_full, stream: the block's input in the full-precision and in the quantized network, (B, N, dim).
        is_fitted: whether the full-precision network contains IRM.
    """
    attn, x_full, x = block.attn, block.norm1(stream_full), block.norm1(stream)
    irm = isinstance(attn.norm_q, nn.LayerNorm)
    q, k, v = _heads(attn, _full_precision(attn.qkv, x_full))
    if is_fitted:
        q, k = attn.norm_q(q), attn.norm_k(k)
    out_full = _full_precision(attn.proj, F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    if irm and not is_fitted:
        _prepare_irm(attn, q, k)
        q, k, _ = _heads(attn, _full_precision(attn.qkv, x_full))
        q[..., -2:], k[..., -2:] = 0., 0.  # what gamma is to take out
    raw_q, raw_k, v = _heads(attn, _fit_linear(attn.qkv, x, _full_precision(attn.qkv, x_full), block.norm1))
    if irm:
        fit_layer_norm(attn.norm_q, raw_q, q)
        fit_layer_norm(attn.norm_k, raw_k, k)
    q, k = attn.norm_q(raw_q), attn.norm_k(raw_k)
    if attn.quantize_attn:
        q, k, v = _fit_activation(attn.q_act, q, 1), _fit_activation(attn.k_act, k, 1), _fit_values(attn, v)
        out = _fit_activation(attn.attn_act, (q @ k.mT * attn.scale).softmax(-1), 1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out_full, _fit_linear(attn.proj, out.transpose(1, 2).flatten(2), out_full + stream_full - stream)


def _fit_values(attn: QAttention, v: Tensor) -> Tensor:
    """v_hat of v without its mean, which each output of the attention would contain alike: `proj` adds it instead."""
    bias = attn.qkv.bias.view(3, attn.num_heads, attn.head_dim)[2]
    bias -= v.mean((0, 2))
    v, shift = v - v.mean((0, 2), keepdim=True), torch.zeros_like(attn.v_act.alpha)
    v_hat = _fit_activation(attn.v_act, v, 1, shift)
    bias += shift[:, None]
    return v_hat


def _fit_block(block: QBlock, x_full: Tensor, x: Tensor, is_fitted: bool) -> tuple[Tensor, Tensor]:
    """Fits a block on its inputs in both networks; returns its outputs in both, (B, N, dim) each."""
    out_full, out = _fit_attention(block, x_full, x, is_fitted)
    x_full, x = x_full + out_full, x + out
    mlp, hidden_full = block.mlp, _full_precision(block.mlp.fc1, block.norm2(x_full))
    out_full = _full_precision(mlp.fc2, clipped_gelu(hidden_full))
    hidden = clipped_gelu(_fit_linear(mlp.fc1, block.norm2(x), hidden_full, block.norm2))
    return x_full + out_full, x + _fit_linear(mlp.fc2, hidden, out_full + x_full - x)


def _fit_edge(layer: LinearQ | Conv2dQ, x: Tensor, channel_axis: int = -1) -> None:
    """Scales of least squared error for a layer of 8 bits, whose weights stay as they are."""
    _fit_activation(layer.act, x, channel_axis)
    layer.set_qparams(weight_scales(layer.weight.flatten(1), *layer.code_range))


def _embed(model: QVisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Fits the patch embedding; returns the tokens of the full-precision and of the quantized network."""
    conv = model.patch_embed.proj
    conv.forward = lambda x: nn.Conv2d.forward(conv, x)
    try:
        x_full = model._pos_embed(model.patch_embed(images))
    finally:
        del conv.forward
    _fit_edge(conv, images, 1)
    return x_full, model._pos_embed(model.patch_embed(images))


@torch.no_grad()
def calibrate_to_full_precision(model: QVisionTransformer, images: Tensor) -> None:
    """Quantizes a network that holds full-precision weights, which are adjusted to it.

    To be called before DistributedDataParallel, the optimizer and torch.compile. Under torch.distributed every rank
    calls it with as many images; parameters and images of rank 0 count, and all ranks end alike. The result follows
    from weights and images alone: no global random state is used.

    Where IRM is the identity that it starts from, the weights are taken to be of a network without it (a DeiT); else
    IRM is part of the network to come close to (weights of a quantized network with more bits).

    Args:
        model: the unwrapped network; keeps its mode.
        images: (B, 3, H, W), 64 or more.

    Raises:
        UserError: a network of another kind.
        ValueError: NaN or infinite values were met.
    """
    if not isinstance(model, QVisionTransformer):
        raise UserError(f'{type(model).__name__} is no quantized DeiT: use --calibration published')
    _broadcast(*model.parameters(), *model.buffers(), images)
    was_training = model.training
    model.eval()
    norms = [norm for block in model.blocks for norm in (block.attn.norm_q, block.attn.norm_k)]
    is_fitted = any(isinstance(norm, nn.LayerNorm) and not _is_identity(norm) for norm in norms)
    x_full, x = _embed(model, images)
    for block in model.blocks:
        x_full, x = _fit_block(block, x_full, x, is_fitted)
    x = model.norm(x)
    for token, head in enumerate((model.head, model.head_dist)):
        if isinstance(head, LinearQ):
            _fit_edge(head, x[:, token])
    _broadcast(*model.parameters(), *model.buffers())
    for _, quantizer in named_quantizers(model):
        quantizer.read_host_state()
    model.train(was_training)


def _broadcast(*tensors: Tensor) -> None:
    """Rank 0's values to all ranks."""
    if dist.is_available() and dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)
