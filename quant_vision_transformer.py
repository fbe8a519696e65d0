"""The fully quantized vision transformers of Q-ViT (Li et al., NeurIPS 2022, arXiv 2210.06707), registered with timm.

They are timm's, the distilled DeiT of the paper with two tokens and heads and the ViT with one head, with a quantized
patch embedding, quantized blocks and quantized heads. A block:

    Q-Attention   q, k, v = LinearQ(x) per head; q~ = LN(q), k~ = LN(k) (IRM);
                  A = softmax(q~_hat k~_hat^T / sqrt(d)); LinearQ(A_hat v_hat)
    Q-MLP         LinearQ(clip(GELU(LinearQ(x)), -10, 10))

IRM shifts and scales q and k so that their codes carry the most information: a LayerNorm of the head dimension, shared
by the heads, whose affine parameters are learned. LayerNorms, LayerScale, softmax, GELU, residual sums, embeddings and
biases stay in full precision; the patch embedding and the heads have 8 bits whatever the bits of the blocks.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, PatchEmbed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import LayerScale, VisionTransformer
from torch import Tensor

import ops
from _quan_base import ActQ, Conv2dQ, GeluLinearQ, LinearQ
from checkpoints.full_precision import adapt_full_precision
from checkpoints.states import is_quantizer_entry
from models import BlockOutputs, QuantizedNetwork, take_fixed_options

__all__ = ['QAttention', 'QBlock', 'QMlp', 'QPatchEmbed', 'QVisionTransformer', 'QVisionTransformerDistilled',
           'QuantConfig']  # and every variant

EDGE_BITS = 8  # patch embedding and heads
POOLINGS = ('token', 'avg')
FIXED_OPTIONS = {  # of timm's VisionTransformer, with the only value that these networks have
    'act_layer': None, 'attn_layer': None, 'block_fn': None, 'embed_layer': None, 'embed_norm_layer': None,
    'final_norm': True, 'mlp_layer': None, 'pos_embed': 'learn', 'proj_bias': True, 'qk_norm': False,
    'scale_attn_norm': False, 'scale_mlp_norm': False}
FIXED_IF_DISTILLED = {'class_token': True, 'fc_norm': False, 'global_pool': 'token', 'init_values': None,
                      'no_embed_class': False, 'pre_norm': False, 'reg_tokens': 0}
QK = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class QuantConfig:
    """What is quantized, and how.

    Attributes:
        weight_bits, act_bits: bits of the blocks' weights and activations.
        act_granularity: 'channel' (published), or 'tensor': one scale and zero point per activation tensor.
        irm: whether q and k pass through the information rectification module.
        quantize_attn: whether q, k, v and the attention probabilities are quantized.
    """
    weight_bits: int
    act_bits: int
    act_granularity: str = 'channel'
    irm: bool = True
    quantize_attn: bool = True

    def __post_init__(self) -> None:
        for name in ('weight_bits', 'act_bits'):
            bits = getattr(self, name)
            if type(bits) is not int or not 2 <= bits <= 8:
                raise ValueError(f'{name}={bits!r}: choose a whole number from 2 to 8')
        for name in ('irm', 'quantize_attn'):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f'{name}={getattr(self, name)!r}: choose True or False')

    def layer(self, bits: int | None = None) -> dict:
        """Keyword arguments of a quantized layer, with `bits` instead of the blocks' where given."""
        return {'weight_bits': bits or self.weight_bits, 'act_bits': bits or self.act_bits,
                'act_granularity': self.act_granularity}


class QAttention(nn.Module):
    """Q-Attention: (B, N, dim) -> (B, N, dim)."""

    implementation = 'torch'  # of `ops`, which computes the attention of codes: set by `ops.use`

    def __init__(self, dim: int, num_heads: int, quant: QuantConfig, qkv_bias: bool = True, attn_drop: float = 0.,
                 proj_drop: float = 0., device=None, dtype=None) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f'embed_dim {dim} is not a multiple of num_heads {num_heads}')
        dd = {'device': device, 'dtype': dtype}
        self.num_heads, self.head_dim, self.scale = num_heads, dim // num_heads, (dim // num_heads) ** -0.5
        self.quantize_attn = quant.quantize_attn
        self.norm_q = nn.LayerNorm(self.head_dim, **dd) if quant.irm else nn.Identity()
        self.norm_k = nn.LayerNorm(self.head_dim, **dd) if quant.irm else nn.Identity()
        self.qkv = LinearQ(dim, 3 * dim, bias=qkv_bias, **dd, **quant.layer())
        self.attn_drop = attn_drop
        self.proj = LinearQ(dim, dim, **dd, **quant.layer())
        self.proj_drop = nn.Dropout(proj_drop)
        if quant.quantize_attn:
            for name in ('q_act', 'k_act', 'v_act', 'attn_act'):
                setattr(self, name, ActQ(num_heads, quant.act_bits, quant.act_granularity, **dd))

    def forward(self, x: Tensor) -> tuple[Tensor, QK]:
        """Returns the output and (q~, k~), each (B, H, N, d): rectified, not yet quantized, for DGD."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))  # (B, N, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()                        # (B, H, N, d) each
        q, k = self.norm_q(q), self.norm_k(k)
        x = self._quantized_attention(q, k, v) if self.quantize_attn else self.attend(q, k, v)  # (B, H, N, d)
        x = x.transpose(1, 2).flatten(2)                                     # (B, N, dim)
        return self.proj_drop(self.proj(x)), (q, k)

    def probabilities(self, q: Tensor, k: Tensor) -> Tensor:
        """The attention of q and k as they are, before its quantization: (B, H, N, N)."""
        return (q @ k.mT * self.scale).softmax(dim=-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention of q and k, times v, none of them quantized: (B, H, N, d)."""
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.)

    def _quantized_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = None
        if self.training and self.attn_drop > 0:
            dropout = F.dropout(q.new_ones(*q.shape[:-1], q.shape[-2]), self.attn_drop)
        if self.attn_act.pending:  # it needs its first input, which no product gives away
            with torch.no_grad():  # nothing is kept, so that a checkpointed block can be computed again without this
                attn = self.probabilities(self.q_act(q), self.k_act(k))
                self.attn_act.qparams(attn if dropout is None else attn * dropout)
        quantizers = self.q_act.qparams(q), self.k_act.qparams(k), self.v_act.qparams(v), self.attn_act.qparams(q)
        return ops.get(self.implementation).attention(q, k, v, quantizers, self.scale, dropout)


class QMlp(nn.Module):
    """Q-MLP: (B, N, dim) -> (B, N, dim). `fc2` computes the GELU of its input itself."""

    def __init__(self, dim: int, hidden_dim: int, quant: QuantConfig, drop: float = 0.,
                 device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.fc1 = LinearQ(dim, hidden_dim, **dd, **quant.layer())
        self.fc2 = GeluLinearQ(hidden_dim, dim, drop=drop, **dd, **quant.layer())
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.fc1(x)))


class QBlock(nn.Module):
    """Pre-norm transformer block of Q-Attention and Q-MLP: (B, N, dim) -> (B, N, dim)."""

    def __init__(self, dim: int, num_heads: int, quant: QuantConfig, mlp_ratio: float = 4., qkv_bias: bool = True,
                 proj_drop: float = 0., attn_drop: float = 0., drop_path: float = 0.,
                 norm_layer: type[nn.Module] = nn.LayerNorm, init_values: float | None = None, device=None, dtype=None,
                 **timm_options) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = norm_layer(dim, **dd)
        if not isinstance(self.norm1, nn.LayerNorm):
            raise ValueError(f'norm_layer {type(self.norm1).__name__} is not an option of the quantized network: '
                             'choose LayerNorm')
        self.attn = QAttention(dim, num_heads, quant, qkv_bias, attn_drop, proj_drop, **dd)
        self.ls1 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = QMlp(dim, int(dim * mlp_ratio), quant, proj_drop, **dd)
        self.ls2 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()

    def forward(self, x: Tensor, return_qk: bool = False) -> Tensor | tuple[Tensor, QK]:
        """Returns x, or (x, (q~, k~)) of the attention."""
        attended, qk = self.attn(self.norm1(x))
        x = x + self.drop_path(self.ls1(attended))
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return (x, qk) if return_qk else x


class QPatchEmbed(PatchEmbed):
    """timm's patch embedding with an 8-bit projection of 8-bit pixels: (B, C, H, W) -> (B, patches, dim)."""

    def __init__(self, *args, quant: QuantConfig, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        conv = self.proj
        if self.img_size is not None and not self.dynamic_img_pad and any(
                size % patch for size, patch in zip(self.img_size, self.patch_size, strict=True)):
            raise ValueError(f'patch_size {self.patch_size} does not divide the image size {self.img_size}')
        self.proj = Conv2dQ(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
                            bias=conv.bias is not None, device=conv.weight.device, dtype=conv.weight.dtype,
                            **quant.layer(EDGE_BITS))

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        if patch_size is not None and timm.layers.to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f'patch_size {patch_size}: a quantized patch embedding keeps its {self.patch_size}')
        super().set_input_size(img_size=img_size)


class QVisionTransformer(QuantizedNetwork, VisionTransformer):
    """Fully quantized ViT with one head, on the class token or on the mean of the patch tokens.

    What else reads it asks for the members that docs/architecture.md lists.

    Args:
        weight_bits, act_bits, act_granularity, irm, quantize_attn: see `QuantConfig`.
        **kwargs: arguments of timm's VisionTransformer, as num_classes, img_size, drop_path_rate, init_values
            (LayerScale), reg_tokens, global_pool.

    Attributes:
        quant: what is quantized, and how.
        has_twin_tokens: the distillation token is a copy of the class token, from weights that have none; calibration
            then makes it one that changes nothing.
    """
    fixed_options = FIXED_OPTIONS
    has_twin_tokens = False

    def __init__(self, *args, weight_bits: int, act_bits: int, act_granularity: str = 'channel', irm: bool = True,
                 quantize_attn: bool = True, **kwargs) -> None:
        take_fixed_options(kwargs, self.fixed_options)
        quant = QuantConfig(weight_bits, act_bits, act_granularity, irm, quantize_attn)
        _check_pooling(kwargs.get('global_pool', 'token'), kwargs.get('class_token', True),
                       kwargs.get('num_classes', 1000))
        super().__init__(*args, block_fn=partial(QBlock, quant=quant),
                         embed_layer=partial(QPatchEmbed, quant=quant), **kwargs)
        self.quant = quant
        self.reset_classifier(self.num_classes)

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        """The classifiers, whose logits are averaged; identities without classes."""
        return self.head,

    def head_inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """Tokens after the last norm, (B, N, dim) -> what each of the heads is given, (B, dim)."""
        return self.fc_norm(self.pool(x)),

    @property
    def tokens_of_heads(self) -> tuple[range, ...]:
        """The tokens whose mean each of the heads reads."""
        if self.global_pool == 'token':
            return range(1),
        prefix = self.num_prefix_tokens
        return range(0 if self.pool_include_prefix else prefix, prefix + self.patch_embed.num_patches),

    @torch.no_grad()
    def constant_embeddings(self) -> tuple[Tensor, Tensor]:
        """What `embed` adds whatever the image: the prefix tokens with their positions, and the positions of patches.

        Returns:
            (1, prefix tokens, dim) and (1, patches, dim), before a norm of the embeddings; no dropout may be active.
        """
        rows, columns = self.patch_embed.grid_size
        places = (rows, columns) if self.dynamic_img_size else (rows * columns,)
        embedded = self._pos_embed(self.pos_embed.new_zeros(1, *places, self.embed_dim))
        prefix, positions = embedded.tensor_split([self.num_prefix_tokens], dim=1)
        return prefix, positions

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes` classes, 8 bits as before and not calibrated; none for 0."""
        _check_pooling(self.global_pool if global_pool is None else global_pool, self.has_class_token, num_classes)
        super().reset_classifier(num_classes, global_pool)
        self.head = self._new_head()

    def _new_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        like = self.pos_embed
        head = LinearQ(self.embed_dim, self.num_classes, device=like.device, dtype=like.dtype,
                       **self.quant.layer(EDGE_BITS))
        trunc_normal_(head.weight, std=.02)
        nn.init.zeros_(head.bias)
        return head.train(self.training)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Embeddings, and the scales and zero points of every quantizer."""
        return super().no_weight_decay() | set(filter(is_quantizer_entry, dict(self.named_parameters())))

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the first block's input, (B, N, dim)."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))

    def forward_features(self, x: Tensor, return_blocks: bool = False) -> Tensor | tuple[Tensor, list[BlockOutputs]]:
        """(B, C, H, W) -> (B, N, dim), tokens after the last norm; on request with the outputs of every block."""
        x = self.embed(x)
        outputs = []
        for block in self.blocks:
            x, qk = self.run_block(block, x, self.grad_checkpointing)
            if return_blocks:
                outputs.append(BlockOutputs(x, *qk))
        x = self.norm(x)
        return (x, outputs) if return_blocks else x


def _check_pooling(global_pool: str, has_class_token: bool, num_classes: int) -> None:
    if global_pool == '' and num_classes == 0:  # all tokens, for other heads than these
        return
    if global_pool not in POOLINGS or global_pool == 'token' and not has_class_token:
        raise ValueError(f"global_pool={global_pool!r} with class_token={has_class_token} is not an option of the "
                         "quantized network: choose 'token' with a class token, or 'avg'")


class QVisionTransformerDistilled(QVisionTransformer, VisionTransformerDistilled):
    """Fully quantized DeiT with a class and a distillation token, each with its head.

    In training it returns (logits, distillation logits), each (B, num_classes), in evaluation their mean.
    `set_distilled_training(False)` makes it return the mean in training too.

    Args:
        *args, **kwargs: see `QVisionTransformer`.
    """
    fixed_options = FIXED_OPTIONS | FIXED_IF_DISTILLED

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.patch_drop.num_prefix_tokens = self.num_prefix_tokens  # timm's would drop the distillation token, too
        self.distilled_training = True

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        return self.head, self.head_dist

    def head_inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        return x[:, 0], x[:, 1]

    @property
    def tokens_of_heads(self) -> tuple[range, ...]:
        return range(1), range(1, 2)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for `num_classes` classes, 8 bits as before and not calibrated; none for 0."""
        if global_pool not in (None, '', 'token'):
            raise ValueError(f"global_pool '{global_pool}': the heads read the class and the distillation token")
        self.num_classes = num_classes
        self.head, self.head_dist = self._new_head(), self._new_head()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """(B, N, dim) -> logits, a pair of them in distilled training; with dropout, unlike older timm's."""
        x, x_dist = (self.head_drop(token) for token in self.head_inputs(x))
        if not pre_logits:
            x, x_dist = self.head(x), self.head_dist(x_dist)
            if self.distilled_training and self.training:
                return x, x_dist
        return (x + x_dist) / 2


# --- the registered variants ------------------------------------------------------------------------------------------

BITS = {'twobits': 2, 'threebits': 3, 'fourbits': 4}
SIZES = {  # name: (width, heads); depth 12, MLP ratio 4
    'tiny': (192, 3),
    'small': (384, 6),
    'base': (768, 12),
}
FAMILIES = {  # name: (the network, the full-precision one of timm's that `pretrained=True` starts from)
    'deit': (QVisionTransformerDistilled, 'deit_{}_distilled_patch16_224'),
    'vit': (QVisionTransformer, 'deit_{}_patch16_224'),
}


def _full_precision_cfg(family: str, size: str) -> dict:
    """timm's description of the full-precision network that `pretrained=True` starts from."""
    known = timm.get_pretrained_cfg(FAMILIES[family][1].format(size))
    return known.to_dict() if known is not None else {}  # timm has no DeiT of other sizes


default_cfgs = generate_default_cfgs({
    f'{bits}_{family}_{size}_patch16_224.full_precision_in1k': _full_precision_cfg(family, size)
    for family in FAMILIES for bits in BITS for size in SIZES})


def _register_variant(bits_name: str, family: str, size: str) -> None:
    name, bits, (width, heads) = f'{bits_name}_{family}_{size}_patch16_224', BITS[bits_name], SIZES[size]
    network = FAMILIES[family][0]

    def variant(pretrained: bool = False, **kwargs) -> QVisionTransformer:
        defaults = {'patch_size': 16, 'embed_dim': width, 'depth': 12, 'num_heads': heads,
                    'weight_bits': bits, 'act_bits': bits}
        return build_model_with_cfg(
            network, name, pretrained, pretrained_filter_fn=adapt_full_precision,
            feature_cfg={'out_indices': kwargs.pop('out_indices', 3), 'feature_cls': 'getter'}, **(defaults | kwargs))

    variant.__name__ = variant.__qualname__ = name
    title = f'{"DeiT" if family == "deit" else "ViT"}-{size.capitalize()}'
    variant.__doc__ = (f'{bits}-bit {title} at 224 px (keyword arguments: `{network.__name__}`); '
                       f'pretrained=True starts from full precision and is to be calibrated.')
    globals()[name] = register_model(variant)


for _family in FAMILIES:
    for _bits in BITS:
        for _size in SIZES:
            _register_variant(_bits, _family, _size)
