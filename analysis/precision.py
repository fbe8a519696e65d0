"""What a forward on one image is made of: every tensor with its bits, every matrix product with its operands'.

Both lists are read off the module tree and its shapes, for quantized vision transformers and for timm's alike; no
forward runs. What has to be there is in docs/architecture.md; what it costs is up to `cost.py`.
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any

import torch.nn as nn
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from _quan_base import ActQ, Conv2dQ, GeluLinearQ, LinearQ
from models import is_quantized, network_blocks
from utils import UserError

__all__ = ['FULL_PRECISION_BITS', 'Product', 'TensorUse', 'analyse', 'manifest']

FULL_PRECISION_BITS = 32
# Elementwise operations per element, one each for +, -, *, /, max, exp, erf and rounding.
LAYER_NORM_WORK = 7  # sum for the mean, centre, square, sum for the variance, divide, scale, shift
SOFTMAX_WORK = 6     # scale the scores, maximum, subtract, exp, sum, divide
GELU_WORK = 5        # x * 0.5 * (1 + erf(x / sqrt(2)))
CLIP_WORK = 2
QUANTIZE_WORK = 7    # divide, add the zero point, clip twice, round; subtract the zero point, multiply


@dataclass(frozen=True)
class TensorUse:
    """A tensor of the forward pass on one image.

    Attributes:
        name: a parameter's name in the model, or where in the module tree an activation arises.
        role: what it is, as 'qkv weight', 'attention' or 'residual sum'.
        elements: how many values it has.
        bits: of a value; 32 is full precision.
        parameter: whether it is stored.
        quantizer: name of the module that quantizes it, None in full precision.
        scales, zero_points: how many the quantizer has.
        code_range: (qn, qp) where it is known: of weights, and of activations once calibrated.
        work: elementwise operations that it costs, the simulated quantization included.
        reference_work: of these, what the full-precision network has too.
        in_reference: whether the full-precision network has this tensor.
    """
    name: str
    role: str
    elements: int
    bits: int = FULL_PRECISION_BITS
    parameter: bool = False
    quantizer: str | None = None
    scales: int = 0
    zero_points: int = 0
    code_range: tuple[int, int] | None = None
    work: int = 0
    reference_work: int = 0
    in_reference: bool = True


@dataclass(frozen=True)
class Product:
    """A matrix product of the forward pass on one image.

    Attributes:
        layer: name of the layer, or of the attention with ' q k^T' or ' A v' behind it.
        macs: multiply-accumulates.
        bits: of its two operands: input and weight, q and k, attention and v.
        is_attention: whether both operands are activations.
    """
    layer: str
    macs: int
    bits: tuple[int, int]
    is_attention: bool = False


Parts = Iterator[TensorUse | Product]


def analyse(model: nn.Module) -> tuple[list[TensorUse], list[Product]]:
    """Tensors and products of the forward on one image of the model's size, in forward order.

    Args:
        model: a quantized network of this project, calibrated or not, or a full-precision ViT, DeiT or Swin of timm's.

    Raises:
        UserError: it is another kind of network.
    """
    blocks = network_blocks(model)
    attentions = [getattr(block, 'attn', None) for block in blocks]
    known = all(hasattr(attn, name) for attn in attentions for name in ('qkv', 'proj', 'num_heads'))
    known = known and (is_quantized(model) or isinstance(model, VisionTransformer | SwinTransformer))  # others do more
    if not known or not blocks or getattr(model, 'attn_pool', None) is not None:
        raise UserError(f'{type(model).__name__} is no DeiT, ViT or Swin: costs are known for the quantized variants '
                        "and for timm's full-precision ones")
    parts = list(_swin(model) if isinstance(model, SwinTransformer) else _network(model))
    return ([part for part in parts if isinstance(part, TensorUse)],
            [part for part in parts if isinstance(part, Product)])


def _network(model: nn.Module) -> Parts:
    embed, dim = model.patch_embed, model.embed_dim
    patches = prod(embed.grid_size)
    tokens = patches + model.num_prefix_tokens
    yield from _layer('patch_embed.proj', embed.proj, patches, embed.proj.in_channels * prod(embed.img_size), 'patch')
    yield from _module('patch_embed.norm', embed.norm, patches)
    yield from _own_parameters('', model)
    if model.pos_embed is not None:
        yield _full('pos_embed', 'position embedding sum', model.pos_embed.numel(), 1)
    for name, child in model.named_children():
        if name == 'blocks':
            for index, block in enumerate(child):
                yield from _block(f'blocks.{index}', block, tokens, dim)
        elif name != 'patch_embed':
            if name == 'fc_norm' and model.global_pool == 'avg':
                averaged = tokens if model.pool_include_prefix else patches
                yield _full('pool', 'mean of the tokens', dim, averaged)
            yield from _module(name, child, 1 if name in ('head', 'head_dist', 'fc_norm') else tokens)
    if isinstance(model.head, nn.Linear):
        is_mean = isinstance(getattr(model, 'head_dist', None), nn.Linear)
        yield _full('logits', 'mean of the logits' if is_mean else 'logits', model.num_classes, 2 if is_mean else 0)


def _swin(model: SwinTransformer) -> Parts:
    embed, tokens = model.patch_embed, prod(model.patch_embed.grid_size)
    yield from _layer('patch_embed.proj', embed.proj, tokens, embed.proj.in_channels * prod(embed.img_size), 'patch')
    yield from _module('patch_embed.norm', embed.norm, tokens)
    for index, stage in enumerate(model.layers):
        tokens = prod(stage.output_resolution)
        for name, child in stage.downsample.named_children():  # norm and reduction, or none
            yield from _module(f'layers.{index}.downsample.{name}', child, tokens)
        for number, block in enumerate(stage.blocks):
            yield from _block(f'layers.{index}.blocks.{number}', block, tokens, block.dim)
    yield from _module('norm', model.norm, tokens)
    yield _full('pool', 'mean of the tokens', model.num_features, tokens)
    yield from _module('head.fc', model.head.fc, 1)
    if isinstance(model.head.fc, nn.Linear):
        yield _full('logits', 'logits', model.num_classes, 0)


def _block(path: str, block: nn.Module, tokens: int, dim: int) -> Parts:
    for name, child in block.named_children():
        if name == 'attn':
            yield from _attention(f'{path}.{name}', child, *_attending(block, tokens))
        else:
            yield from (_mlp if name == 'mlp' else _module)(f'{path}.{name}', child, tokens)
        if hasattr(child, 'gamma'):
            yield _full(f'{path}.{name}', 'LayerScale', tokens * dim, 1)
        if name in ('attn', 'mlp'):
            yield _full(f'{path}.{name}', f'residual sum of {name}', tokens * dim, 1)


def _attending(block: nn.Module, tokens: int) -> tuple[int, int]:
    """How many tokens of an image attend, those that fill up windows included, and to how many each."""
    if not hasattr(block, 'window_size'):
        return tokens, tokens
    windows = prod(-(-size // window) for size, window in zip(block.input_resolution, block.window_size, strict=True))
    return windows * prod(block.window_size), prod(block.window_size)


def _attention(path: str, attention: nn.Module, tokens: int, keys: int) -> Parts:
    """Args: tokens, how many attend; keys, to how many each."""
    heads, width = attention.num_heads, attention.qkv.out_features // 3
    yield from _module(f'{path}.qkv', attention.qkv, tokens)
    for name in ('q_norm', 'k_norm', 'norm_q', 'norm_k'):
        yield from _module(f'{path}.{name}', getattr(attention, name, None), tokens * heads,
                           in_reference=name in ('q_norm', 'k_norm'))
    scores, quantized = heads * tokens * keys, getattr(attention, 'quantize_attn', False)

    def operand(name: str, role: str, elements: int) -> TensorUse:
        full = TensorUse(f'{path} {role}', role, elements)
        return _quantized_input(f'{path}.{name}', role, elements, getattr(attention, name)) if quantized else full

    q, k = operand('q_act', 'q', tokens * width), operand('k_act', 'k', tokens * width)
    attn, v = operand('attn_act', 'attention', scores), operand('v_act', 'v', tokens * width)
    yield from (q, k, v)
    yield from _own_parameters(path, attention)  # relative position biases
    if hasattr(attention, 'relative_position_bias_table'):
        yield _full(f'{path} position bias', 'position bias sum', scores, 1)
    yield from (_full(f'{path} softmax', 'softmax', scores, SOFTMAX_WORK), attn)
    yield Product(f'{path} q k^T', scores * width // heads, (q.bits, k.bits), is_attention=True)
    yield Product(f'{path} A v', scores * width // heads, (attn.bits, v.bits), is_attention=True)
    yield from _module(f'{path}.norm', getattr(attention, 'norm', None), tokens)
    yield from _module(f'{path}.proj', attention.proj, tokens)


def _mlp(path: str, mlp: nn.Module, tokens: int) -> Parts:
    hidden, clip = tokens * mlp.fc1.out_features, CLIP_WORK if isinstance(mlp.fc2, GeluLinearQ) else 0
    yield from _module(f'{path}.fc1', mlp.fc1, tokens)
    yield TensorUse(f'{path} GELU', 'GELU', hidden, work=(GELU_WORK + clip) * hidden, reference_work=GELU_WORK * hidden)
    yield from _module(f'{path}.norm', getattr(mlp, 'norm', None), tokens)
    yield from _module(f'{path}.fc2', mlp.fc2, tokens)


def _module(path: str, module: nn.Module | None, positions: int, in_reference: bool = True) -> Parts:
    """A linear layer or a norm at `positions` places of the image, or whatever parameters another module has."""
    if isinstance(module, nn.Linear):
        yield from _layer(path, module, positions, positions * module.in_features)
        return
    if module is not None:
        yield from _own_parameters(path, module, in_reference)
    if isinstance(module, nn.LayerNorm):
        elements = positions * prod(module.normalized_shape)
        work = LAYER_NORM_WORK * elements
        role = f'{path.rpartition(".")[2]} ({"LayerNorm" if in_reference else "IRM"})'
        yield TensorUse(path, role, elements, work=work, reference_work=work if in_reference else 0,
                        in_reference=in_reference)


def _layer(path: str, layer: nn.Linear | nn.Conv2d, positions: int, inputs: int, label: str | None = None) -> Parts:
    """Input, weight, bias and product of a layer that is applied at `positions` places."""
    label, weight, bits = label or path.rpartition('.')[2], layer.weight, (FULL_PRECISION_BITS, FULL_PRECISION_BITS)
    if isinstance(layer, (LinearQ, Conv2dQ)):
        yield _quantized_input(f'{path}.act', f'{label} input', inputs, layer.act)
        yield TensorUse(f'{path}.weight', f'{label} weight', weight.numel(), layer.weight_bits, True, path,
                        layer.scale.numel(), code_range=layer.code_range)
        bits = layer.act.bits, layer.weight_bits
    else:
        yield TensorUse(f'{path} input', f'{label} input', inputs)
        yield TensorUse(f'{path}.weight', f'{label} weight', weight.numel(), parameter=True)
    yield Product(path, positions * weight.numel(), bits)
    if layer.bias is not None:
        work = positions * layer.bias.numel()
        yield TensorUse(f'{path}.bias', f'{label} bias', layer.bias.numel(), parameter=True, work=work,
                        reference_work=work)


def _quantized_input(quantizer: str, role: str, elements: int, act: ActQ) -> TensorUse:
    return TensorUse(quantizer, role, elements, act.bits, quantizer=quantizer, scales=act.scale.numel(),
                     zero_points=act.zero_point.numel(), code_range=act.code_range if act.calibrated else None,
                     work=QUANTIZE_WORK * elements)


def _full(name: str, role: str, elements: int, work_each: int) -> TensorUse:
    """An activation in full precision."""
    return TensorUse(name, role, elements, work=work_each * elements, reference_work=work_each * elements)


def _own_parameters(path: str, module: nn.Module, in_reference: bool = True) -> Parts:
    """The parameters of a module itself, without its children, in full precision."""
    for leaf, parameter in module.named_parameters(path, recurse=False):
        role = ' '.join(leaf.split('.')[-2:])
        yield TensorUse(leaf, role, parameter.numel(), parameter=True, in_reference=in_reference)


def manifest(tensors: list[TensorUse]) -> list[dict[str, Any]]:
    """The tensors as rows of a table, with consecutive blocks that are alike as one.

    Returns:
        Dicts with where ('blocks.0-11', or a part outside the blocks), tensor (its role), kind, bits, codes (their
        range where it is known), steps, zero_points, elements (in one block) and quantizer (its name within `where`).
    """
    parts: list[tuple[str, str, list[dict[str, Any]]]] = []  # first, last, rows
    for where, group in groupby(tensors, _where):
        rows = [_row(tensor, where) for tensor in group]
        if parts and 'blocks.' in where and parts[-1][2] == rows:
            parts[-1] = parts[-1][0], where, rows
        else:
            parts.append((where, where, rows))
    return [{'where': first if first == last else f'{first}-{last.rpartition(".")[2]}'} | row
            for first, last, rows in parts for row in rows]


def _where(tensor: TensorUse) -> str:
    """The block that the tensor belongs to, or the part of the network outside them."""
    found = re.match(r'(layers\.\d+\.)?(blocks\.\d+|downsample)', tensor.name)
    return found.group() if found else tensor.name.partition('.')[0].partition(' ')[0]


def _row(tensor: TensorUse, where: str) -> dict[str, Any]:
    return {'tensor': tensor.role, 'kind': 'parameter' if tensor.parameter else 'activation', 'bits': tensor.bits,
            'codes': None if tensor.code_range is None else '{} to {}'.format(*tensor.code_range),
            'steps': tensor.scales, 'zero_points': tensor.zero_points, 'elements': tensor.elements,
            'quantizer': None if tensor.quantizer is None else tensor.quantizer.removeprefix(f'{where}.')}
