"""Calibration of a quantized network to the full-precision one whose weights it holds: closed forms, layer by layer.

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
    IRM           gamma and beta by least squares, see `calibration.irm`

The result is a network of the same form as ever: another calibration gives other values of the same parameters.
"""
from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from _quan_base import SIGNED_THRESHOLD, ActQ, Conv2dQ, LinearQ, code_range, named_quantizers
from calibration.full_precision import (
    FullPrecision,
    fold_layer_scale,
    full_precision,
    full_precision_attention,
    full_precision_merging,
    heads_of,
    join_windows,
    split_windows,
    transitions,
)
from calibration.irm import fit_layer_norm, prepare_irm
from calibration.scales import activation_qparams, weight_scales
from calibration.twins import halve_attention_to_twins
from ops import clipped_gelu
from quant_vision_transformer import QAttention, QBlock, QVisionTransformer
from utils import UserError, take_from_rank_0

__all__ = ['calibrate_to_full_precision', 'check_kind', 'choose_ridge', 'compensate_rounding',
           'fit_activation', 'fit_block', 'fit_embedding', 'fit_heads', 'fit_transition', 'ridge_fit', 'synchronize']

# Both in units of the inputs' mean variance. The ridge of a layer is the one whose fit to most of the images serves the
# others best. Few bits need little, for the weights to make up for rounding errors, but less than 1 fits 64 images
# alone; 8 bits need much, because there is nothing to make up for.
RIDGES = tuple(10 ** (power / 2) for power in range(9))
DAMPING = 0.1
SAMPLES = 2048  # values of a channel that its scale is fitted to
# And the smallest and the largest ones, so many of each, from FINE bits on: rare values can be most of the variance of
# a channel, but few codes serve the many values better.
EXTREMES, FINE = 32, 6


# --- activations ------------------------------------------------------------------------------------------------------


def fit_activation(act: ActQ, x: Tensor, channel_axis: int = -1, shift: Tensor | None = None) -> Tensor:
    """Fits `act` to x, by SAMPLES and EXTREMES of each channel where it has more; returns x_hat.

    Args:
        shift: is filled with what the caller is to add to each channel of x, through the bias that x comes from; the
            returned x_hat is that of x + shift. Zero points are then effectively not whole. A grid that must contain 0
            has more error: 0.052 instead of 0.041 of the variance at 3 bits.
    """
    rows = x.movedim(channel_axis, 0).flatten(1)
    samples = SAMPLES if channel_axis == -1 else 16 * SAMPLES  # few channels of many values
    if act.alpha.numel() == 1:
        samples = 64 * SAMPLES // len(rows)
    if not torch.isfinite(rows).all():
        raise ValueError('calibration met NaN or infinite values: check the images and the weights')
    signed = bool((rows.amin() < SIGNED_THRESHOLD).item())
    rows, importance = _samples(rows, samples, EXTREMES if act.bits >= FINE else 0)
    if act.alpha.numel() == 1:
        rows, importance = rows.reshape(1, -1), importance.reshape(1, -1)
    scale, zero = activation_qparams(rows, *code_range(act.bits, signed), whole=shift is None, importance=importance)
    act.set_qparams(scale, zero.round(), signed)
    if shift is not None:
        shift.copy_((zero - zero.round()) * scale)
        x = x + shift.view(-1, *[1] * (x.ndim - 1 - channel_axis % x.ndim))
    return act(x)


def _samples(rows: Tensor, samples: int, extremes: int) -> tuple[Tensor, Tensor]:
    """Values of each channel, drawn and extreme, that stand for all of them, and how many each stands for.

    Args:
        rows: (channels, values)
        samples: how many to draw of each channel.
        extremes: how many of the largest and of the smallest to add.

    Returns:
        (channels, fewer) each; all, once each, where there are no more than that.
    """
    count = rows.shape[1]
    if count <= samples:
        return rows.contiguous(), torch.ones_like(rows)
    drawn = rows[:, torch.randint(count, (samples,), generator=torch.Generator().manual_seed(0)).to(rows.device)]
    rare = torch.cat([rows.topk(extremes, dim=1, largest=largest).values for largest in (True, False)], 1)
    return torch.cat([drawn, rare], 1), torch.cat([torch.full_like(drawn, count / samples), torch.ones_like(rare)], 1)


# --- weights ----------------------------------------------------------------------------------------------------------


def ridge_fit(weight: Tensor, covariance: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """W that minimises E|W x - t|^2 + ridge * mean(E[x^2]) * |W - weight|^2, x and t without their means.

    Args:
        weight: (out, in)
        covariance: E[x x^T], (in, in)
        cross: E[t x^T], (out, in)
    """
    return weight + torch.linalg.solve(_damped(covariance, ridge), (cross - weight @ covariance).mT).mT


def choose_ridge(weight: Tensor, x: Tensor, target: Tensor) -> float:
    """The one of RIDGES whose fit to three quarters of the images comes closest to the target on the others.

    Args:
        weight: (out, in)
        x, target: (images, N, in) and (images, N, out)
    """
    split = len(x) - max(1, len(x) // 4)
    means, (covariance, cross) = _moments(x[:split], target[:split])
    _, (held_out_covariance, held_out_cross) = _moments(x[split:], target[split:], means)
    variances, directions = torch.linalg.eigh(covariance)
    # `ridge_fit` for every ridge, in the directions in which the covariance is diagonal.
    change = (cross - weight @ covariance) @ directions
    left = (held_out_cross - weight @ held_out_covariance) @ directions
    turned = directions.mT @ held_out_covariance @ directions

    def error(ridge: float) -> float:  # on the held-out images, less that of the weights as they are
        step = change / (variances + ridge * variances.mean())
        return ((step @ turned - 2 * left) * step).sum().item()

    return min(RIDGES, key=error)


Pair = tuple[Tensor, Tensor]


def _moments(x: Tensor, target: Tensor, means: Pair | None = None) -> tuple[Pair, Pair]:
    """(E[x], E[t]) and (E[x x^T], E[t x^T]), the latter of what differs from `means` where given, else from the former.

    Args:
        x, target: (images, N, in) and (images, N, out)
    """
    x, target = x.flatten(0, -2), target.flatten(0, -2)
    x_mean, target_mean = means or (x.mean(0), target.mean(0))
    x, target = x - x_mean, target - target_mean
    return (x_mean, target_mean), (x.mT @ x / len(x), target.mT @ x / len(x))


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
    """Fits the layer to `target` (B, N, out) for x (B, N, in), its input before quantization; returns its output.

    Args:
        norm: what x comes from; its bias is moved to where the codes fit best, which the layer's bias makes up for.
    """
    shift = None if norm is None else torch.zeros_like(layer.act.alpha)
    x_hat = fit_activation(layer.act, x, shift=shift)
    if norm is not None:
        norm.bias.add_(shift)
    weight, x_hat, target = layer.weight.double(), x_hat.double(), target.double()
    ridge = choose_ridge(weight, x_hat, target)
    (x_mean, target_mean), (covariance, cross) = _moments(x_hat, target)
    weight = ridge_fit(weight, covariance, cross, ridge)
    importance = covariance.diagonal().clamp_min(1e-12 * covariance.diagonal().mean())
    layer.set_qparams(weight_scales(weight, *layer.code_range, importance))
    layer.weight.copy_(compensate_rounding(weight, layer.scale.double(), _damped(covariance, DAMPING),
                                           *layer.code_range))
    if layer.bias is not None:
        layer.bias.copy_(target_mean - layer.quantized_weight().double() @ x_mean)
    return layer.linear(x if shift is None else x + shift)


# --- networks ---------------------------------------------------------------------------------------------------------


def _fit_attention(block: QBlock, stream_full: Tensor, stream: Tensor, has_irm: bool) -> tuple[Tensor, Tensor]:
    """Fits Q-Attention; returns the full-precision output and its own, each (B, N, dim).

    Args:
        stream_full, stream: the block's input in the full-precision and in the quantized network, (B, N, dim).
        has_irm: whether the full-precision network contains IRM.
    """
    attn, x_full, x = (block.attn, split_windows(block, block.norm1(stream_full)),
                       split_windows(block, block.norm1(stream)))
    if attn.quantize_attn:
        _spread_values_alike(attn, x_full)
    irm = isinstance(attn.norm_q, nn.LayerNorm)
    out_full, q, k = full_precision_attention(attn, x_full, has_irm)
    if irm and not has_irm:
        prepare_irm(attn, q, k)
        q, k, _ = heads_of(attn, full_precision(attn.qkv, x_full))
        q[..., -2:], k[..., -2:] = 0., 0.  # what gamma is to take out
    raw_q, raw_k, v = heads_of(attn, _fit_linear(attn.qkv, x, full_precision(attn.qkv, x_full), block.norm1))
    if irm:
        fit_layer_norm(attn.norm_q, raw_q, q)
        fit_layer_norm(attn.norm_k, raw_k, k)
    q, k = attn.norm_q(raw_q), attn.norm_k(raw_k)
    if attn.quantize_attn:
        q, k, v = fit_activation(attn.q_act, q, 1), fit_activation(attn.k_act, k, 1), _fit_values(attn, v)
        out = fit_activation(attn.attn_act, attn.probabilities(q, k), 1) @ v
    else:
        out = attn.attend(q, k, v)
    target = out_full + split_windows(block, stream_full) - split_windows(block, stream)
    out = _fit_linear(attn.proj, out.transpose(1, 2).flatten(2), target)
    return join_windows(block, out_full), join_windows(block, out)


def _spread_values_alike(attn: QAttention, x: Tensor) -> None:
    """Gives the channels of v in a head the same deviation, so that one scale serves all; `proj` takes them back.

    Args:
        x: the input of the attention in full precision, (B, N, dim) or windows of it.
    """
    values = slice(2 * attn.num_heads * attn.head_dim, None)
    deviation = (x @ attn.qkv.weight[values].mT).flatten(0, 1).std(0).view(attn.num_heads, -1)
    spread = (deviation / deviation.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)).clamp_min(1e-3).flatten()
    attn.qkv.weight[values] /= spread[:, None]
    attn.qkv.bias[values] /= spread
    attn.proj.weight *= spread


def _fit_values(attn: QAttention, v: Tensor) -> Tensor:
    """v_hat of v without its mean, which each output of the attention would contain alike: `proj` adds it instead."""
    bias = attn.qkv.bias.view(3, attn.num_heads, attn.head_dim)[2]
    bias -= v.mean((0, 2))
    v, shift = v - v.mean((0, 2), keepdim=True), torch.zeros_like(attn.v_act.alpha)
    v_hat = fit_activation(attn.v_act, v, 1, shift)
    bias += shift[:, None]
    return v_hat


def fit_block(block: QBlock, x_full: Tensor, x: Tensor, has_irm: bool) -> tuple[Tensor, Tensor]:
    """Fits a block on its inputs in both networks; returns its outputs in both, (B, N, dim) each."""
    fold_layer_scale(block)
    out_full, out = _fit_attention(block, x_full, x, has_irm)
    x_full, x = x_full + out_full, x + out
    mlp, hidden_full = block.mlp, full_precision(block.mlp.fc1, block.norm2(x_full))
    out_full = full_precision(mlp.fc2, clipped_gelu(hidden_full))
    hidden = clipped_gelu(_fit_linear(mlp.fc1, block.norm2(x), hidden_full, block.norm2))
    return x_full + out_full, x + _fit_linear(mlp.fc2, hidden, out_full + x_full - x)


@torch.no_grad()
def fit_transition(merging: nn.Module, x_full: Tensor, x: Tensor) -> None:
    """Fits patch merging on its inputs in both networks, (B, N, dim) each."""
    _fit_linear(merging.reduction, merging.norm(merging.neighbours(x)), full_precision_merging(merging, x_full))


def _fit_edge(layer: LinearQ | Conv2dQ, x: Tensor, channel_axis: int = -1) -> None:
    """Scales of least squared error for a layer of 8 bits, whose weights stay as they are."""
    fit_activation(layer.act, x, channel_axis)
    layer.set_qparams(weight_scales(layer.weight.flatten(1), *layer.code_range))


@torch.no_grad()
def fit_embedding(model: QVisionTransformer, images: Tensor) -> None:
    """Scales for the patch embedding, whose weights stay as they are."""
    _fit_edge(model.patch_embed.proj, images, 1)


@torch.no_grad()
def fit_heads(model: QVisionTransformer, x: Tensor) -> None:
    """Scales for the heads, whose weights stay as they are. x: the last block's output, (B, N, dim)."""
    for head, given in zip(model.heads, model.head_inputs(model.norm(x)), strict=True):
        if isinstance(head, LinearQ):
            _fit_edge(head, given)


def check_kind(model: nn.Module) -> None:
    """Refuses networks that have no full-precision network behind them."""
    if not hasattr(model, 'head_inputs'):
        raise UserError(f'{type(model).__name__} is no quantized vision transformer: use --calibration published')
    if any(block.attn.qkv.bias is None for block in model.blocks):
        raise UserError('qkv_bias=False: the fits move part of q, k and v into a bias, use --calibration published')


@torch.no_grad()
def calibrate_to_full_precision(model: QVisionTransformer, images: Tensor) -> None:
    """Quantizes a network that holds full-precision weights, which are adjusted to it.

    To be called before DistributedDataParallel, the optimizer and torch.compile. Under torch.distributed every rank
    calls it with as many images; parameters and images of rank 0 count, and all ranks end alike. The result follows
    from weights and images alone: no global random state is used. What the full-precision network is, see
    `FullPrecision`.

    Args:
        model: the unwrapped network; keeps its mode.
        images: (B, 3, H, W), 64 or more.

    Raises:
        UserError: a network of another kind.
        ValueError: NaN or infinite values were met.
    """
    check_kind(model)
    synchronize(model, images)
    was_training = model.training
    model.eval()
    halve_attention_to_twins(model, images)
    full = FullPrecision(model)
    fit_embedding(model, images)
    x_full, x = full.embed(images), model.embed(images)
    merging = transitions(model)
    for index, block in enumerate(model.blocks):
        if index in merging:
            fit_transition(merging[index], x_full, x)
            x_full, x = full.transition(index, x_full), merging[index](x)
        x_full, x = fit_block(block, x_full, x, full.has_irm)
    fit_heads(model, x)
    synchronize(model)
    model.train(was_training)


def synchronize(model: nn.Module, *others: Tensor) -> None:
    """Gives the network, and other tensors, the values that they have on rank 0."""
    take_from_rank_0(*model.parameters(), *model.buffers(), *others)
    for _, quantizer in named_quantizers(model):
        quantizer.read_host_state()
