"""ONNX files of a quantized network, or of a full-precision DeiT, built node by node.

The `int8` form computes as `integer.IntegerViT` does. It multiplies uint8 codes of scale 1, whose scales and zero
points are folded into the layer before and into the bias, with int8 codes that have one scale per output channel. The
`int4` form keeps the original weight codes, and stores those of up to 4 bits as INT4. It is always exact, but its
products are in floating point where activations have a scale per channel, which cannot leave the sum. See docs/onnx.md.
"""
from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from timm.layers import Mlp
from timm.models import VisionTransformer
from torch import Tensor

from checkpoints.networks import ModelInfo
from datasets import build_transform
from deployment.integer import IntAttention, IntBlock, IntegerViT, IntLinear
from models import is_quantized
from quant_vision_transformer import QVisionTransformer
from utils import UserError, write_whole

try:
    import onnx
    from onnx import TensorProto, helper

    from deployment.onnx_graph import ONE, ZERO, Affine, Codes, Graph, Linear, collapsed, normalized_codes, to_codes
except ImportError:  # export_onnx says so
    onnx = None

__all__ = ['export_onnx']

FORMAT_VERSION = 1
MIN_OPSET = {'int8': 17, 'int4': 21}  # the first with LayerNormalization, and the first with INT4
IR_VERSION = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10}  # of each opset the oldest that knows it: old runtimes need that
NEWEST_OPSET = max(IR_VERSION)


# --- the parts of the network -----------------------------------------------------------------------------------------


def _embedded(g: Graph, images: str, patches: str, prefix: Tensor, positions: Tensor) -> str:
    """Patches (B, patches, dim) with their position embeddings, behind the prefix tokens of every image."""
    if not prefix.shape[1]:
        return g.plus(patches, positions)
    size = g.op('Shape', images, start=0, end=1)
    shape = g.op('Concat', size, g.const(prefix.shape[1:], np.int64), axis=0)
    return g.op('Concat', g.op('Expand', g.const(prefix), shape), g.plus(patches, positions), axis=1)


def _patches(g: Graph, images: str, input_size: Sequence[int], patch_size: Sequence[int]) -> str:
    """Cuts images into patches: (B, C, H, W) -> (B, patches, C h w)."""
    (h, w), (rows, columns) = patch_size, (size // patch for size, patch in zip(input_size, patch_size, strict=True))
    x = g.reshape(images, 0, 0, rows, h, columns, w)
    return g.reshape(g.transpose(x, 0, 2, 4, 1, 3, 5), 0, rows * columns, -1)


def _heads(g: Graph, qkv: str, heads: int, head_dim: int) -> list[str]:
    """Splits the output of qkv: (B, N, 3 dim) -> q, k, v of (B, N, heads, d)."""
    parts = g.op('Split', qkv, g.const([heads * head_dim] * 3, np.int64), axis=-1, outputs=3)
    return [g.reshape(part, 0, 0, heads, head_dim) for part in parts]


def _float_attention(g: Graph, q: str, k: str, v: str) -> str:
    """Attention in floating point: q, k, v of (B, N, heads, d), with q scaled already -> (B, N, dim)."""
    scores = g.op('MatMul', g.transpose(q, 0, 2, 1, 3), g.transpose(k, 0, 2, 3, 1))
    x = g.op('MatMul', g.op('Softmax', scores, axis=-1), g.transpose(v, 0, 2, 1, 3))
    return g.reshape(g.transpose(x, 0, 2, 1, 3), 0, 0, -1)


def _attention(g: Graph, attn: IntAttention, qkv: Linear, x: Codes) -> tuple[str, Tensor]:
    """Q-Attention up to its projection: (B, N, dim), which is still to be multiplied by the gain per channel."""
    if not attn.quantized:
        return _mixed_attention(g, attn, qkv, x), ONE
    q, k, v = _attention_codes(g, attn, qkv, x)
    scale = collapsed(attn.score_scale.double().cpu())
    common = scale.item() if scale.numel() == 1 else 1.
    scores = g.op('MatMul', q.in_float(g, common), k.in_float(g))
    probabilities = g.op('Softmax', g.times(scores, scale / common), axis=-1)
    codes = to_codes(g, probabilities, Affine.of(attn.attn_quant, attn.attn_zero.double().cpu()))
    x = g.op('MatMul', codes.in_float(g), v.in_float(g))
    gain = attn.out_scale.double().cpu().flatten().repeat_interleave(attn.head_dim)
    return g.reshape(g.transpose(x, 0, 2, 1, 3), 0, 0, -1), gain


def _attention_codes(g: Graph, attn: IntAttention, qkv: Linear, x: Codes) -> tuple[Codes, Codes, Codes]:
    """The codes of q (B, heads, N, d), k (B, heads, d, N) and v (B, heads, N, d), each less its zero point.

    k keeps its zero point: it adds the same to all scores of a query, which leaves the softmax unchanged.
    """
    heads, width = attn.num_heads, attn.head_dim
    q_zero, v_zero = attn.q_zero.double().cpu(), attn.v_zero.double().cpu()
    affines = [Affine.of(quant, zero).of_heads_last() for quant, zero in (
        (attn.q_quant, q_zero), (attn.k_quant, ZERO.view(1, 1, 1)), (attn.v_quant, v_zero))]
    gain, shift = torch.ones(3, heads, width).double(), torch.zeros(3, heads, width).double()
    for i, affine in enumerate(affines):
        if i == 2 or not attn.rectified:  # with no LayerNorm in between, the linear layer takes the scaling over
            gain[i], shift[i] = affine.scale, affine.shift - affine.zero
            affines[i] = affine.applied()
    q, k, v = _heads(g, qkv.affine(gain.flatten(), shift.flatten()).add(g, x), heads, width)
    if attn.rectified:
        q = normalized_codes(g, q, width, attn.norm_eps, affines[0])
        k = normalized_codes(g, k, width, attn.norm_eps, affines[1], right=True)
    else:
        q, k = to_codes(g, q, affines[0]), to_codes(g, k, affines[1], right=True)
    v = to_codes(g, v, affines[2], right=True).transposed(g, 0, 2, 1, 3)
    return q.transposed(g, 0, 2, 1, 3), k.transposed(g, 0, 2, 3, 1), v


def _mixed_attention(g: Graph, attn: IntAttention, qkv: Linear, x: Codes) -> str:
    """Attention in floating point, behind a linear layer of codes: (B, N, dim)."""
    heads, width = attn.num_heads, attn.head_dim
    gain = torch.ones(3, heads * width).double()
    gain[0] = 1. if attn.rectified else attn.scale
    q, k, v = _heads(g, qkv.affine(gain.flatten()).add(g, x), heads, width)
    if attn.rectified:
        q, k = (g.layer_norm(value, width, attn.norm_eps, norm.weight.detach() * scale, norm.bias.detach() * scale)
                for value, norm, scale in ((q, attn.norm_q, attn.scale), (k, attn.norm_k, 1.)))
    return _float_attention(g, q, k, v)


# --- whole networks ---------------------------------------------------------------------------------------------------


def _quantized(g: Graph, net: IntegerViT, images: str, originals: dict[nn.Module, nn.Module]) -> str:
    """Adds the integer network, and returns the name of its logits.

    Args:
        originals: the fake-quantized layers of the integer ones whose original weight codes are to be kept.
    """
    linear = {layer: Linear.of(layer, originals.get(layer)) for layer in net.modules() if isinstance(layer, IntLinear)}
    patches = _patches(g, images, net.input_size, net.patch_size)
    x = linear[net.patch].add(g, to_codes(g, patches, Affine.of(net.patch_in)))
    x = _embedded(g, images, x, net.prefix, net.positions)
    if isinstance(net.norm_pre, nn.LayerNorm):
        x = g.layer_norm(x, net.dim, net.norm_pre.eps, net.norm_pre.weight, net.norm_pre.bias)
    for i, block in enumerate(net.blocks):
        g.scope = f'blocks.{i}'
        x = _block(g, block, x, linear)
    g.scope, logits = 'head', []
    for tokens, quant, head in zip(net.tokens_of_heads, net.heads_in, net.heads, strict=True):
        y = g.op('Slice', x, *(g.const([value], np.int64) for value in (tokens.start, tokens.stop, 1)))
        codes = _pooled_codes(g, net, y, len(tokens), Affine.of(quant))
        logits.append(linear[head].affine(torch.tensor(1 / len(net.heads))).add(g, codes))
    return g.op('Squeeze', g.op('Add', *logits) if len(logits) == 2 else logits[0], g.const([1], np.int64),
                name='logits')


def _pooled_codes(g: Graph, net: IntegerViT, x: str, tokens: int, affine: Affine) -> Codes:
    """The codes of what a head reads, (B, 1, dim), of the tokens that it reads, (B, tokens, dim)."""
    if tokens == 1:
        return normalized_codes(g, x, net.dim, net.norm_eps, affine)
    mean = g.const(torch.full((1, tokens), 1 / tokens))
    if net.pools_first:
        return normalized_codes(g, g.op('MatMul', mean, x), net.dim, net.norm_eps, affine)
    return to_codes(g, g.op('MatMul', mean, g.layer_norm(x, net.dim, net.norm_eps)), affine)


def _block(g: Graph, block: IntBlock, x: str, linear: dict[nn.Module, Linear]) -> str:
    """A transformer block: float (B, N, dim) -> float (B, N, dim)."""
    attn = block.attn
    codes = normalized_codes(g, x, block.dim, block.norm1_eps, Affine.of(block.attn_in))
    y, gain = _attention(g, attn, linear[attn.qkv], codes)
    codes = to_codes(g, y, Affine.of(attn.proj_in, gain=gain))
    x = g.op('Add', x, linear[attn.proj].add(g, codes))
    codes = normalized_codes(g, x, block.dim, block.norm2_eps, Affine.of(block.fc1_in))
    hidden, affine = g.gelu(linear[block.fc1].add(g, codes)), Affine.of(block.fc2_in)
    if bool((10 * affine.scale + affine.shift < affine.levels).any()):  # else all codes saturate below 10
        hidden = g.clip(hidden, torch.tensor(-10.), torch.tensor(10.))
    return g.op('Add', x, linear[block.fc2].add(g, to_codes(g, hidden, affine)))


def _full_precision(g: Graph, model: VisionTransformer, images: str) -> str:
    """Adds a DeiT of timm, and returns the name of its logits."""
    def normalized(x: str, norm: nn.LayerNorm) -> str:
        return g.layer_norm(x, model.embed_dim, norm.eps, norm.weight.detach(), norm.bias.detach())

    embed, positions = model.patch_embed, model.pos_embed.detach().double()
    x = Linear.of(embed.proj).add(g, _patches(g, images, embed.img_size, embed.patch_size))
    tokens = torch.cat([model.cls_token, *([model.dist_token] if hasattr(model, 'dist_token') else [])], 1).detach()
    prefix = tokens.shape[1]
    x = _embedded(g, images, x, tokens + positions[:, :prefix], positions[:, prefix:])
    for i, block in enumerate(model.blocks):
        g.scope, attn = f'blocks.{i}', block.attn
        gain = torch.ones(3, model.embed_dim).double()
        gain[0] = attn.scale
        qkv = Linear.of(attn.qkv).affine(gain.flatten()).add(g, normalized(x, block.norm1))
        y = _float_attention(g, *_heads(g, qkv, attn.num_heads, model.embed_dim // attn.num_heads))
        x = g.op('Add', x, Linear.of(attn.proj).add(g, y))
        hidden = g.gelu(Linear.of(block.mlp.fc1).add(g, normalized(x, block.norm2)))
        x = g.op('Add', x, Linear.of(block.mlp.fc2).add(g, hidden))
    g.scope, heads = 'head', [model.head, *([model.head_dist] if prefix == 2 else [])]
    logits = [Linear.of(head).affine(torch.tensor(1 / prefix)).add(
        g, normalized(g.op('Gather', x, g.const(token, np.int64), axis=1), model.norm)) for token, head in
        enumerate(heads)]
    return g.op('Add', *logits, name='logits') if prefix == 2 else g.op('Identity', *logits, name='logits')


def _originals(net: IntegerViT, model: QVisionTransformer) -> dict[nn.Module, nn.Module]:
    """By integer layer, the fake-quantized one that it was made of."""
    pairs = {net.patch: model.patch_embed.proj, **dict(zip(net.heads, model.heads, strict=True))}
    for ours, theirs in zip(net.blocks, model.blocks, strict=True):
        pairs |= {ours.attn.qkv: theirs.attn.qkv, ours.attn.proj: theirs.attn.proj, ours.fc1: theirs.mlp.fc1,
                  ours.fc2: theirs.mlp.fc2}
    return pairs


def export_onnx(network: IntegerViT | VisionTransformer, path: str | Path, *, weights: str = 'int8',
                quantized: QVisionTransformer | None = None, opset: int | None = None,
                info: ModelInfo | None = None) -> None:
    """Writes `network` as an ONNX file: images float32 (batch, C, H, W), normalized -> logits float32 (batch, classes).

    Args:
        network: an integer network, or a full-precision DeiT of timm (float32 weights).
        path: of the file, which is written whole or not at all.
        weights: 'int8', or 'int4' for INT4 initializers of layers of up to 4 bits (needs `quantized`).
        quantized: the fake-quantized network that `network` was made of.
        opset: 17 to 21; by default the oldest that has what the file needs: 17, or 21 for 'int4'.
        info: what the network is, for the file's metadata.

    Raises:
        UserError: onnx is not installed, the network is of another kind, an option does not fit, or the file cannot be
            written.
    """
    if onnx is None:
        raise UserError('ONNX files need the onnx package: pip install onnx onnxruntime')
    if not isinstance(network, IntegerViT | VisionTransformer):
        raise UserError(f'{type(network).__name__} has no ONNX form: only a ViT or DeiT can be exported')
    is_integer = isinstance(network, IntegerViT)
    g = Graph(_checked_opset(opset, weights, is_integer and quantized is not None))
    if is_integer:
        size, channels = network.input_size, len(network.patch_in.scale) // math.prod(network.patch_size)
        _quantized(g, network, 'images', _originals(network, quantized) if weights == 'int4' else {})
    else:
        _check_full_precision(network)
        size, channels = network.patch_embed.img_size, network.patch_embed.proj.in_channels
        _full_precision(g, network, 'images')
    graph = helper.make_graph(
        g.nodes, 'q-vit', [helper.make_tensor_value_info('images', TensorProto.FLOAT, ['batch', channels, *size])],
        [helper.make_tensor_value_info('logits', TensorProto.FLOAT, ['batch', network.num_classes])],
        list(g.constants.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', g.opset)], producer_name='q-vit',
                              ir_version=IR_VERSION[g.opset])
    helper.set_model_props(model, _metadata(network, weights if is_integer else 'float32', quantized, info))
    onnx.checker.check_model(model, full_check=True)
    try:
        write_whole(path, lambda beside: beside.write_bytes(model.SerializeToString()))
    except OSError as error:
        raise UserError(f'{path} cannot be written ({error})') from error


def _checked_opset(opset: int | None, weights: str, has_codes: bool) -> int:
    """The opset of the file. has_codes: whether the network's original weight codes are known."""
    if weights not in MIN_OPSET:
        raise UserError(f"ONNX weights '{weights}': choose int8 or int4")
    if weights == 'int4' and not has_codes:
        raise UserError('ONNX weights int4 need the fake-quantized network beside the integer one')
    least = MIN_OPSET[weights]
    opset = least if opset is None else opset
    if not least <= opset <= NEWEST_OPSET:
        raise UserError(f'ONNX opset {opset}: choose {least} to {NEWEST_OPSET}')
    return opset


def _check_full_precision(model: VisionTransformer) -> None:
    """Refuses the forms of timm's VisionTransformer that no DeiT has."""
    if is_quantized(model):
        raise UserError('a fake-quantized network is exported as the IntegerViT made of it')
    block = model.blocks[0]
    identities = ('norm_pre', 'fc_norm', 'patch_embed.norm',
                  *(f'blocks.0.{name}' for name in ('ls1', 'attn.q_norm', 'attn.norm', 'mlp.norm')))
    modules = dict(model.named_modules())  # older versions of timm lack some of them
    if not (all(isinstance(modules.get(name, nn.Identity()), nn.Identity) for name in identities)
            and model.num_prefix_tokens == (2 if hasattr(model, 'dist_token') else 1) and model.global_pool == 'token'
            and not model.no_embed_class and isinstance(model.norm, nn.LayerNorm) and isinstance(block.mlp, Mlp)
            and isinstance(block.mlp.act, nn.GELU) and model.num_classes > 0):
        raise UserError(f'{type(model).__name__}: only a DeiT (class token, LayerNorm, GELU, heads) can be exported')


def _preprocessing(info: ModelInfo) -> dict[str, Any]:
    """What `build_transform` does to a picture in evaluation, in plain values: the input that the network was trained
    for. `resize` is of the shorter side where it is one number, else of height and width."""
    transform = build_transform(False, info.input_size, info.data_set or 'IMNET', normalization=info.normalization)
    steps = {type(step).__name__: step for step in transform.transforms}
    crop = {'center_crop': steps['CenterCrop'].size} if 'CenterCrop' in steps else {}
    colors = 'grey' if info.normalization.in_chans == 1 else 'RGB'
    return {'colors': f'{colors}, from 0 to 1', 'resize': steps['Resize'].size,
            'interpolation': steps['Resize'].interpolation.value, **crop,
            'mean': list(steps['Normalize'].mean), 'std': list(steps['Normalize'].std)}


def _metadata(network: nn.Module, weights: str, quantized: nn.Module | None, info: ModelInfo | None) -> dict[str, str]:
    """The properties of the ONNX model, all of them strings."""
    metadata = {'format_version': str(FORMAT_VERSION), 'weights': weights, 'model': info.model if info else '?'}
    if isinstance(network, IntegerViT):
        metadata |= {'activation_bits': str((network.blocks[0].fc1.levels + 1).bit_length() - 1),
                     'exact': json.dumps(network.exact or weights == 'int4')}
    if quantized is not None:
        metadata['weight_bits'] = str(quantized.quant.weight_bits)
    if info is not None:
        metadata['preprocessing'] = json.dumps(_preprocessing(info))
    if info is not None and info.classes:
        metadata['classes'] = json.dumps(info.classes)
    return metadata
