"""Integer inference: a quantized network whose linear layers and attention multiply integer codes.

Every activation quantizer becomes a `Quantizer` with unsigned codes u = round(clamp(x / alpha + t, 0, levels)), where
t = z - qn is the code of 0, and levels = qp - qn. The LayerNorm, softmax or scaling before it is folded into its factor
and its shift. With x_hat = (u - t) alpha, a linear layer computes

    y_n = sum_k x_hat_k w_hat_nk + b_n = sum_k u_k alpha_k w_hat_nk + (b_n - sum_k t_k alpha_k w_hat_nk)

This is a product of u with integers where alpha does not depend on k (`act_granularity='tensor'`), and then it is
exact. Scales per input channel cannot leave the sum. They are folded into the weight, and alpha_k w_hat_nk is quantized
again: at 8 bits per output channel (`terms=1`), or as the sum of two 8-bit terms (`terms=2`, near 16 bits). The new
rounding error multiplies u - t, so an input of 0 adds no error.

Everything here is plain torch and runs on any device. In float64 it is exact up to the order of summation. `native.py`
runs the same network in fused kernels on a CPU.
"""
from __future__ import annotations

import copy
import functools
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from _quan_base import ActQ, Conv2dQ, LinearQ, is_calibrated, min_scale
from quant_vision_transformer import QAttention, QBlock, QVisionTransformer
from utils import UserError

__all__ = ['IntAttention', 'IntBlock', 'IntLinear', 'IntegerNetwork', 'IntegerViT', 'Quantizer', 'UnsignedCodes',
           'fold_weight', 'int_product']

WEIGHT_LIMIT = 127  # largest code of a weight that is quantized again


# --- activations ------------------------------------------------------------------------------------------------------


class UnsignedCodes(NamedTuple):
    """What the codes u in [0, levels] of an activation mean: x_hat = (u - zero) scale.

    Attributes:
        scale: float64 (channels,).
        zero: z - qn, the code of 0, whole numbers in float64 (channels,). It may lie outside [0, levels].
        levels: largest code, 2^bits - 1.
    """
    scale: Tensor
    zero: Tensor
    levels: int

    @classmethod
    def of(cls, act: ActQ, channels: int) -> UnsignedCodes:
        """Those of a quantizer, with an entry for each of its channels also where they all share one."""
        qn, qp = act.code_range
        scale, zero = act.scale.double(), act.whole_zero_point.double() - qn
        return cls(scale.expand(channels), zero.expand(channels), qp - qn)


class Quantizer(nn.Module):
    """An activation quantizer: x -> u = round(clamp(scale x + shift, 0, levels)), uint8.

    Attributes:
        scale, shift: 1 / alpha and z - qn, shaped to broadcast against x; with the affine part of a norm before it.
        levels: largest code, 2^bits - 1.
    """
    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, levels: int) -> None:
        super().__init__()
        self.register_buffer('scale', scale)
        self.register_buffer('shift', shift)
        self.levels = levels

    @classmethod
    def of(cls, act: ActQ, channels: int, norm: nn.Module | None = None) -> Quantizer:
        """Makes the quantizer of `act` for x of (..., channels).

        Args:
            norm: the LayerNorm before it, whose affine part it takes over; x is then the output of `F.layer_norm`.
        """
        scale, zero, levels = UnsignedCodes.of(act, channels)
        return cls(*_after(norm, 1 / scale, zero), levels)

    @classmethod
    def of_heads(cls, act: ActQ, heads: int, norm: nn.Module | None = None) -> Quantizer:
        """Makes the quantizer of q, k, v or attention, x of (B, heads, N, d); `norm` is over d, as in `of`."""
        scale, zero, levels = UnsignedCodes.of(act, heads)
        scale, zero = scale.view(-1, 1, 1), zero.view(-1, 1, 1)
        return cls(*_after(norm, 1 / scale, zero), levels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale).clamp_(0, self.levels).round_().to(torch.uint8)

    def extra_repr(self) -> str:
        return f'levels={self.levels}, scales={self.scale.numel()}'


def _after(norm: nn.Module | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Takes the affine part of a LayerNorm into the factor and the shift that follow it; without IRM there is none."""
    if norm is None or isinstance(norm, nn.Identity):
        return scale, shift
    return norm.weight.detach().double() * scale, norm.bias.detach().double() * scale + shift


# --- linear layers ----------------------------------------------------------------------------------------------------


def fold_weight(weight: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """Approximates `weight` by sum_t s_t R_t, with integers R_t and scales s_t.

    Args:
        weight: (N, K), float64.
        terms: 1, for an error of at most max|weight_n| / 254 in each entry of row n, or 2, for a 254th of that.

    Returns:
        int8 (terms, N, K) in [-127, 127], and float64 (terms, N).
    """
    scale = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / WEIGHT_LIMIT
    codes, scales, rest = [], [], weight
    for _ in range(terms):
        codes.append((rest / scale[:, None]).round_().clamp_(-WEIGHT_LIMIT, WEIGHT_LIMIT))
        scales.append(scale)
        rest = rest - codes[-1] * scale[:, None]
        scale = scale / (2 * WEIGHT_LIMIT)
    return torch.stack(codes).to(torch.int8), torch.stack(scales)


@functools.cache
def _cpu_has_int8() -> bool:
    """Whether torch._int_mm is exact here. Without VNNI, x86 may add pairs of products in 16 bits, which overflow."""
    largest = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.mT) == 64 * 127 ** 2).all())


def int_product(codes: Tensor, weight: Tensor, levels: int, dtype: torch.dtype, offset: Tensor | None = None) -> Tensor:
    """Computes sum_k codes_mk weight_nk - offset_n in integers, and returns it in `dtype`.

    The device's int8 x int8 -> int32 products compute it where it has them, and else float64, which holds every such
    sum exactly.

    Args:
        codes: uint8 (M, K), up to `levels`.
        weight: int8 (N, K).
        offset: int32 (N,).
    """
    offset = 0 if offset is None else offset
    if codes.is_cuda:  # torch._int_mm asks this of its shapes there
        by_int8 = len(codes) > 16 and codes.shape[1] % 8 == 0 and len(weight) % 8 == 0
    else:
        by_int8 = _cpu_has_int8()
    if dtype == torch.float64 or not by_int8:
        return (codes.double() @ weight.double().mT - offset).to(dtype)
    if levels <= 127:
        return (torch._int_mm(codes.view(torch.int8), weight.mT) - offset).to(dtype)
    shifted = codes.bitwise_xor(128).view(torch.int8)  # codes - 128
    return (torch._int_mm(shifted, weight.mT) + (128 * weight.sum(1, dtype=torch.int32) - offset)).to(dtype)


class IntLinear(nn.Module):
    """A linear layer of codes: uint8 (..., K) -> float (..., N), sum_t scale_t (codes weight_t^T - offset_t) + bias.

    Attributes:
        weight: int8 (terms, N, K).
        scale: (terms, N).
        offset: int32 (terms, N), sum_k t_k weight_tnk, where t_k is the input code of 0. It is subtracted in integers,
            because in float32 it would cost digits of the sum.
        bias: (N,).
        levels: largest input code.
        exact: whether the weight is that of the fake-quantized layer, and not quantized again.
        gain: float64 (N,), LayerScale, which `scale` and `bias` include; None without.

    Args:
        layer_scale: what multiplies the layer's output: a LayerScale, or an identity.

    Raises:
        UserError: zero points are too large for 32-bit sums.
    """
    weight: Tensor
    scale: Tensor
    offset: Tensor
    bias: Tensor

    def __init__(self, layer: LinearQ | Conv2dQ, terms: int, layer_scale: nn.Module | None = None) -> None:
        super().__init__()
        gamma = getattr(layer_scale, 'gamma', None)
        self.gain = None if gamma is None else gamma.detach().double().cpu()
        codes, out_scale = layer.to_int().flatten(1).cpu(), layer.scale.double().cpu()
        channels, inputs = layer.weight.shape[1], codes.shape[1]
        in_scale, zero, self.levels = UnsignedCodes.of(layer.act, channels)
        in_scale, zero = (value.cpu().repeat_interleave(inputs // channels) for value in (in_scale, zero))
        # A channel whose scale is the least that there is gives nothing: it asks for no scale of its own.
        used = in_scale > min_scale(layer.act.alpha.dtype)
        self.exact = bool((in_scale == in_scale.max())[used].all()) and layer.weight_bits <= 8
        if self.exact:
            weight, scale = (codes * used).to(torch.int8)[None], (out_scale * in_scale.max())[None]
        else:
            weight, scale = fold_weight(codes * in_scale, terms)
            scale = scale * out_scale
        offset = weight.double() @ zero
        if offset.abs().max() + inputs * self.levels * WEIGHT_LIMIT >= 2 ** 31:
            largest = layer.act.whole_zero_point.abs().max()
            raise UserError(f'zero points up to {largest:.0f} are too large for integer inference: evaluate this '
                            f'network in floating point')
        gain = 1. if self.gain is None else self.gain
        self.register_buffer('weight', weight)
        self.register_buffer('scale', scale * gain)
        self.register_buffer('offset', offset.to(torch.int32))
        bias = torch.zeros(len(codes)) if layer.bias is None else layer.bias.detach().cpu()
        self.register_buffer('bias', bias.double() * gain)

    @property
    def folded_bias(self) -> Tensor:
        """The bias with the zero points in it, float64 (N,): y is sum_t scale_t (codes weight_t^T) plus this."""
        return self.bias.double() - (self.scale.double() * self.offset).sum(0)

    def forward(self, codes: Tensor) -> Tensor:
        rows, dtype = codes.flatten(0, -2), self.scale.dtype
        out = self.bias
        for weight, scale, offset in zip(self.weight, self.scale, self.offset, strict=True):
            out = torch.addcmul(out, int_product(rows, weight, self.levels, dtype, offset), scale)
        return out.unflatten(0, codes.shape[:-1])

    def extra_repr(self) -> str:
        terms, outputs, inputs = self.weight.shape
        return f'{inputs}, {outputs}, terms={terms}, exact={self.exact}'


# --- the network ------------------------------------------------------------------------------------------------------


class IntAttention(nn.Module):
    """Q-Attention on codes: uint8 (B, N, dim), the codes of the qkv input -> float (B, N, dim).

    Scores and the product with v are sums of integers. Of (u_q - t_q)(u_k - t_k), summed over d, only u_q u_k and
    t_q u_k are computed, because what does not depend on the key leaves the softmax unchanged.
    """

    def __init__(self, attn: QAttention, terms: int, layer_scale: nn.Module | None = None) -> None:
        super().__init__()
        dim, heads = attn.num_heads * attn.head_dim, attn.num_heads
        self.num_heads, self.head_dim, self.scale = heads, attn.head_dim, attn.scale
        self.rectified, self.quantized = isinstance(attn.norm_q, nn.LayerNorm), attn.quantize_attn
        self.norm_eps = attn.norm_q.eps if self.rectified else 0.
        self.qkv, self.proj = IntLinear(attn.qkv, terms), IntLinear(attn.proj, terms, layer_scale)
        self.proj_in = Quantizer.of(attn.proj.act, dim)
        if not self.quantized:
            self.norm_q, self.norm_k = copy.deepcopy(attn.norm_q), copy.deepcopy(attn.norm_k)
            return
        self.q_quant = Quantizer.of_heads(attn.q_act, heads, attn.norm_q)
        self.k_quant = Quantizer.of_heads(attn.k_act, heads, attn.norm_k)
        self.v_quant = Quantizer.of_heads(attn.v_act, heads)
        self.attn_quant = Quantizer.of_heads(attn.attn_act, heads)
        q, k, v, a = (UnsignedCodes.of(act, heads) for act in (attn.q_act, attn.k_act, attn.v_act, attn.attn_act))
        for name, value in (('score_scale', q.scale * k.scale * attn.scale), ('q_zero', q.zero), ('v_zero', v.zero),
                            ('attn_zero', a.zero), ('out_scale', a.scale * v.scale)):
            self.register_buffer(name, value.reshape(-1, 1, 1))

    def forward(self, codes: Tensor) -> Tensor:
        qkv = self.qkv(codes).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()                        # (B, H, N, d) each
        x = self._on_codes(q, k, v) if self.quantized else self._attend(self.norm_q(q), self.norm_k(k), v)
        return self.proj(self.proj_in(x.transpose(1, 2).flatten(2)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention of what is not quantized."""
        return F.scaled_dot_product_attention(q, k, v)

    def _probabilities(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def _on_codes(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.rectified:
            q, k = (F.layer_norm(x, (self.head_dim,), eps=self.norm_eps) for x in (q, k))
        # The codes lie in a floating point type that holds sums of their products exactly.
        dtype, largest = q.dtype, self.q_quant.levels ** 2 * max(self.head_dim, v.shape[-2])
        exact = dtype if largest < 2 ** 24 else torch.float64
        q, k, v = (quant(x).to(exact) for quant, x in ((self.q_quant, q), (self.k_quant, k), (self.v_quant, v)))
        scores = (q @ k.mT - self.q_zero * k.sum(-1).unsqueeze(-2)) * self.score_scale
        attn = self.attn_quant(self._probabilities(scores.to(dtype))).to(exact)
        product = attn @ v - self.attn_zero * v.sum(-2, keepdim=True) - self.v_zero * attn.sum(-1, keepdim=True)
        return ((product + v.shape[-2] * self.attn_zero * self.v_zero) * self.out_scale).to(dtype)


class IntBlock(nn.Module):
    """A transformer block: float (B, N, dim) -> float (B, N, dim). The residual sums stay in floating point."""

    attention = IntAttention

    def __init__(self, block: QBlock, terms: int) -> None:
        super().__init__()
        dim, hidden = block.mlp.fc1.in_features, block.mlp.fc1.out_features
        self.dim, self.norm1_eps, self.norm2_eps = dim, block.norm1.eps, block.norm2.eps
        self.attn_in = Quantizer.of(block.attn.qkv.act, dim, block.norm1)
        self.attn = self.attention(block.attn, terms, block.ls1)
        self.fc1_in = Quantizer.of(block.mlp.fc1.act, dim, block.norm2)
        self.fc1 = IntLinear(block.mlp.fc1, terms)
        self.fc2_in = Quantizer.of(block.mlp.fc2.act, hidden)
        self.fc2 = IntLinear(block.mlp.fc2, terms, block.ls2)

    def attend(self, codes: Tensor) -> Tensor:
        """The attention of an image's tokens, uint8 (B, N, dim) -> float (B, N, dim)."""
        return self.attn(codes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.attn_in(F.layer_norm(x, (self.dim,), eps=self.norm1_eps)))
        hidden = F.gelu(self.fc1(self.fc1_in(F.layer_norm(x, (self.dim,), eps=self.norm2_eps))))
        return x + self.fc2(self.fc2_in(hidden.clamp_(-10., 10.)))


class IntegerNetwork(nn.Module):
    """What integer networks have in common: patches, and heads.

    Raises:
        UserError: see `IntegerViT`.
    """
    EDGE_TERMS = 2

    def __init__(self, model: nn.Module, terms: int) -> None:
        super().__init__()
        if terms not in (1, 2):
            raise UserError(f'{terms} terms of a folded weight: choose 1 or 2')
        if not is_calibrated(model):
            raise UserError('the network has no steps yet: take a trained or calibrated checkpoint')
        if model.num_classes == 0:
            raise UserError('the network has no heads (num_classes=0): integer inference ends in logits')
        proj = model.patch_embed.proj
        self.patch_size, self.input_size = proj.kernel_size, tuple(model.patch_embed.img_size)
        self.num_classes, pixels = model.num_classes, math.prod(self.patch_size)
        scale, zero, levels = UnsignedCodes.of(proj.act, proj.in_channels)
        self.patch_in = Quantizer((1 / scale).repeat_interleave(pixels), zero.repeat_interleave(pixels), levels)
        self.patch = IntLinear(proj, self.EDGE_TERMS)
        self.heads = nn.ModuleList(IntLinear(head, self.EDGE_TERMS) for head in model.heads)

    @property
    def exact(self) -> bool:
        """Whether no weight was quantized again: the logits are those of the fake-quantized network."""
        return all(layer.exact for layer in self.modules() if isinstance(layer, IntLinear))

    def embedded(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> the embedded patches, (B, patches, dim)."""
        h, w = self.patch_size
        patches = images.to(self.patch.scale.dtype).unflatten(3, (-1, w)).unflatten(2, (-1, h))  # (B, C, H', h, W', w)
        return self.patch(self.patch_in(patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)))


class IntegerViT(IntegerNetwork):
    """A calibrated `QVisionTransformer` in integer arithmetic: (B, C, H, W) -> logits (B, classes).

    Args:
        model: the fake-quantized network.
        terms: 8-bit terms of a folded weight in the blocks, 1 or 2. The patch embedding and the heads always have 2:
            they are a few per cent of the work, and their weights have 8 bits to begin with. Layers whose inputs have
            one scale per tensor need 1 and are exact.
        dtype: of everything that is not an integer; float64 for comparisons.

    Attributes:
        norm_pre: of the embeddings; an identity without.
        heads, heads_in: the classifiers, whose logits are averaged, and the quantizers of their inputs.
        tokens_of_heads: the tokens whose mean each of them reads.
        pools_first: whether the last norm follows that mean, not the other way round.

    Raises:
        UserError: the network is not calibrated, or has no heads.
    """

    def __init__(self, model: QVisionTransformer, terms: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(model, terms)
        dim = model.embed_dim
        self.pools_first = isinstance(model.norm, nn.Identity)
        norm = model.fc_norm if self.pools_first else model.norm
        self.dim, self.norm_eps = dim, norm.eps
        prefix, positions = model.constant_embeddings()
        self.register_buffer('prefix', prefix.double())                                 # (1, prefix tokens, dim)
        self.register_buffer('positions', positions.double())                           # (1, patches, dim)
        self.norm_pre = copy.deepcopy(model.norm_pre).requires_grad_(False)
        self.blocks = nn.Sequential(*[IntBlock(block, terms) for block in model.blocks])
        self.tokens_of_heads = model.tokens_of_heads
        self.heads_in = nn.ModuleList(Quantizer.of(head.act, dim, norm) for head in model.heads)
        self.to(model.pos_embed.device, dtype)
        self.eval()

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        x = torch.cat([self.prefix.expand(len(images), -1, -1), self.embedded(images) + self.positions], 1)
        x = self.blocks(self.norm_pre(x))
        logits = [head(quantizer(self._pooled(x[:, tokens.start:tokens.stop]))) for head, quantizer, tokens in
                  zip(self.heads, self.heads_in, self.tokens_of_heads, strict=True)]
        return sum(logits) / len(logits)

    def _pooled(self, x: Tensor) -> Tensor:
        """(B, tokens, dim) -> (B, dim), normalized but for the affine part, which the quantizer took over."""
        if self.pools_first:
            return F.layer_norm(x.mean(1), (self.dim,), eps=self.norm_eps)
        return F.layer_norm(x, (self.dim,), eps=self.norm_eps).mean(1)
