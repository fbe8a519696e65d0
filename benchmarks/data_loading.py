"""Images a second of the training data alone: reading, decoding, augmentation and batching, without a network.

    python benchmarks/data_loading.py                                      JPEGs of 500 x 375, as many of ImageNet are
    python benchmarks/data_loading.py --data-path DIR --step-images-per-second 900

All other flags are main.py's, with its defaults, DeiT's augmentation: --data-path, --batch-size, --input-size, --aa and
so on; the rows differ in --num-workers. Without --data-path, JPEGs of random colour fields
with noise are written to a temporary folder: what a decoder has to do depends on the size of the image and of the file,
which the results state.

A row is the median of the repeats, in each of which all rows take their turn, since machines are noisy; beside it stand
the smallest and the largest. Starting the workers and the first batches are not timed. The batches are only taken: with
a training step beside them, on the same cores, workers are slower. The last column compares a row with the images a
second that a training step takes (--step-images-per-second): below 1, the step would wait for its images.
"""

import argparse
import io
import itertools
import json
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from _measure import hardware, versions
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main as training_command  # noqa: E402
import utils  # noqa: E402
from datasets import Augmentation, SeededSamples  # noqa: E402
from training.checks import check_args  # noqa: E402
from training.data import DataSource, Loading, build_train_dataset, build_train_loader  # noqa: E402

WARM_UP = 2  # batches
DISTINCT = 32  # JPEGs, of which the others are copies
OF_FILES = ('IMNET', 'INAT', 'INAT19')  # the data sets whose images are files
ROUNDING = 256  # repeated augmentation leaves out up to so many images of an epoch


@dataclass(frozen=True)
class Measurement:
    """What is to be measured: this script's own flags."""
    workers: list[int]
    batches: int
    repeats: int
    image_size: list[int]
    step_images_per_second: float | None
    json: Path | None


def parse_args(argv: list[str]) -> tuple[Measurement, dict[str, Any]]:
    """This script's flags, and main.py's with their values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add('--workers', nargs='+', type=int, default=[0, 1, 2], metavar='N', help='processes that load (default: 0 1 2)')
    add('--batches', type=int, default=6, metavar='N', help='timed in a row, best a multiple of N workers (default: 6)')
    add('--repeats', type=int, default=3, metavar='N', help='of every row (default: 3)')
    add('--image-size', nargs=2, type=int, default=[500, 375], metavar=('WIDTH', 'HEIGHT'),
        help='of the JPEGs without --data-path (default: 500 375)')
    add('--step-images-per-second', type=float, metavar='X', help='what the step takes, as training_step.py measures')
    add('--json', type=Path, metavar='FILE', help='also write the results there')
    flags, rest = parser.parse_known_args(argv)
    own = Measurement(**vars(flags))
    if min(own.batches, own.repeats, *own.image_size) < 1 or min(own.workers) < 0:
        parser.error('the numbers are at least 1, --workers at least 0')
    if own.step_images_per_second is not None and own.step_images_per_second <= 0:
        parser.error(f'--step-images-per-second {own.step_images_per_second}: choose a value above 0')
    args = training_command.parse_args(rest)
    check_args(args)
    args.data_set = args.data_set or 'IMNET'
    if args.data_set not in OF_FILES:
        raise utils.UserError(f'--data-set {args.data_set} has no image files: choose one of {", ".join(OF_FILES)}')
    args.input_size = args.input_size or training_command.DEFAULT_SIZE
    return own, vars(args)


def write_jpegs(folder: Path, size: list[int], number: int) -> None:
    """JPEGs in train/, of smooth colours with noise."""
    make, encoded = np.random.default_rng(0), []
    for _ in range(DISTINCT):
        fields = Image.fromarray(make.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        pixels = np.asarray(fields.resize(size, Image.Resampling.BICUBIC)) + make.normal(0, 12, (size[1], size[0], 1))
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, 'JPEG', quality=90)
        encoded.append(file.getvalue())
    (folder / 'train' / 'fields').mkdir(parents=True)
    for index in range(number):
        (folder / 'train' / 'fields' / f'{index}.jpg').write_bytes(encoded[index % DISTINCT])


def images_per_second(dataset: SeededSamples, loading: Loading, batches: int) -> float:
    loader, _ = build_train_loader(dataset, loading, utils.Ranks(), torch.device('cpu'))
    if len(loader) < WARM_UP + batches:
        raise utils.UserError(f'--batches {batches}: an epoch has {len(loader)}, {WARM_UP} of them to warm up')
    arrivals = [time.perf_counter() for _ in itertools.islice(loader, WARM_UP + batches)]
    return batches * loading.batch_size / (arrivals[-1] - arrivals[WARM_UP - 1])


def measure(own: Measurement, dataset: SeededSamples, loading: Loading) -> list[dict[str, Any]]:
    """The rows of the table."""
    rows = [{'workers': workers, 'all': []} for workers in own.workers]
    for row in rows * own.repeats:
        row['all'].append(images_per_second(dataset, replace(loading, num_workers=row['workers']), own.batches))
    for row in rows:
        row['images_per_second'] = statistics.median(row['all'])
        if own.step_images_per_second:
            row['of_the_step'] = row['images_per_second'] / own.step_images_per_second
    return rows


def describe_images(dataset: SeededSamples) -> str:
    samples = dataset.base.samples[:256]
    pixels = []
    for path, _ in samples:
        with Image.open(path) as image:
            pixels.append(image.width * image.height)
    size = statistics.mean(Path(path).stat().st_size for path, _ in samples)
    return f'{statistics.mean(pixels) / 1e6:.3f} megapixels and {size / 1e3:.0f} kB, the mean of {len(samples)}'


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [f'- {key}: {value}' for key, value in results.items() if key != 'rows'] + [
        '', '| workers | images/s | smallest to largest | of what a step takes |',
        '|--:|--:|--:|--:|']
    for row in results['rows']:
        of_the_step = f'{row["of_the_step"]:.2f}' if 'of_the_step' in row else ''
        lines.append(f'| {row["workers"]} | {row["images_per_second"]:.1f} | '
                     f'{min(row["all"]):.1f} to {max(row["all"]):.1f} | {of_the_step} |')
    return '\n'.join(lines)


def main(argv: list[str]) -> int:
    try:
        own, values = parse_args(argv)
        loading = utils.pick(Loading, values)
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            if values['data_path'] is None:
                values['data_path'] = folder
                write_jpegs(Path(folder), own.image_size, (WARM_UP + own.batches) * loading.batch_size + ROUNDING)
            dataset = build_train_dataset(utils.pick(DataSource, values), utils.pick(Augmentation, values))
            results = {'command': shlex.join(['python', 'benchmarks/data_loading.py', *argv]),
                       'hardware': hardware('cpu'), 'versions': f'{versions()}, Pillow {PIL.__version__}',
                       'images': describe_images(dataset),
                       'runs': f'{own.repeats} of {own.batches} batches of {loading.batch_size}',
                       'step_images_per_second': own.step_images_per_second, 'rows': measure(own, dataset, loading)}
    except utils.UserError as error:
        utils.report(error)
        return 2
    print(table(results))
    if own.json:
        own.json.write_text(json.dumps(results, indent=2) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
