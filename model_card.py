"""Writes the model card of a checkpoint: model_card.md and model_card.json beside it.

    python model_card.py out/best_checkpoint.pth

Training writes both by itself after every epoch. The accuracies are those of log.txt, the versions and the commit those
of args.json, each where it lies beside the checkpoint. Of paths only the last component is kept.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.model_card import images_said_in, write_model_card
from checkpoints.entries import check_entries
from checkpoints.files import read_checkpoint
from checkpoints.networks import open_checkpoint
from console.parser import Parser, file_path
from main import parse_args
from training.flags import positive_int
from utils import UserError, entry_point


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', type=file_path,
                        help="a file that main.py wrote, as an output folder's best_checkpoint.pth")
    parser.add_argument('--images', type=positive_int, help='images that the accuracies in log.txt were measured on')
    return parser


def write_card_of(path: Path, images: int | None) -> None:
    """Writes the card of the checkpoint `path` into its folder.

    Raises:
        UserError: the file cannot be read, or does not say what it holds and how it was trained.
        OSError: the folder cannot be written.
    """
    checkpoint = read_checkpoint(path)
    if 'qvit' not in checkpoint or not isinstance(checkpoint.get('args'), argparse.Namespace):
        raise UserError(f'{path} does not say what it holds and how it was trained: it was not written by main.py')
    check_entries(checkpoint, str(path))
    if images is None:
        images = images_said_in(path.with_name('model_card.json'))
    opened = open_checkpoint(path, checkpoint)
    write_model_card(path.parent, opened.model, opened.info, vars(checkpoint['args']), vars(parse_args([])), images,
                     path.name, checkpoint.get('epoch'))


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; returns its exit status."""
    try:
        args = get_args_parser().parse_args(argv)
        write_card_of(args.checkpoint, args.images)
    except OSError as error:  # its text names the folder that cannot be written
        raise UserError(str(error)) from error
    print(f'{args.checkpoint.parent / "model_card.md"} and model_card.json')


if __name__ == '__main__':
    sys.exit(main())
