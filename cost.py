"""What a network costs: parameters, bytes, multiply-accumulates, bit operations, operations; a report of them.

    python cost.py --model fourbits_deit_small_patch16_224
    python cost.py --model twobits_deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 --input-size 384
    python cost.py --model fourbits_deit_small_patch16_224 --weight-bits 3 --act-bits 8 --per-layer --format csv
    python cost.py --checkpoint out/best_checkpoint.pth --packed model.qvit.safetensors
    python cost.py --model fourbits_deit_tiny_patch16_224 --manifest        every tensor of the forward with its bits
    python cost.py --model fourbits_deit_small_patch16_224 --countings      the same network by other conventions
"""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch.nn as nn

from analysis.cost import CONVENTIONS, Row, countings, layers, render, summary
from analysis.precision import analyse, manifest
from checkpoints.descriptions import check_options
from checkpoints.networks import create_network, open_checkpoint, read_network
from console.parser import Parser, key_value, path_text
from files.paths import check_file
from training.flags import bits, class_count, image_size
from utils import UserError, entry_point, write_whole_text


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=f'{__doc__ or ""}\n{CONVENTIONS}', allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--model', nargs='+', default=[], metavar='NAME', help='networks of the registry, quantized or full-precision')
    add('--input-size', '--img-size', type=image_size, help='image size, 224 unless the checkpoint says another')
    add('--weight-bits', type=bits, help="bits of the blocks' weights, instead of the variant's")
    add('--act-bits', type=bits, help="bits of the blocks' activations, instead of the variant's")
    add('--model-kwargs', nargs='+', default=[], type=key_value, metavar='KEY=VALUE', help='as of main.py, e.g. '
        'irm=False')
    add('--num-classes', type=class_count, help='1000 unless the checkpoint says another')
    add('--checkpoint', metavar='FILE', type=path_text, help='count the network of this file; one that does not say '
        'which needs --model')
    add('--packed', metavar='FILE', type=path_text, help="the network's packed file, for its real bytes")
    which = parser.add_mutually_exclusive_group()
    which.add_argument('--per-layer', action='store_true', help='a row for each product of the forward')
    which.add_argument('--manifest', action='store_true', help='a row for each tensor of the forward, with its bits')
    which.add_argument('--countings', action='store_true', help='the ratio by several conventions')
    add('--format', default='table', choices=('table', 'markdown', 'json', 'csv'), help='json and csv hold raw numbers '
        '(default: table)')
    add('--output', metavar='FILE', type=path_text, help='instead of standard output')
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Refuses contradictions and missing files, before any network is built.

    Raises:
        UserError: the first of them, in one line.
    """
    check_options(dict(args.model_kwargs))
    if args.checkpoint is None and not args.model:
        raise UserError('nothing to count: name networks with --model, or give a --checkpoint')
    if args.packed is None:
        return
    if len(args.model) > 1 or args.per_layer or args.manifest or args.countings:
        raise UserError('--packed adds a column to the row of one network: name one, without another report')
    check_file(args.packed, f'--packed {args.packed}')


def networks(args: argparse.Namespace) -> list[tuple[str, nn.Module]]:
    """(name, network) of everything that the flags name.

    Raises:
        UserError: a network cannot be built, or a file does not hold the one that the flags say.
    """
    precision = {name: getattr(args, name) for name in ('weight_bits', 'act_bits') if getattr(args, name) is not None}
    kwargs = dict(args.model_kwargs) | precision
    if args.checkpoint is None:
        return [(name, create_network(name, args.num_classes or 1000, args.input_size or 224, **kwargs))
                for name in args.model]
    checkpoint = read_network(args.checkpoint)
    if 'qvit' in checkpoint and (args.model or args.input_size or args.num_classes or kwargs):
        raise UserError(f'{args.checkpoint} says which network it holds: leave --model and its options out')
    if len(args.model) > 1:
        raise UserError(f'{args.checkpoint} does not say which network it holds: name it with --model')
    opened = open_checkpoint(args.checkpoint, checkpoint, *args.model, model_kwargs=kwargs, input_size=args.input_size)
    return [(opened.info.model, opened.model)]


def rows(args: argparse.Namespace) -> list[Row]:
    """The report that the flags ask for; with several networks its rows say which of them they are of."""
    named = networks(args)
    if not (args.per_layer or args.manifest or args.countings):
        packed = os.stat(args.packed).st_size if args.packed else None
        return [summary(name, model, packed) for name, model in named]
    found = []
    for name, model in named:
        own = (layers(model) if args.per_layer else manifest(analyse(model)[0]) if args.manifest else countings(model))
        found += [{'model': name} | row for row in own] if len(named) > 1 else own
    return found


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; returns its exit status."""
    args = get_args_parser().parse_args(argv)
    check_args(args)
    text = render(rows(args), args.format)
    if args.output:
        try:
            write_whole_text(args.output, text)
        except OSError as error:
            raise UserError(f'--output {args.output} cannot be written ({error.strerror})') from error
    else:
        print(text, end='')


if __name__ == '__main__':
    sys.exit(main())
