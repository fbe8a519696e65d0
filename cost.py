"""What a network costs: parameters, bytes, multiply-accumulates, bit operations, operations; a report of them.

    python cost.py --model fourbits_deit_small_patch16_224
    python cost.py --model twobits_deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 --input-size 384
    python cost.py --model fourbits_deit_small_patch16_224 --weight-bits 3 --act-bits 8 --per-layer --format csv
    python cost.py --checkpoint out/best_checkpoint.pth --packed model.qvit.safetensors
    python cost.py --model fourbits_deit_tiny_patch16_224 --manifest        every tensor of the forward with its bits
    python cost.py --model fourbits_deit_small_patch16_224 --countings      the same network by other conventions

All counts are of one image, and follow from the network's modules and shapes:

    MACs    multiply-accumulates of the linear layers, the patch embedding and the two products of each attention
    BOPs    sum of MACs x bits of one operand x bits of the other: weight and activation, q and k, attention and v;
            full precision is 32 x 32
    OPs     full-precision FLOPs + 1/32, 1/16, 1/8, 1/4 of the 2-, 3-, 4-, 8-bit multiplications, as the line of work
            from Bi-Real Net to Q-ViT counts; a FLOP is there a multiply-accumulate, its addition included. Other widths
            count as the next wider one of these, operands of two widths as the wider
    size    the weight codes' bits, 32 bits for every other value (biases, LayerNorms, embeddings, steps, zero points),
            and one bit for each activation quantizer's sign; MB are 10^6 bytes

Elementwise work (LayerNorm, softmax, GELU, residual sums, the quantizers) is in none of them, as is usual; --countings
shows what it would change. The full-precision columns are of the same network at 32 bits, without IRM and quantizers.
"""
from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn as nn

from analysis.precision import FULL_PRECISION_BITS, Product, TensorUse, analyse, manifest
from checkpoints.files import read_checkpoint
from checkpoints.networks import create_from_checkpoint, load_quantized
from training.networks import build_student
from utils import UserError, report

__all__ = ['Size', 'bops', 'countings', 'layers', 'ops', 'render', 'summary', 'theoretical_size', 'write_text']

OPS_OF_BITS = ((2, 1 / 32), (3, 1 / 16), (4, 1 / 8), (8, 1 / 4))
Row = dict[str, Any]


# --- conventions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Stored bits of a network.

    Attributes:
        codes: the quantized weights' codes.
        steps, zero_points: the quantizers'.
        signs: one bit for each activation quantizer.
        full_precision: every other parameter.
    """
    codes: int
    steps: int
    zero_points: int
    signs: int
    full_precision: int

    @property
    def bits(self) -> int:
        return self.codes + self.steps + self.zero_points + self.signs + self.full_precision

    @property
    def bytes(self) -> int:
        """Rounded up to whole bytes."""
        return -(-self.bits // 8)


def theoretical_size(model: nn.Module) -> Size:
    """What the network's parameters take with every weight code at its bits, without a file's headers and padding.

    Args:
        model: a quantized network, or a full-precision DeiT, whose parameters are all `full_precision`.

    Raises:
        UserError: see `precision.analyse`.
    """
    return _size(analyse(model)[0])


def _size(tensors: list[TensorUse]) -> Size:
    stored = [tensor for tensor in tensors if tensor.parameter]
    return Size(codes=sum(tensor.elements * tensor.bits for tensor in stored if tensor.quantizer),
                steps=FULL_PRECISION_BITS * sum(tensor.steps for tensor in tensors),
                zero_points=FULL_PRECISION_BITS * sum(tensor.zero_points for tensor in tensors),
                signs=sum(tensor.quantizer is not None for tensor in tensors if not tensor.parameter),
                full_precision=sum(tensor.elements * tensor.bits for tensor in stored if not tensor.quantizer))


def bops(product: Product) -> int:
    """Bit operations: multiply-accumulates x bits x bits."""
    return product.macs * product.bits[0] * product.bits[1]


def ops(product: Product) -> float:
    """Operations: full-precision multiply-accumulates, or the share of one that a narrower counts as."""
    wider = max(product.bits)
    return product.macs * next((share for bits, share in OPS_OF_BITS if wider <= bits), 1.)


def _full_precision_bops(macs: int) -> int:
    return macs * FULL_PRECISION_BITS ** 2


# --- reports: rows of raw numbers -------------------------------------------------------------------------------------


def summary(name: str, model: nn.Module, packed: int | None = None) -> Row:
    """One row for a network: its size and operations beside those of the full-precision one.

    Args:
        name: what to call it.
        packed: bytes of its packed file, where there is one.
    """
    tensors, products = analyse(model)
    quant, (height, width) = getattr(model, 'quant', None), model.patch_embed.img_size
    macs, bit_operations, operations = (sum(map(count, products)) for count in (lambda p: p.macs, bops, ops))
    size = _size(tensors).bytes
    reference_size = _reference_bytes(tensors)
    return {
        'model': name, 'weight_bits': quant.weight_bits if quant else FULL_PRECISION_BITS,
        'act_bits': quant.act_bits if quant else FULL_PRECISION_BITS,
        'input_size': height if height == width else f'{height}x{width}',
        'parameters': sum(parameter.numel() for parameter in model.parameters()),
        'size_bytes': size, 'full_precision_size_bytes': reference_size, 'size_ratio': reference_size / size,
        **({} if packed is None else {'packed_bytes': packed, 'packed_ratio': reference_size / packed}),
        'macs': macs,
        'bops': bit_operations, 'full_precision_bops': _full_precision_bops(macs),
        'bops_ratio': _full_precision_bops(macs) / bit_operations,
        'ops': operations, 'full_precision_ops': macs, 'ops_ratio': macs / operations}


def _reference_bytes(tensors: list[TensorUse]) -> int:
    return sum(tensor.elements for tensor in tensors if tensor.parameter and tensor.in_reference) * (
        FULL_PRECISION_BITS // 8)


def layers(model: nn.Module) -> list[Row]:
    """One row for each product of the forward, one for the parameters of no product, one for all."""
    tensors, products = analyse(model)
    rows, left = [], list(tensors)
    for product in products:
        own = [] if product.is_attention else [tensor for tensor in tensors if _belongs(tensor, product.layer)]
        left = [tensor for tensor in left if tensor not in own]
        rows.append(_layer_row(product.layer, 'x'.join(map(str, product.bits)), own, [product]))
    rows.append(_layer_row('other', str(FULL_PRECISION_BITS), left, []))
    return [*rows, _layer_row('all', '', tensors, products)]


def _belongs(tensor: TensorUse, layer: str) -> bool:
    return tensor.name.startswith(f'{layer}.') and (tensor.parameter or tensor.quantizer == f'{layer}.act')


def _layer_row(name: str, bits: str, tensors: list[TensorUse], products: list[Product]) -> Row:
    macs, operations = sum(product.macs for product in products), sum(map(ops, products))
    return {'layer': name, 'bits': bits, 'size_bytes': _size(tensors).bits / 8,
            'full_precision_size_bytes': _reference_bytes(tensors), 'macs': macs, 'bops': sum(map(bops, products)),
            'full_precision_bops': _full_precision_bops(macs), 'ops': operations, 'full_precision_ops': macs,
            'ops_ratio': macs / operations if operations else None}


def countings(model: nn.Module) -> list[Row]:
    """The ratio of full precision to the network by several conventions, each of which someone could mean."""
    tensors, products = analyse(model)
    work, reference_work = sum(t.work for t in tensors), sum(t.reference_work for t in tensors)
    macs = sum(product.macs for product in products)

    def edges(product: Product) -> bool:
        return not product.layer.startswith('blocks.')

    def attention(product: Product) -> bool:
        return product.is_attention

    def counted(full_precision: Callable[[Product], bool] = lambda _: False) -> float:
        return sum(product.macs if full_precision(product) else ops(product) for product in products)

    blocks = [product for product in products if not edges(product) and not attention(product)]
    rows = [
        ('linear layers of the blocks alone', sum(p.macs for p in blocks), sum(map(ops, blocks))),
        ('OPs, as this report counts', macs, counted()),
        ('without the attention products, in both networks', sum(p.macs for p in products if not attention(p)),
         sum(ops(p) for p in products if not attention(p))),
        ('patch embedding and heads at full precision', macs, counted(edges)),
        ('one of the two attention products at full precision', macs, counted(lambda p: p.layer.endswith(' q k^T'))),
        ('both attention products at full precision', macs, counted(attention)),
        ('both, and patch embedding and heads', macs, counted(lambda p: edges(p) or attention(p))),
        ('OPs, and elementwise work of the full-precision kind', macs + reference_work, counted() + reference_work),
        ('OPs, and all elementwise work, quantizers and IRM included', macs + reference_work, counted() + work),
        ('the same, patch embedding and heads at full precision', macs + reference_work, counted(edges) + work),
        ('additions apart and in full (2 FLOPs a MAC)', 2 * macs, macs + counted()),
        ('BOPs', _full_precision_bops(macs), sum(map(bops, products)))]
    return [{'counting': name, 'full_precision': full, 'network': own, 'ratio': full / own} for name, full, own in rows]


# --- formats ----------------------------------------------------------------------------------------------------------

_GIGA, _MEGA = (1e9, '.3f'), (1e6, '.2f')
_SHOWN = {  # key: (heading, unit, form) where they differ from the key and the plain value
    'weight_bits': ('W bits', 1, 'd'), 'act_bits': ('A bits', 1, 'd'), 'input_size': ('px', 1, ''),
    'parameters': ('params (M)', *_MEGA), 'size_bytes': ('size (MB)', *_MEGA),
    'full_precision_size_bytes': ('FP size (MB)', *_MEGA), 'size_ratio': ('size ratio', 1, '.2f'),
    'packed_bytes': ('packed (MB)', *_MEGA), 'packed_ratio': ('packed ratio', 1, '.2f'), 'macs': ('MACs (G)', *_GIGA),
    'bops': ('BOPs (G)', 1e9, '.1f'), 'full_precision_bops': ('FP BOPs (G)', 1e9, '.1f'),
    'bops_ratio': ('BOPs ratio', 1, '.2f'), 'ops': ('OPs (G)', *_GIGA), 'full_precision_ops': ('FP OPs (G)', *_GIGA),
    'ops_ratio': ('OPs ratio', 1, '.2f'), 'full_precision': ('FP (G)', *_GIGA), 'network': ('network (G)', *_GIGA),
    'ratio': ('ratio', 1, '.2f'), 'zero_points': ('zero points', 1, 'd')}


def render(rows: list[Row], form: str) -> str:
    """Rows with the same keys as text: 'json' and 'csv' with raw numbers, 'table' and 'markdown' with units."""
    if form == 'json':
        return json.dumps(rows, indent=2) + '\n'
    if form == 'csv':
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
    cells = [[_shown(key, value) for key, value in row.items()] for row in rows]
    table = [[_SHOWN.get(key, (key,))[0] for key in rows[0]], *cells]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    right = [isinstance(value, int | float) for value in rows[0].values()]
    lines = [[text.rjust(width) if is_right else text.ljust(width)
              for text, width, is_right in zip(row, widths, right, strict=True)] for row in table]
    if form == 'table':
        return ''.join('  '.join(line).rstrip() + '\n' for line in lines)
    rule = ['-' * (width - 1) + (':' if is_right else '-') for width, is_right in zip(widths, right, strict=True)]
    return ''.join(f'| {" | ".join(line)} |\n' for line in [lines[0], rule, *lines[1:]])


def _shown(key: str, value: Any) -> str:
    if value is None:
        return ''
    _, unit, form = _SHOWN.get(key, (key, 1, ''))
    return str(value) if isinstance(value, str) else format(value if unit == 1 else value / unit, form)


def write_text(text: str, path: str | Path) -> None:
    """Writes beside `path` and renames, so that `path` is always a whole file."""
    path = Path(path)
    beside = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        beside.write_text(text)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


# --- command line -----------------------------------------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add('--model', nargs='+', default=[], metavar='NAME', help='networks of the registry, quantized or full-precision')
    add('--input-size', '--img-size', type=int, help='image size, 224 unless the checkpoint says another')
    add('--weight-bits', type=int, help="bits of the blocks' weights, instead of the variant's")
    add('--act-bits', type=int, help="bits of the blocks' activations, instead of the variant's")
    add('--model-kwargs', nargs='+', default=[], metavar='KEY=VALUE', help='as of main.py, e.g. irm=False')
    add('--num-classes', type=int, help='1000 unless the checkpoint says another')
    add('--checkpoint', metavar='FILE', help='count the network of this file; one that does not say which needs '
                                             '--model')
    add('--packed', metavar='FILE', help="the network's packed file, for its real bytes")
    which = parser.add_mutually_exclusive_group()
    which.add_argument('--per-layer', action='store_true', help='a row for each product of the forward')
    which.add_argument('--manifest', action='store_true', help='a row for each tensor of the forward, with its bits')
    which.add_argument('--countings', action='store_true', help='the ratio by several conventions')
    add('--format', default='table', choices=('table', 'markdown', 'json', 'csv'), help='json and csv hold raw numbers '
        '(default: table)')
    add('--output', metavar='FILE', help='instead of standard output')
    return parser


def _networks(args: Namespace) -> list[tuple[str, nn.Module]]:
    """(name, network) of everything that the flags name."""
    from main import check_args, parse_args  # here: main.py imports the trainer, whose model card imports this module

    options = [*args.model_kwargs, *(f'{name}={getattr(args, name)}' for name in ('weight_bits', 'act_bits')
                                     if getattr(args, name) is not None)]
    checkpoint, num_classes = read_checkpoint(args.checkpoint) if args.checkpoint else None, args.num_classes or 1000
    if checkpoint is not None and 'qvit' in checkpoint:
        if args.model or args.input_size or args.num_classes or options:
            raise UserError(f'{args.checkpoint} says which network it holds: leave --model and its options out')
        return [(checkpoint['qvit']['model'], create_from_checkpoint(checkpoint))]
    if checkpoint is not None and len(args.model) != 1:
        raise UserError(f'{args.checkpoint} does not say which network it holds: name it with --model')
    if not args.model:
        raise UserError('nothing to count: name networks with --model, or give a --checkpoint')
    if checkpoint is not None:
        head = checkpoint.get('model', checkpoint).get('head.weight')
        num_classes = num_classes if head is None else len(head)

    networks = []
    for name in args.model:
        flags = parse_args(['--model', name, '--input-size', str(args.input_size or 224), '--drop-path', '0',
                            *(['--model-kwargs', *options] if options else [])])
        check_args(flags)
        networks.append((name, build_student(flags, num_classes)))
        if checkpoint is not None:
            load_quantized(networks[-1][1], checkpoint)
    return networks


def _rows(args: Namespace) -> list[Row]:
    if args.num_classes is not None and args.num_classes < 1:
        raise UserError(f'--num-classes {args.num_classes}: choose at least 1')
    networks, packed = _networks(args), None
    if args.packed:
        if len(networks) > 1 or args.per_layer or args.manifest or args.countings:
            raise UserError('--packed adds a column to the row of one network: name one, without another report')
        if not os.path.isfile(args.packed):
            raise UserError(f'--packed {args.packed}: no such file')
        packed = os.stat(args.packed).st_size
    rows = []
    for name, model in networks:
        if args.per_layer or args.manifest or args.countings:
            own = layers(model) if args.per_layer else manifest(analyse(model)[0]) if args.manifest else (
                countings(model))
            rows += [{'model': name} | row for row in own] if len(networks) > 1 else own
        else:
            rows.append(summary(name, model, packed))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    args = get_args_parser().parse_args(argv)
    try:
        text = render(_rows(args), args.format)
        if args.output:
            try:
                write_text(text, args.output)
            except OSError as error:
                raise UserError(f'--output {args.output} cannot be written ({error.strerror})') from error
        else:
            print(text, end='')
    except UserError as error:
        report(error)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
