"""What happens inside a network, as tensors and arrays: queries, keys, attention and codes. `figures.py` draws them.

Networks are the quantized ones of `quant_vision_transformer.py` and timm's vision transformers. They are watched by
forward hooks in evaluation mode and left as they were.
"""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from _quan_base import ActQ, named_quantizers
from quant_vision_transformer import QAttention, QVisionTransformer
from training.diagnostics import entropy, quantizer_statistics
from utils import UserError

__all__ = ['AttentionInputs', 'CodeUsage', 'Distribution', 'Stages', 'attention_distance', 'attention_distances',
           'attention_inputs', 'attention_probabilities', 'class_token_maps', 'code_distribution', 'code_usage',
           'qk_distributions', 'read_log', 'value_distribution']

IMAGES_AT_A_TIME = 16
HISTOGRAM_BINS = 64


# --- queries, keys and values of every block --------------------------------------------------------------------------


class Stages(NamedTuple):
    """Queries or keys of a block on their way to the scores, (B, H, N, d) each.

    Attributes:
        projected: as the qkv layer gives them.
        rectified: after IRM (or timm's q_norm, k_norm); `projected` itself in a network without.
        used: what the scores are computed from: the quantized values, or `rectified` in a full-precision network.
        codes: the integer codes of `used`, None in full precision.
    """
    projected: Tensor
    rectified: Tensor
    used: Tensor
    codes: Tensor | None


class AttentionInputs(NamedTuple):
    """What a block's attention is computed from; v is that before quantization, (B, H, N, d)."""
    q: Stages
    k: Stages
    v: Tensor


@contextmanager
def _watched(model: nn.Module, modules: Sequence[nn.Module], hook: Callable) -> Iterator[None]:
    """The model in evaluation mode and without gradients, with the hook on the given modules; then as before."""
    hooks, was_training = [module.register_forward_hook(hook) for module in modules], model.training
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        for handle in hooks:
            handle.remove()


def _attentions(model: nn.Module) -> list[tuple[nn.Module, nn.Module, nn.Module]]:
    """(attention, what queries pass, what keys pass) of every block."""
    found = []
    for block in getattr(model, 'blocks', []):
        attention = getattr(block, 'attn', None)
        names = ('norm_q', 'norm_k') if isinstance(attention, QAttention) else ('q_norm', 'k_norm')
        if not all(hasattr(attention, name) for name in ('qkv', 'num_heads', 'head_dim', *names)):
            break
        found.append((attention, *(getattr(attention, name) for name in names)))
    if not found or len(found) < len(model.blocks):
        raise UserError(f'{type(model).__name__} has no blocks with the attention of a vision transformer: '
                        'choose a DeiT or another of timm\'s vision transformers')
    return found


def attention_inputs(model: nn.Module, images: Tensor) -> list[AttentionInputs]:
    """Queries, keys and values of every block in one forward on images (B, 3, H, W).

    Raises:
        UserError: the network has no such attention.
    """
    attentions, passed = _attentions(model), {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        passed[module] = inputs[0], output

    def stages(module: nn.Module, quantizer: ActQ | None) -> Stages:
        projected, rectified = passed[module]
        if quantizer is None:
            return Stages(projected, rectified, rectified, None)
        return Stages(projected, rectified, quantizer(rectified), quantizer.to_int(rectified))

    watched = [module for attention, *norms in attentions for module in (attention.qkv, *norms)]
    with _watched(model, watched, keep):
        model(images)
        found = []
        for attention, of_q, of_k in attentions:
            qkv = passed[attention.qkv][1].unflatten(-1, (3, attention.num_heads, attention.head_dim))
            found.append(AttentionInputs(stages(of_q, getattr(attention, 'q_act', None)),
                                         stages(of_k, getattr(attention, 'k_act', None)),
                                         qkv[:, :, 2].transpose(1, 2)))
    return found


def attention_probabilities(inputs: AttentionInputs) -> Tensor:
    """softmax(q k^T / sqrt(d)) of the queries and keys in use, before its own quantization: (B, H, N, N)."""
    return (inputs.q.used @ inputs.k.used.mT * inputs.q.used.shape[-1] ** -0.5).softmax(dim=-1)


def class_token_maps(model: nn.Module, images: Tensor, block: int) -> Tensor:
    """Attention of the class token to the patches, (B, H, rows, columns); the rest of 1 is to the special tokens."""
    attention = attention_probabilities(attention_inputs(model, images)[block])
    return attention[:, :, 0, model.num_prefix_tokens:].unflatten(-1, model.patch_embed.grid_size)


def attention_distance(attention: Tensor, grid: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """Mean distance between a patch and what it attends to, in pixels, by head.

    Dosovitskiy et al., 2021 (arXiv 2010.11929, Figure 7) and Raghu et al., 2021 (arXiv 2108.08810): distances between
    the patches' centres, weighted by the attention, averaged over query patches and images. Special tokens have no
    place in the image: they are left out, and the remaining weights of a query are scaled to sum to 1.

    Args:
        attention: (B, H, N, N), rows sum to 1; the last rows * columns tokens are the patches, row by row.
        grid: (rows, columns) of patches.
        patch_size: (height, width) in pixels.

    Returns:
        (H,), in pixels.
    """
    patches = grid[0] * grid[1]
    centres = torch.cartesian_prod(torch.arange(grid[0]) * patch_size[0],
                                   torch.arange(grid[1]) * patch_size[1]).to(attention)  # (patches, 2)
    weights = attention[:, :, -patches:, -patches:]
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return (weights * torch.cdist(centres, centres)).sum(-1).mean((0, 2))


def attention_distances(model: nn.Module, images: Tensor) -> np.ndarray:
    """`attention_distance` of every block and head, averaged over the images: (blocks, H), in pixels."""
    embed, total = model.patch_embed, 0.
    for piece in images.split(IMAGES_AT_A_TIME):
        blocks = [attention_distance(attention_probabilities(inputs), embed.grid_size, embed.patch_size)
                  for inputs in attention_inputs(model, piece)]
        total = total + torch.stack(blocks) * len(piece)
    return (total / len(images)).numpy()


# --- distributions and their entropies --------------------------------------------------------------------------------


class Distribution(NamedTuple):
    """A histogram of real values, or the shares of integer codes.

    Attributes:
        positions: edges of the bins (bins + 1,), or the codes (codes,).
        heights: density per bin (bins,), which integrates to 1, or share of each code (codes,), which sum to 1.
        entropy: in bits. Of codes: that of the shares, at most `bits`. Of real values: the differential entropy of the
            histogram, -sum p log2(p / width), which grows by 1 where all values are doubled.
        bits: of a code; None for real values.
    """
    positions: np.ndarray
    heights: np.ndarray
    entropy: float
    bits: int | None


def value_distribution(values: Tensor, bins: int = HISTOGRAM_BINS) -> Distribution:
    """The histogram of real values over their whole range, with its differential entropy."""
    density, edges = np.histogram(values.double().flatten().numpy(), bins, density=True)
    width = edges[1] - edges[0]
    return Distribution(edges, density, entropy(density * width) + math.log2(width), None)


def code_distribution(codes: Tensor, qn: int, qp: int) -> Distribution:
    """The shares of the codes from qn to qp."""
    counts = torch.bincount(codes.flatten() - qn, minlength=qp - qn + 1).double().numpy()
    shares = counts / counts.sum()
    return Distribution(np.arange(qn, qp + 1), shares, entropy(shares), int(math.log2(len(shares))))


def qk_distributions(model: nn.Module, images: Tensor, blocks: Sequence[int], heads: Sequence[int],
                     ) -> list[dict[str, Distribution]]:
    """Queries and keys of the given blocks, the given heads together: first to last stage, by its name.

    Returns:
        One mapping for the queries and one for the keys of each block, in turn. A full-precision network has the stage
        'full precision', a quantized one 'before IRM', 'after IRM' (one stage, 'before quantization', if it has no IRM)
        and 'codes'; without quantized attention it has no codes.
    """
    found, attentions, inputs = [], _attentions(model), attention_inputs(model, images)
    for block in blocks:
        attention = attentions[block][0]
        for stages, name in ((inputs[block].q, 'q'), (inputs[block].k, 'k')):
            stages = Stages(*(None if stage is None else stage[:, list(heads)] for stage in stages))
            if not isinstance(attention, QAttention):
                found.append({'full precision': value_distribution(stages.used)})
                continue
            if isinstance(getattr(attention, f'norm_{name}'), nn.Identity):
                row = {'before quantization': value_distribution(stages.rectified)}
            else:
                row = {'before IRM': value_distribution(stages.projected),
                       'after IRM': value_distribution(stages.rectified)}
            if stages.codes is not None:
                row['codes'] = code_distribution(stages.codes, *getattr(attention, f'{name}_act').code_range)
            found.append(row)
    return found


# --- the use that quantizers make of their codes ----------------------------------------------------------------------


class CodeUsage(NamedTuple):
    """Shares of a quantizer's codes, and the share of values outside its range."""
    distribution: Distribution
    clipped: float

    @property
    def relative_entropy(self) -> float:
        """Entropy of the codes divided by their bits, from 0 (one code) to 1 (all alike)."""
        return self.distribution.entropy / self.distribution.bits


@torch.no_grad()
def code_usage(model: nn.Module, images: Tensor) -> dict[str, CodeUsage]:
    """The code usage of every quantizer on images (B, 3, H, W).

    Returns:
        By name: `<layer>` for a layer's weight, `<layer>.act` for its input, `<attention>.q_act` and so on.

    Raises:
        UserError: the network is not quantized.
    """
    if not isinstance(model, QVisionTransformer):
        raise UserError(f'{type(model).__name__} has no codes: choose the checkpoint of a quantized network')
    names, quantizers = {module: name for name, module in model.named_modules()}, dict(named_quantizers(model))
    layers = {name: module for name, module in quantizers.items() if not isinstance(module, ActQ)}
    found = {name: code_distribution(layer.to_int(), *layer.code_range) for name, layer in layers.items()}

    def note(act: ActQ, codes: Tensor) -> None:
        found[names[act]] = code_distribution(codes, *act.code_range)

    def of_input(layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        note(layer.act, layer.act.to_int(inputs[0]))

    with _watched(model, list(layers.values()), of_input):
        for (attention, *_), inputs in zip(_attentions(model), attention_inputs(model, images), strict=True):
            if attention.quantize_attn:
                note(attention.q_act, inputs.q.codes)
                note(attention.k_act, inputs.k.codes)
                note(attention.v_act, attention.v_act.to_int(inputs.v))
                note(attention.attn_act, attention.attn_act.to_int(attention_probabilities(inputs)))
    statistics = quantizer_statistics(model, images)
    return {name: CodeUsage(found[name], statistics[name]['clipped']) for name in quantizers}


# --- logs of runs -----------------------------------------------------------------------------------------------------


def read_log(path: Path) -> dict[str, np.ndarray]:
    """The epochs of a run's log.txt (or of its folder): epoch, and by their names all numbers of every line.

    Raises:
        UserError: there is no such file, or a line of it is not a JSON object with an epoch.
    """
    path = path / 'log.txt' if path.is_dir() else path
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read ({getattr(error, "strerror", None) or "no text"}): name the folder or '
                        'the log.txt of a run') from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.append({**record, 'epoch': int(record['epoch'])})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f'{path}, line {number} is no record of an epoch: name the log.txt of a run') from error
    if not records:
        raise UserError(f'{path} has no epochs yet')
    names = dict.fromkeys(name for record in records for name, value in record.items() if type(value) in (int, float))
    return {name: np.array([record.get(name, math.nan) for record in records], dtype=float) for name in names}
