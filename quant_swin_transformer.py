"""Fully quantized Swin transformers by the quantizer of Q-ViT, registered with timm.

They are timm's, with a quantized patch embedding, quantized blocks and patch merging, and a quantized head. A block:

    Q-Attention   as in `quant_vision_transformer.py`, within windows, with a relative position bias:
                  A = softmax(q~_hat k~_hat^T / sqrt(d) + bias), and A_hat v_hat
    Q-MLP         the same
    patch merging LinearQ(LayerNorm(4 neighbours)), with the bits of the blocks

The position biases and the masks of shifted windows stay in full precision, like everything else that does in the ViT.
"""
from __future__ import annotations

from functools import partial
from typing import NamedTuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
    window_partition,
    window_reverse,
)
from torch import Tensor

from _quan_base import LinearQ
from checkpoints.full_precision import adapt_full_precision
from checkpoints.states import is_quantizer_entry
from models import BlockOutputs, QuantizedNetwork, take_fixed_options
from quant_vision_transformer import BITS, EDGE_BITS, QK, QAttention, QMlp, QPatchEmbed, QuantConfig

__all__ = ['QPatchMerging', 'QSwinBlock', 'QSwinTransformer', 'QWindowAttention', 'Windows', 'neighbours',
           'with_bias']  # and every variant

FIXED_OPTIONS = {  # of timm's SwinTransformer, with the only value that these networks have
    'dynamic_img_size': False, 'embed_layer': None, 'head_dim': None, 'norm_layer': None, 'strict_img_size': True}


def _quantized(layer: nn.Linear, quant: QuantConfig, bits: int | None = None) -> LinearQ:
    """A quantized layer with the parameters of this one."""
    made = LinearQ(layer.in_features, layer.out_features, layer.bias is not None, layer.weight.device,
                   layer.weight.dtype, **quant.layer(bits))
    made.weight, made.bias = layer.weight, layer.bias
    return made.train(layer.training)


class QWindowAttention(QAttention):
    """Q-Attention within windows, with a relative position bias: (B windows, N, dim) -> (B windows, N, dim).

    Attributes:
        mask: what is added to the scores of shifted windows, (windows of an image, N, N); None where none is shifted.
    """
    mask: Tensor | None
    relative_position_index: Tensor

    set_window_size = WindowAttention.set_window_size
    _get_rel_pos_bias = WindowAttention._get_rel_pos_bias
    _init_buffers = WindowAttention._init_buffers
    init_non_persistent_buffers = WindowAttention.init_non_persistent_buffers

    def __init__(self, attn: WindowAttention, quant: QuantConfig) -> None:
        """Args: attn, timm's, whose window, position biases and parameters it takes over."""
        weight = attn.qkv.weight
        super().__init__(attn.dim, attn.num_heads, quant, attn.qkv.bias is not None, attn.attn_drop.p,
                         attn.proj_drop.p, weight.device, weight.dtype)
        self.window_size, self.window_area = attn.window_size, attn.window_area
        self.qkv, self.proj = _quantized(attn.qkv, quant), _quantized(attn.proj, quant)
        self.relative_position_bias_table = attn.relative_position_bias_table
        self.register_buffer('relative_position_index', attn.relative_position_index, persistent=False)
        self.register_buffer('mask', None, persistent=False)

    def score_bias(self) -> Tensor:
        """What is added to the scores of each window of an image, (1 or windows, H, N, N)."""
        bias = self._get_rel_pos_bias()
        return bias if self.mask is None else bias + self.mask.unsqueeze(1)

    def probabilities(self, q: Tensor, k: Tensor) -> Tensor:
        return with_bias(q @ k.mT * self.scale, self.score_bias()).softmax(-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.score_bias()
        return F.scaled_dot_product_attention(q, k, v, bias.repeat(len(q) // len(bias), 1, 1, 1).to(q.dtype),
                                              dropout_p=self.attn_drop if self.training else 0.)

    def _quantized_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attn = self.probabilities(self.q_act(q), self.k_act(k))
        if self.training and self.attn_drop > 0:
            attn = F.dropout(attn, self.attn_drop)
        return self.attn_act(attn) @ self.v_act(v)


def with_bias(scores: Tensor, bias: Tensor) -> Tensor:
    """Scores (B windows, H, N, N), with the biases (1 or windows, H, N, N) of the windows of an image."""
    return (scores.unflatten(0, (-1, len(bias))) + bias).flatten(0, 1)


class Windows(NamedTuple):
    """How a map is cut into the windows whose tokens attend to one another.

    Attributes:
        resolution: rows and columns of the map.
        size: of a window.
        shift: how far the map is rolled before.
    """
    resolution: tuple[int, int]
    size: tuple[int, int]
    shift: tuple[int, int]

    def split(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> the tokens of each window, the map filled up with zeros, (B windows, N', dim)."""
        x = x.unflatten(1, self.resolution)
        if any(self.shift):
            x = x.roll((-self.shift[0], -self.shift[1]), (1, 2))
        bottom, right = (-size % window for size, window in zip(self.resolution, self.size, strict=True))
        return window_partition(F.pad(x, (0, 0, 0, right, 0, bottom)), self.size).flatten(1, 2)

    def join(self, windows: Tensor) -> Tensor:
        """The inverse of `split`: (B windows, N', dim) -> (B, N, dim)."""
        (height, width), (rows, columns) = self.resolution, self.size
        x = window_reverse(windows.unflatten(1, self.size), self.size, -(-height // rows) * rows,
                           -(-width // columns) * columns)[:, :height, :width]
        return (x.roll(self.shift, (1, 2)) if any(self.shift) else x).flatten(1, 2)


def neighbours(x: Tensor, resolution: tuple[int, int]) -> Tensor:
    """(B, N, dim), a map of that resolution -> each 2 x 2 tokens as one, (B, N / 4, 4 dim)."""
    x = x.unflatten(1, resolution)
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))                            # (B, H', 2, W', 2, dim)
    return x.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)


class QSwinBlock(SwinTransformerBlock):
    """Pre-norm transformer block of Q-Attention in windows and Q-MLP: (B, N, dim) -> (B, N, dim).

    Tokens are those of the map of `input_resolution`, row by row; timm's form (B, H, W, dim) is taken as well, and
    given back.
    """

    def __init__(self, block: SwinTransformerBlock, quant: QuantConfig) -> None:
        """Args: block, timm's, whose form and parameters it takes over."""
        attn, weight = block.attn, block.norm1.weight
        super().__init__(block.dim, block.input_resolution, attn.num_heads, window_size=block.window_size,
                         shift_size=block.target_shift_size, always_partition=block.always_partition,
                         mlp_ratio=block.mlp_ratio, qkv_bias=attn.qkv.bias is not None, proj_drop=attn.proj_drop.p,
                         attn_drop=attn.attn_drop.p, drop_path=getattr(block.drop_path1, 'drop_prob', 0.),
                         device=weight.device, dtype=weight.dtype)
        mlp = QMlp(block.dim, int(block.dim * block.mlp_ratio), quant, attn.proj_drop.p, weight.device, weight.dtype)
        for name in ('fc1', 'fc2'):
            for leaf in ('weight', 'bias'):
                setattr(getattr(mlp, name), leaf, getattr(getattr(block.mlp, name), leaf))
        self.attn, self.mlp = QWindowAttention(attn, quant), mlp
        self.ls1, self.ls2 = nn.Identity(), nn.Identity()
        self._init_buffers()

    def _init_buffers(self) -> None:
        """Hands the mask of shifted windows to the attention."""
        weight = self.norm1.weight
        mask = self.get_attn_mask(device=weight.device, dtype=weight.dtype)
        self.attn.register_buffer('mask', mask, persistent=False)

    @property
    def windows(self) -> Windows:
        return Windows(self.input_resolution, self.window_size, self.shift_size)

    def forward(self, x: Tensor, return_qk: bool = False) -> Tensor | tuple[Tensor, QK]:
        """Returns x, or (x, (q~, k~)) of the attention, (B windows, H, N', d) each."""
        shape = x.shape
        x = x.flatten(1, -2)
        attended, qk = self.attn(self.windows.split(self.norm1(x)))
        x = x + self.drop_path1(self.windows.join(attended))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        x = x.view(shape)
        return (x, qk) if return_qk else x


class QPatchMerging(PatchMerging):
    """timm's patch merging with a quantized reduction: (B, N, dim) -> (B, N / 4, out_dim), or timm's (B, H, W, dim)."""

    def __init__(self, merging: PatchMerging, input_resolution: tuple[int, int], quant: QuantConfig) -> None:
        """Args: merging, timm's, whose parameters it takes over; input_resolution, of the map before."""
        nn.Module.__init__(self)
        self.dim, self.out_dim, self.input_resolution = merging.dim, merging.out_dim, input_resolution
        self.norm, self.reduction = merging.norm, _quantized(merging.reduction, quant)

    @property
    def output_resolution(self) -> tuple[int, int]:
        return tuple(-(-size // 2) for size in self.input_resolution)

    def neighbours(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> each 2 x 2 tokens as one, (B, N / 4, 4 dim), before the norm."""
        return neighbours(x, self.input_resolution)

    def forward(self, x: Tensor) -> Tensor:
        merged = self.reduction(self.norm(self.neighbours(x.flatten(1, -2))))
        return merged if x.ndim == 3 else merged.unflatten(1, self.output_resolution)


class QSwinTransformer(QuantizedNetwork, SwinTransformer):
    """Fully quantized Swin transformer, for images of its own size.

    What else reads it asks for the members that docs/architecture.md lists.

    Args:
        weight_bits, act_bits, act_granularity, irm, quantize_attn: see `QuantConfig`.
        **kwargs: arguments of timm's SwinTransformer, as num_classes, img_size, drop_path_rate, depths, window_size.

    Attributes:
        quant: what is quantized, and how.
    """
    num_prefix_tokens, has_class_token = 0, False
    has_twin_tokens = False

    def __init__(self, *args, weight_bits: int, act_bits: int, act_granularity: str = 'channel', irm: bool = True,
                 quantize_attn: bool = True, **kwargs) -> None:
        take_fixed_options(kwargs, FIXED_OPTIONS)
        quant = QuantConfig(weight_bits, act_bits, act_granularity, irm, quantize_attn)
        _check_pooling(kwargs.get('global_pool', 'avg'), kwargs.get('num_classes', 1000))
        super().__init__(*args, embed_layer=partial(QPatchEmbed, quant=quant), **kwargs)
        self.quant = quant
        for stage in self.layers:
            stage.blocks = nn.Sequential(*(QSwinBlock(block, quant) for block in stage.blocks))
            if isinstance(stage.downsample, PatchMerging):
                stage.downsample = QPatchMerging(stage.downsample, stage.input_resolution, quant)
        self._quantize_head()

    @property
    def blocks(self) -> list[QSwinBlock]:
        """The blocks of all stages, in forward order."""
        return [block for stage in self.layers for block in stage.blocks]

    @property
    def transitions(self) -> dict[int, QPatchMerging]:
        """By the index of the block that follows it, the patch merging that leads there."""
        found, index = {}, 0
        for stage in self.layers:
            if isinstance(stage.downsample, QPatchMerging):
                found[index] = stage.downsample
            index += len(stage.blocks)
        return found

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        """The classifier; an identity without classes."""
        return self.head.fc,

    def head_inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """Tokens after the last norm, (B, N, dim) -> what the head is given, (B, dim)."""
        return x.mean(1),

    def set_input_size(self, *args, **kwargs) -> None:
        super().set_input_size(*args, **kwargs)
        for stage in self.layers:
            if isinstance(stage.downsample, QPatchMerging):
                stage.downsample.input_resolution = stage.input_resolution

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes` classes, 8 bits as before and not calibrated; none for 0."""
        _check_pooling(self.global_pool if global_pool is None else global_pool, num_classes)
        super().reset_classifier(num_classes, global_pool)
        self._quantize_head()

    def _quantize_head(self) -> None:
        if isinstance(self.head.fc, nn.Linear):
            self.head.fc = _quantized(self.head.fc, self.quant, EDGE_BITS)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Position biases, and the scales and zero points of every quantizer."""
        return super().no_weight_decay() | set(filter(is_quantizer_entry, dict(self.named_parameters())))

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the first block's input, (B, N, dim)."""
        return self.patch_embed(x).flatten(1, 2)

    def forward_features(self, x: Tensor, return_blocks: bool = False) -> Tensor | tuple[Tensor, list[BlockOutputs]]:
        """(B, C, H, W) -> (B, H', W', dim), the map after the last norm; on request with the outputs of every block."""
        x, outputs = self.patch_embed(x), []
        for stage in self.layers:
            x = stage.downsample(x)
            for block in stage.blocks:
                x, qk = self.run_block(block, x, stage.grad_checkpointing)
                if return_blocks:
                    outputs.append(BlockOutputs(x.flatten(1, 2), *qk))
        x = self.norm(x)
        return (x, outputs) if return_blocks else x


def _check_pooling(global_pool: str, num_classes: int) -> None:
    if global_pool != 'avg' and not (global_pool == '' and num_classes == 0):
        raise ValueError(f"global_pool={global_pool!r} is not an option of the quantized network: choose 'avg'")


# --- the registered variants ------------------------------------------------------------------------------------------

SIZES = {'tiny': (2, 2, 6, 2), 'small': (2, 2, 18, 2)}  # name: depths


def _full_precision_cfg(size: str) -> dict:
    """timm's description of the full-precision network that `pretrained=True` starts from."""
    return timm.get_pretrained_cfg(f'swin_{size}_patch4_window7_224').to_dict()


default_cfgs = generate_default_cfgs({
    f'{bits}_swin_{size}_patch4_window7_224.full_precision_in1k': _full_precision_cfg(size)
    for bits in BITS for size in SIZES})


def _register_variant(bits_name: str, size: str) -> None:
    name, bits = f'{bits_name}_swin_{size}_patch4_window7_224', BITS[bits_name]

    def variant(pretrained: bool = False, **kwargs) -> QSwinTransformer:
        defaults = {'patch_size': 4, 'window_size': 7, 'embed_dim': 96, 'depths': SIZES[size],
                    'num_heads': (3, 6, 12, 24), 'weight_bits': bits, 'act_bits': bits} | kwargs
        out_indices = defaults.pop('out_indices', tuple(range(len(defaults['depths']))))
        return build_model_with_cfg(
            QSwinTransformer, name, pretrained, pretrained_filter_fn=adapt_full_precision,
            feature_cfg={'out_indices': out_indices, 'feature_cls': 'getter'}, **defaults)

    variant.__name__ = variant.__qualname__ = name
    variant.__doc__ = (f'{bits}-bit Swin-{size[0].upper()} at 224 px (keyword arguments: `QSwinTransformer`); '
                       f'pretrained=True starts from full precision and is to be calibrated.')
    globals()[name] = register_model(variant)


for _bits in BITS:
    for _size in SIZES:
        _register_variant(_bits, _size)
