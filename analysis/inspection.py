"""What happens inside a network, as arrays: attention, queries and keys, codes; and logs. `figures.py` draws them.

Networks are quantized ones, which give what docs/architecture.md lists, and timm's vision transformers.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from analysis.attention import Stages, attention_inputs, attention_probabilities, attentions, is_rectified
from analysis.codes import CodeStatistics, Distribution, code_distribution, code_statistics, entropy
from analysis.logs import parse_epoch
from files.paths import read_text
from models import network_blocks
from utils import UserError

__all__ = ['attention_distance', 'attention_distances', 'class_token_maps', 'code_usage', 'compare_maps', 'compare_qk',
           'qk_distributions', 'read_log', 'read_logs', 'title', 'usage_table', 'value_distribution']

IMAGES_AT_A_TIME = 16
HISTOGRAM_BINS = 64


# --- attention --------------------------------------------------------------------------------------------------------


def class_token_maps(model: nn.Module, images: Tensor, block: int) -> Tensor:
    """Attention of the class token to the patches, (B, H, rows, columns); the rest of 1 is to the special tokens.

    Raises:
        UserError: there is no class token.
    """
    _check_sees_all(model)
    if not getattr(model, 'has_class_token', True):
        raise UserError(f'{type(model).__name__} has no class token, whose attention could be drawn: choose distance')
    attention = attention_probabilities(attention_inputs(model, images)[block])
    return attention[:, :, 0, model.num_prefix_tokens:].unflatten(-1, model.patch_embed.grid_size)


def _check_sees_all(model: nn.Module) -> None:
    """Refuses networks whose tokens do not attend to the whole image."""
    if any(hasattr(block, 'window_size') for block in network_blocks(model)):
        raise UserError(f'{type(model).__name__} attends within windows, of which there is no map of the whole image: '
                        'choose qk or codes')


def compare_maps(networks: Mapping[str, nn.Module], images: Tensor, blocks: Sequence[int],
                 ) -> dict[int, dict[str, np.ndarray]]:
    """By block and by network, `class_token_maps`.

    Args:
        blocks: counted from 0, or from the end if negative, in the last of the networks.

    Raises:
        UserError: there is no such block.
    """
    *_, student = networks.values()
    return {block: {name: class_token_maps(model, images, block).numpy() for name, model in networks.items()}
            for block in _counted_from_0('--blocks', blocks, len(student.blocks))}


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
    _check_sees_all(model)
    embed, total = model.patch_embed, 0.
    for piece in images.split(IMAGES_AT_A_TIME):
        blocks = [attention_distance(attention_probabilities(inputs), embed.grid_size, embed.patch_size)
                  for inputs in attention_inputs(model, piece)]
        total = total + torch.stack(blocks) * len(piece)
    return (total / len(images)).numpy()


# --- queries and keys -------------------------------------------------------------------------------------------------


def value_distribution(values: Tensor, bins: int = HISTOGRAM_BINS) -> Distribution:
    """The histogram of real values over their whole range, with its differential entropy."""
    density, edges = np.histogram(values.double().flatten().numpy(), bins, density=True)
    width = edges[1] - edges[0]
    return Distribution(edges, density, entropy(density * width) + math.log2(width), None)


def qk_distributions(model: nn.Module, images: Tensor, blocks: Sequence[int], heads: Sequence[int],
                     ) -> list[dict[str, Distribution]]:
    """Queries and keys of the given blocks, the given heads together: first to last stage, by its name.

    Returns:
        One mapping for the queries and one for the keys of each block, in turn. A full-precision network has the stage
        'full precision', a quantized one 'before IRM', 'after IRM' (one stage, 'before quantization', if it has no IRM)
        and 'codes'; without quantized attention it has no codes. Channels whose weight in IRM is next to nothing are
        left out before and after it.
    """
    found, modules, inputs = [], attentions(model), attention_inputs(model, images)
    for block in blocks:
        attention = modules[block]
        norms = (attention.norm_q, attention.norm_k) if is_rectified(attention) else (None, None)
        for stages, irm in zip((inputs[block].q, inputs[block].k), norms, strict=True):
            found.append(_stage_distributions(stages, irm, list(heads)))
    return found


def _stage_distributions(stages: Stages, irm: nn.Module | None, heads: list[int]) -> dict[str, Distribution]:
    """One row of `qk_distributions`. irm: None in a full-precision network, an Identity in a quantized one without."""
    projected, rectified = stages.projected[:, heads], stages.rectified[:, heads]
    if irm is None:
        return {'full precision': value_distribution(rectified)}
    if not isinstance(irm, nn.Identity):
        # A channel that IRM multiplies by next to nothing never reaches the codes, and may have any values before:
        # calibration puts what LayerNorm is to subtract there.
        weight = irm.weight.detach().abs()
        kept = weight > 1e-2 * weight.max()
        projected, rectified = projected[..., kept], rectified[..., kept]
    if isinstance(irm, nn.Identity):
        row = {'before quantization': value_distribution(rectified)}
    else:
        row = {'before IRM': value_distribution(projected), 'after IRM': value_distribution(rectified)}
    if stages.act is not None:
        qn, qp = stages.act.code_range
        codes = stages.codes[:, heads].flatten() - qn
        row['codes'] = code_distribution(torch.bincount(codes, minlength=qp - qn + 1).numpy(), qn)
    return row


def compare_qk(networks: Mapping[str, nn.Module], images: Tensor, blocks: Sequence[int], heads: Sequence[int] | None,
               ) -> dict[str, dict[str, Distribution]]:
    """The rows of a figure: queries and keys of the blocks, of the last network and of those before, the teachers.

    Args:
        blocks: counted from 0, or from the end if negative.
        heads: likewise, None for all; taken together.

    Raises:
        UserError: there is no such block or head.
    """
    *_, student = networks.values()
    blocks = _counted_from_0('--blocks', blocks, len(student.blocks))
    said = '' if heads is None else f', head{"s" if len(heads) > 1 else ""} ' + ' '.join(map(str, _counted_from_0(
        '--heads', heads, attentions(student)[0].num_heads)))
    rows: dict[str, dict] = {f'{name}, block {block}{said}': {} for block in blocks for name in ('q', 'k')}
    for model in networks.values():
        count = attentions(model)[0].num_heads
        chosen = range(count) if heads is None else _counted_from_0('--heads', heads, count)
        for row, found in zip(rows.values(), qk_distributions(model, images, blocks, chosen), strict=True):
            row.update({stage if model is student else f'teacher: {stage}': value for stage, value in found.items()})
    return rows


# --- codes ------------------------------------------------------------------------------------------------------------


def code_usage(model: nn.Module, images: Tensor) -> dict[str, CodeStatistics]:
    """`code_statistics` of a network that must have codes.

    Raises:
        UserError: it has none.
    """
    found = code_statistics(model, images)
    if not found:
        raise UserError(f'{type(model).__name__} has no codes: choose the checkpoint of a quantized network')
    return found


def usage_table(usage: Mapping[str, CodeStatistics]) -> str:
    """A line for each quantizer."""
    lines = [f'{"quantizer":<28} {"bits":>4} {"entropy":>7} {"of bits":>7} {"clipped":>7}']
    for name, item in usage.items():
        lines.append(f'{name:<28} {item.distribution.bits:>4} {item.distribution.entropy:>7.2f} '
                     f'{item.relative_entropy:>7.1%} {item.clipped:>7.2%}')
    return '\n'.join(lines)


# --- what is compared -------------------------------------------------------------------------------------------------


def title(model: nn.Module) -> str:
    """'4 bits', '2-bit weights, 4-bit activations', or 'full precision'."""
    quant = getattr(model, 'quant', None)
    if quant is None:
        return 'full precision'
    if quant.weight_bits == quant.act_bits:
        return f'{quant.act_bits} bits'
    return f'{quant.weight_bits}-bit weights, {quant.act_bits}-bit activations'


def _counted_from_0(flag: str, chosen: Sequence[int], count: int) -> list[int]:
    """The numbers that a flag chose, each once, negative ones counted from the end.

    Raises:
        UserError: one is out of range.
    """
    for number in chosen:
        if not -count <= number < count:
            raise UserError(f'{flag} {number}: there are {count}, from 0 to {count - 1}')
    return list(dict.fromkeys(number % count for number in chosen))


# --- logs of runs -----------------------------------------------------------------------------------------------------


def read_log(path: Path) -> dict[str, np.ndarray]:
    """The epochs of a run's log.txt (or of its folder): epoch, and by their names all numbers of every line.

    Raises:
        UserError: there is no such file, or a line of it is not a JSON object with an epoch.
    """
    path = path / 'log.txt' if path.is_dir() else path
    records = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            records.append(parse_epoch(line))
        except ValueError as error:
            raise UserError(f'{path}, line {number} is no record of an epoch: name the log.txt of a run') from error
    if not records:
        raise UserError(f'{path} has no epochs yet')
    names = dict.fromkeys(name for record in records for name in record)
    return {name: np.array([record.get(name, math.nan) for record in records], dtype=float) for name in names}


def read_logs(runs: Sequence[Path]) -> dict[str, dict[str, np.ndarray]]:
    """`read_log` of each run, by the name of its folder, or by the whole path where folders have the same name."""
    logs = {path: read_log(path) for path in dict.fromkeys(runs)}
    names = [(path if path.suffix != '.txt' else path.parent).resolve().name for path in logs]
    if len(set(names)) < len(names):
        names = list(map(str, logs))
    return dict(zip(names, logs.values(), strict=True))
