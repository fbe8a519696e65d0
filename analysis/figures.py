"""Drawing with matplotlib: what this wing measured becomes figures, readable without colours."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from analysis.codes import CodeStatistics, Distribution
from utils import UserError, write_whole

__all__ = ['SUFFIXES', 'attention_figure', 'check_output', 'codes_figure', 'curves_figure', 'distance_figure',
           'qk_figure', 'save', 'sensitivity_figure']

SUFFIXES = ('.png', '.pdf')
STYLE = {
    'font.size': 8, 'axes.titlesize': 8, 'axes.labelsize': 8, 'xtick.labelsize': 7, 'ytick.labelsize': 7,
    'legend.fontsize': 7, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.linewidth': 0.6,
    'lines.linewidth': 1.2, 'lines.markersize': 4, 'legend.frameon': False, 'image.cmap': 'cividis',
    'pdf.fonttype': 42, 'savefig.dpi': 150,  # 42: TrueType, which journals ask for, not bitmaps
}
DARK, MIDDLE, LIGHT = '#00224e', '#7c7b78', '#bcae6c'  # of cividis, by lightness
WIDTH = 6.75  # inches, the text of a two-column page
KINDS = (  # of a block's quantizers, by the end of their names: weights, inputs of layers, operands of attention
    ('attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2'),
    ('attn.qkv.act', 'attn.proj.act', 'mlp.fc1.act', 'mlp.fc2.act'),
    ('attn.q_act', 'attn.k_act', 'attn.v_act', 'attn.attn_act'))
KIND_TITLES = (('qkv weight', 'proj weight', 'fc1 weight', 'fc2 weight'),
               ('qkv input', 'proj input', 'fc1 input', 'fc2 input'),
               ('q', 'k', 'v', 'attention'))


def check_output(path: Path) -> None:
    """Refuses a path that `save` could not write to.

    Raises:
        UserError: unknown suffix, or no such folder.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f'--output {path}: choose a name that ends in {" or ".join(SUFFIXES)}')
    if not path.parent.is_dir():
        raise UserError(f'--output {path}: there is no folder {path.parent}')


@rc_context(STYLE)
def save(figure: Figure, path: Path) -> None:
    """Writes the figure in the format that the suffix names."""
    try:
        write_whole(path, lambda beside: figure.savefig(beside, format=path.suffix[1:].lower()))
    except OSError as error:
        raise UserError(f'--output {path} cannot be written ({error.strerror}): choose another') from error


@rc_context(STYLE)
def qk_figure(rows: Mapping[str, Mapping[str, Distribution]]) -> Figure:
    """A histogram for each stage (columns) of each row's tensor, with its entropy."""
    columns = list(dict.fromkeys(title for row in rows.values() for title in row))
    figure = Figure((WIDTH, 0.35 + 1.2 * len(rows)), layout='constrained')
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes, (label, row) in zip(grid, rows.items(), strict=True):
        for ax, title in zip(axes, columns, strict=True):
            if title not in row:
                ax.set_axis_off()
                continue
            _draw_distribution(ax, row[title])
        axes[0].set_ylabel(label.replace(', head', '\nhead'))
    for ax, title in zip(grid[0], columns, strict=True):
        ax.set_title(title)
    for column, title in zip(grid.T, columns, strict=True):
        lowest = next(ax for ax, row in zip(column[::-1], list(rows.values())[::-1], strict=True) if title in row)
        lowest.set_xlabel('code (share of each)' if title.endswith('codes') else 'value (density)')
    return figure


def _draw_distribution(ax: Axes, distribution: Distribution) -> None:
    positions, heights, entropy, bits = distribution
    if bits is None:
        ax.stairs(heights, positions, fill=True, color=MIDDLE)
        text = f'h = {entropy:.2f} bits'
        ax.set_yticks([])
    else:
        ax.bar(positions, heights, width=0.8, color=DARK)
        text = f'H = {entropy:.2f} of {bits} bits'
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.yaxis.set_major_locator(MaxNLocator(3))
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set_ylim(0, 1.25 * heights.max())  # room for the text
    ax.text(0.99, 0.99, text, transform=ax.transAxes, ha='right', va='top', fontsize=7)


@rc_context(STYLE)
def attention_figure(pictures: np.ndarray, maps: Mapping[str, np.ndarray], per_head: bool, block: str) -> Figure:
    """Attention of the class token over the pictures. The maps of a network on an image share a scale, from 0 to their
    maximum.

    Colours follow the square root of the attention, which else would show few patches but the strongest.

    Args:
        pictures: (B, height, width, 3), from 0 to 1.
        maps: by the network's name, (B, H, rows, columns).
        per_head: also draw each head, with a row for each network; else only the mean over the heads, side by side.
        block: which one it is, for the title.
    """
    titles = list(maps)
    if per_head:
        heads = max(map_.shape[1] for map_ in maps.values())
        columns = ['mean', *(f'head {head}' for head in range(heads))]
        rows = [(image, [(name, None), *((name, head) for head in range(maps[name].shape[1]))])
                for image in range(len(pictures)) for name in titles]
    else:
        columns, rows = titles, [(image, [(name, None) for name in titles]) for image in range(len(pictures))]
    cell = min(1.5, max(0.8, (WIDTH - 0.6) / (1 + len(columns))))  # below 0.8 inches titles would run together
    bars = 0.7 * (1 if per_head else len(columns))
    figure = Figure((cell * (1 + len(columns)) + bars, 0.5 + cell * len(rows)), layout='constrained')
    grid = figure.subplots(len(rows), 1 + len(columns), squeeze=False)
    for ax in grid.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for axes, (image, cells) in zip(grid, rows, strict=True):
        picture = pictures[image]
        axes[0].imshow(picture)
        if per_head:
            axes[0].set_ylabel(cells[0][0].replace(' (', '\n('))
        for ax, (name, head) in zip(axes[1:], cells, strict=False):
            values = _map(maps, image, name, head)
            top = max(_map(maps, image, other, number).max() for other, number in cells if other == name)
            scale = PowerNorm(0.5, 0, top)
            ax.imshow(0.4 * picture.mean(-1), cmap='gray', vmin=0, vmax=1)
            drawn = ax.imshow(values, norm=scale, alpha=0.25 + 0.75 * np.asarray(scale(values)),
                              extent=(-0.5, picture.shape[1] - 0.5, picture.shape[0] - 0.5, -0.5))
            if not per_head or ax is axes[len(cells)]:
                bar = figure.colorbar(ScalarMappable(drawn.norm), ax=list(axes) if per_head else ax, aspect=12,
                                      fraction=0.04 if per_head else 0.06, pad=0.01, ticks=[0, top / 4, top],
                                      format='%.3f')
                bar.outline.set_visible(False)
                bar.set_label('attention')
        for ax in axes[1 + len(cells):]:
            ax.set_visible(False)
    figure.suptitle(f'attention of the class token to the patches, {block}', fontsize=8)
    for ax, title in zip(grid[0], ['image', *columns], strict=True):
        ax.set_title(title)
    return figure


def _map(maps: Mapping[str, np.ndarray], image: int, name: str, head: int | None) -> np.ndarray:
    """(rows, columns) of one head, or of the mean over heads."""
    return maps[name][image].mean(0) if head is None else maps[name][image, head]


@rc_context(STYLE)
def distance_figure(distances: Mapping[str, np.ndarray]) -> Figure:
    """Mean attention distance, a mark for each head and a line through the means of the blocks.

    Args:
        distances: by the network's name, (blocks, H), in pixels.
    """
    figure = Figure((WIDTH / 2, 2.6), layout='constrained')
    ax = figure.subplots()
    shift = 0.12 * (len(distances) - 1)
    looks = (('o', '-', DARK, DARK), ('s', '--', LIGHT, 'none'))
    for index, (name, values) in enumerate(distances.items()):
        marker, line, colour, face = looks[index]
        blocks = np.arange(len(values)) - shift + 0.24 * index
        ax.plot(blocks, values, marker, color=colour, markerfacecolor=face, markersize=3.5)
        ax.plot(blocks, values.mean(1), line, color=colour, label=name)
    ax.set(xlabel='block', ylabel='mean attention distance (pixels)')
    ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    figure.legend(loc='outside upper center', ncols=len(distances), title='mark: one head; line: mean of the heads',
                  title_fontsize=7)
    return figure


@rc_context(STYLE)
def codes_figure(usage: Mapping[str, CodeStatistics]) -> Figure:
    """Shares of the codes of all blocks: a panel for each kind of quantizer, a line in it for each block.

    Colours follow the square root of the share. Beside each panel, the codes' entropy relative to their bits (bars)
    and the share of clipped values (crosses). Quantizers outside the blocks are not drawn.
    """
    blocks = 1 + max(int(name.split('.')[1]) for name in usage if name.startswith('blocks.'))
    table = [[[usage.get(f'blocks.{block}.{kind}') for block in range(blocks)] for kind in kinds] for kinds in KINDS]
    table = [row for row in table if row[0][0] is not None]  # without quantized attention, its row is missing
    items = [item for row in table for panel in row for item in panel]
    scale = PowerNorm(0.5, 0, max(item.distribution.heights.max() for item in items))
    most_clipped = max(0.01, math.ceil(100 * max(item.clipped for item in items)) / 100)
    figure = Figure((WIDTH, 0.6 + 1.75 * len(table)), layout='constrained')
    grid = figure.subplots(len(table), 8, squeeze=False, width_ratios=[3, 1.3] * 4)
    for axes, row, titles in zip(grid, table, KIND_TITLES, strict=False):
        for ax, side, panel, title in zip(axes[::2], axes[1::2], row, titles, strict=True):
            _draw_shares(ax, panel, scale)
            ax.set_title(title)
            ax.tick_params(labelleft=ax is axes[0])
            handles = _draw_side(side, panel, most_clipped)
        axes[0].set_ylabel('block')
    for ax in grid[-1, ::2]:
        ax.set_xlabel('code')
    figure.legend(handles=handles, loc='outside lower center', ncols=2)
    bar = figure.colorbar(ScalarMappable(scale), ax=list(grid.flat), fraction=0.02, pad=0.01, aspect=40,
                          format=PercentFormatter(1, decimals=0))
    bar.set_label('share of the code')
    bar.outline.set_visible(False)
    return figure


def _draw_shares(ax: Axes, panel: Sequence[CodeStatistics], scale: PowerNorm) -> None:
    """An image of blocks by codes. Codes that a block lacks, being unsigned where others are signed, stay white."""
    low = min(item.distribution.positions[0] for item in panel)
    high = max(item.distribution.positions[-1] for item in panel)
    image = np.full((len(panel), high - low + 1), np.nan)
    for line, item in zip(image, panel, strict=True):
        line[item.distribution.positions - low] = item.distribution.heights
    ax.imshow(image, aspect='auto', norm=scale, interpolation='none',
              extent=(low - 0.5, high + 0.5, len(panel) - 0.5, -0.5))
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))


def _draw_side(ax: Axes, panel: Sequence[CodeStatistics], most_clipped: float) -> list[Artist]:
    """Entropies as bars along the lower axis, shares of clipped values as crosses along the upper one."""
    blocks = np.arange(len(panel))
    bars = ax.barh(blocks, [item.relative_entropy for item in panel], height=0.7, color=LIGHT,
                   label='entropy of the codes / bits (lower axis)')
    ax.set(xlim=(0, 1), ylim=(len(panel) - 0.5, -0.5), xticks=[0, 1], yticks=[])
    upper = ax.twiny()
    crosses, = upper.plot([item.clipped for item in panel], blocks, 'x', color=DARK, markersize=3, clip_on=False,
                          label='share of clipped values (upper axis)')
    upper.set(xlim=(0, most_clipped), xticks=[0, most_clipped], xticklabels=['0', f'{most_clipped:.0%}'])
    upper.spines.top.set_visible(True)
    return [bars, crosses]


@rc_context(STYLE)
def sensitivity_figure(found: Mapping[str, np.ndarray]) -> Figure:
    """A cell for each tensor (rows, named as in `codes_figure`) and block: the divergence that it alone brings about.

    Colours follow the square root, which leaves small differences visible.

    Args:
        found: as `analysis.sensitivity.sensitivity` gives it, in nats.
    """
    titles = {name: title for names, kinds in zip(KINDS, KIND_TITLES, strict=True)
              for name, title in zip(names, kinds, strict=True)}
    values = 1000 * np.array(list(found.values()))
    rows, blocks = values.shape
    figure = Figure((WIDTH, 0.8 + 0.22 * rows), layout='constrained')
    ax = figure.subplots()
    scale = PowerNorm(0.5, 0, max(values.max(), 1e-9))
    image = ax.imshow(values, norm=scale, aspect='auto')
    for row, column in np.ndindex(rows, blocks):
        is_bright = scale(values[row, column]) > 0.5
        ax.text(column, row, f'{values[row, column]:.1f}', ha='center', va='center', fontsize=6,
                color='black' if is_bright else 'white')
    ax.set(xticks=range(blocks), xlabel='block', yticks=range(rows), yticklabels=[titles[name] for name in found])
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    figure.colorbar(image, ax=ax, label='KL divergence (1/1000 nat)')
    return figure


@rc_context(STYLE)
def curves_figure(logs: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Training loss and top-1 accuracy by epoch, a line for each run; dotted: its teacher's accuracy, where logged.

    Args:
        logs: by the run's name, `inspection.read_log`.
    """
    figure = Figure((WIDTH, 2.3), layout='constrained')
    panels = figure.subplots(1, 2)
    lines, colours = ('-', '--', '-.', ':'), (DARK, MIDDLE, LIGHT)
    for index, (name, log) in enumerate(logs.items()):
        look = {'linestyle': lines[index % len(lines)], 'color': colours[index % len(colours)],
                'marker': 'os^Dv'[index % 5], 'markersize': 3}
        for ax, key in zip(panels, ('train_loss', 'test_acc1'), strict=True):
            if key in log:
                ax.plot(log['epoch'], log[key], label=name, **look)
        if 'teacher_acc1' in log:
            panels[1].axhline(np.nanmax(log['teacher_acc1']), linestyle=(0, (1, 2)), linewidth=1, color=look['color'],
                              label=f'teacher of {name}')
    for ax, label in zip(panels, ('training loss', 'top-1 accuracy (%)'), strict=True):
        ax.set(xlabel='epoch', ylabel=label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if ax.lines:
            ax.legend()
    return figure
