"""What a network costs: parameters, bytes, multiply-accumulates, bit operations, operations; a report of them.

    python cost.py --model fourbits_deit_small_patch16_224
    python cost.py --model twobits_deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 --input-size 384
    python cost.py --model fourbits_deit_small_patch16_224 --weight-bits 3 --act-bits 8 --per-layer --format csv
    python cost.py --checkpoint out/best_checkpoint.pth --packed model.qvit.safetensors
    python cost.py --model fourbits_deit_tiny_patch16_224 --manifest        every tensor of the forward with its bits
    python cost.py --model fourbits_deit_small_patch16_224 --countings      the same network by other conventions
    python cost.py --sensitivity --checkpoint deit_tiny.pth --model fourbits_deit_tiny_patch16_224 --data-path DIR
                                                    what each tensor costs in accuracy when it alone is quantized
"""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch.nn as nn

from analysis.cost import CONVENTIONS, Row, countings, layers, render, summary
from analysis.precision import analyse, manifest
from checkpoints.descriptions import check_options
from checkpoints.full_precision import load_full_precision
from checkpoints.networks import create_network, network_info, open_checkpoint, read_network
from console.parser import Parser, file_path, key_value, path_text
from files.paths import check_file
from training.flags import add_data_arguments, bits, class_count, crop_ratio, image_size, positive_int
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
    which.add_argument('--sensitivity', action='store_true', help='a row for each kind of tensor, a column for each '
                       "block: divergence from full precision's outputs, in thousandths of a nat, where it "
                       'alone is quantized; of a --checkpoint of full precision, for the quantized --model')
    images = parser.add_argument_group('images of --sensitivity; labels are not used')
    add_data_arguments(images.add_argument, 'IMNET with --data-path, else DIGITS')
    images.add_argument('--num-images', type=positive_int, default=64, help='of the evaluation part (default: 64)')
    images.add_argument('--eval-crop-ratio', type=crop_ratio, default=0.875, help='0.875, unless given')
    images.add_argument('--picture', type=file_path, metavar='FILE', help='the same as a picture, .png or .pdf')
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
    if args.sensitivity and (args.checkpoint is None or len(args.model) != 1 or args.packed):
        raise UserError('--sensitivity is of the full-precision weights of a --checkpoint, in one quantized --model')
    if args.picture is not None:
        if not args.sensitivity:
            raise UserError('--picture is one of --sensitivity')
        _figures().check_output(args.picture)
    if args.packed is None:
        return
    if len(args.model) > 1 or args.per_layer or args.manifest or args.countings:
        raise UserError('--packed adds a column to the row of one network: name one, without another report')
    check_file(args.packed, f'--packed {args.packed}')


def _options(args: argparse.Namespace) -> dict[str, Any]:
    precision = {name: getattr(args, name) for name in ('weight_bits', 'act_bits') if getattr(args, name) is not None}
    return dict(args.model_kwargs) | precision


def networks(args: argparse.Namespace) -> list[tuple[str, nn.Module]]:
    """(name, network) of everything that the flags name.

    Raises:
        UserError: a network cannot be built, or a file does not hold the one that the flags say.
    """
    kwargs = _options(args)
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


def _figures() -> ModuleType:
    from visualize import import_figures  # which takes seconds to import

    return import_figures()


def measure_sensitivity(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """By kind of tensor, what it costs in each block when it alone is quantized, see `analysis.sensitivity`.

    Raises:
        UserError: the file is no full-precision start of the network, or its images are not here.
    """
    # These take seconds to import, and no other report needs them.
    from analysis.images import stacked
    from analysis.sensitivity import sensitivity
    from calibration.closed_form import check_kind
    from datasets import choose_data_set
    from training.data import build_eval_dataset, source_of

    kwargs, checkpoint = _options(args), read_network(args.checkpoint)
    held = network_info(args.checkpoint, checkpoint, None if 'qvit' in checkpoint else args.model[0], kwargs,
                        args.input_size)
    info = replace(held, model=args.model[0], kwargs=kwargs)
    model = create_network(info.model, info.num_classes, info.input_size, **kwargs)
    check_kind(model)
    for note in load_full_precision(model, checkpoint):
        print(f'{args.checkpoint}: {note}', file=sys.stderr)
    data_set = choose_data_set(args.data_set, args.data_path, held.data_set, args.checkpoint)
    source = source_of(info, vars(args) | {'data_set': data_set})
    return sensitivity(model, stacked(build_eval_dataset(source, info.num_classes), args.num_images))


def sensitivity_rows(args: argparse.Namespace) -> list[Row]:
    found = measure_sensitivity(args)
    if args.picture is not None:
        figures = _figures()
        figures.save(figures.sensitivity_figure(found), args.picture)
    return [{'tensor': name, 'all': round(1000 * values.sum(), 1)}
            | {f'{block}': round(1000 * value, 1) for block, value in enumerate(values)}
            for name, values in found.items()]


def rows(args: argparse.Namespace) -> list[Row]:
    """The report that the flags ask for; with several networks its rows say which of them they are of."""
    if args.sensitivity:
        return sensitivity_rows(args)
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
