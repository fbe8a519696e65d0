"""Stores a teacher's answers for random crops of the training images, for runs without a teacher.

    python soft_labels.py --data-path /path/to/imagenet --teacher-model deit_tiny_patch16_224 --crops-per-image 4 \
        --top-k 10 --output labels.safetensors
    python main.py --soft-labels labels.safetensors --distillation-type both --data-path /path/to/imagenet ...

The teacher is named as for main.py. Crops have 8 to 100 % of an image's area unless --crop-scale says otherwise, and
are mirrored at random where that leaves the meaning (not digits). The same seed draws the same crops.
"""

import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import RandomResizedCrop

import utils
from console.parser import path_text
from datasets import IMAGENET, Normalization, Reading, SeededSamples, build_dataset, choose_data_set, normalization
from models import Teacher
from training.flags import add_data_arguments, few, image_size, positive_int, seed, share, workers
from training.methods.soft_labels import StoredLabels, fingerprint, raw_image, take_crop, top_k
from training.networks import build_teacher
from utils import UserError

PRINT_FREQ = 10  # batches between log lines


@dataclass(frozen=True)
class Crops:
    """How an image's crops are drawn and resized.

    Attributes:
        crop_scale: smallest and largest share of the image's area.
        train_interpolation: 'bilinear' or 'bicubic'.
        mirrored: every other crop, at random.
        normalization: of the teacher's images.
    """
    crops_per_image: int
    crop_scale: Sequence[float]
    input_size: int
    train_interpolation: str
    mirrored: bool
    normalization: Normalization = IMAGENET


class DrawnCrops(Dataset):
    """Random crops of a data set's images: boxes (M, 4), flips (M,), pixels (M, 3, size, size) of each image."""

    def __init__(self, base: Dataset, crops: Crops) -> None:
        self.base, self.crops = base, crops

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image, crops = self.base[index][0], self.crops
        flips = torch.rand(crops.crops_per_image) < (0.5 if crops.mirrored else 0.)
        boxes = [RandomResizedCrop.get_params(image, crops.crop_scale, (3 / 4, 4 / 3)) for _ in flips]
        pixels = [take_crop(image, box, bool(flip), crops.input_size, crops.train_interpolation,
                            crops.normalization)
                  for box, flip in zip(boxes, flips, strict=True)]
        return torch.tensor(boxes, dtype=torch.int32), flips, torch.stack(pixels)


@torch.no_grad()
def label_crops(teacher: Teacher, name: str, dataset: Dataset, crops: Crops, *, top_k_classes: int, batch_size: int,
                num_workers: int, seed: int, device: torch.device) -> StoredLabels:
    """The teacher's answers for crops of each image.

    Args:
        teacher: on `device`.
        name: of the teacher, for the file.
        dataset: gives raw images.
        top_k_classes: how many classes of each answer are kept.
        batch_size: crops at a time.
    """
    origin = {'input_size': str(crops.input_size), 'interpolation': crops.train_interpolation,
              'fingerprint': fingerprint(dataset), 'teacher': name}
    order = [(index, seed * len(dataset) + index) for index in range(len(dataset))]
    loader = DataLoader(SeededSamples(DrawnCrops(dataset, crops)), max(1, batch_size // crops.crops_per_image),
                        sampler=order, num_workers=num_workers)
    logger = utils.MetricLogger('Soft labels:', len(loader), PRINT_FREQ, device)
    parts = []
    for boxes, flips, pixels in logger.batches(loader):                     # (B, M, 4), (B, M), (B, M, 3, H, W)
        logits, _ = teacher(pixels.flatten(0, 1).to(device))
        indices, values = top_k(logits.float().softmax(1).unflatten(0, flips.shape), top_k_classes)
        parts.append((boxes, flips, indices.cpu(), values.cpu()))
        if logger.end_batch():
            logger.print_line()
    return StoredLabels(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)), origin=origin)


def get_args_parser() -> utils.Parser:
    parser = utils.Parser(description=(__doc__ or '').partition('\n')[0], allow_abbrev=False,
                          formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('--output', required=True, metavar='FILE', type=path_text, help='.safetensors file to write')
    add_data_arguments(add, 'IMNET where there is a --data-path, else DIGITS')
    add('--teacher-model', help="timm's name")
    add('--teacher-path', metavar='FILE', type=path_text, help="its checkpoint; without one, timm's pretrained weights")
    add('--crops-per-image', type=few, default=4)
    add('--top-k', type=positive_int, default=10, help='classes to store of each crop')
    add('--crop-scale', type=share, nargs=2, default=[0.08, 1.], help="smallest and largest share of an image's area")
    add('--input-size', type=image_size, default=224)
    add('--train-interpolation', choices=('bilinear', 'bicubic'), default='bicubic')
    add('--batch-size', type=positive_int, default=64, help='crops at a time')
    add('--num_workers', type=workers, default=min(10, os.cpu_count() or 1))
    add('--device', choices=('cuda', 'cpu'), default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--seed', type=seed, default=0)
    return parser


def parse_args(argv: Sequence[str] | None) -> Namespace:
    """The flags, refused in one line where they make no sense."""
    args = get_args_parser().parse_args(argv)
    if not 0 < args.crop_scale[0] <= args.crop_scale[1] <= 1:
        raise UserError(f'--crop-scale {args.crop_scale[0]} {args.crop_scale[1]}: choose two rising values up to 1')
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda: PyTorch finds no CUDA GPU here, choose cpu')
    if not (args.teacher_model or args.teacher_path):
        raise UserError('the labels are those of a teacher: name it with --teacher-model or --teacher-path')
    args.data_set = choose_data_set(args.data_set, args.data_path)
    return args


def write_labels(args: Namespace) -> StoredLabels:
    """What was written to --output."""
    dataset, num_classes = build_dataset(True, args.data_set, args.data_path, raw_image,
                                         reading=utils.pick(Reading, vars(args)))
    if isinstance(dataset, IterableDataset):
        raise UserError(f'--data-set {args.data_set} gives its images in its order only: labels are stored by number')
    if args.top_k > num_classes:
        raise UserError(f'--top-k {args.top_k}: {args.data_set} has {num_classes} classes')
    if not Path(args.output).parent.is_dir():
        raise UserError(f'--output {args.output}: there is no such folder')
    device = torch.device(args.device)
    teacher = build_teacher(args.teacher_model, args.teacher_path, num_classes, args.input_size, args.data_set)
    crops = utils.pick(Crops, vars(args) | {
        'mirrored': args.data_set != 'DIGITS', 'normalization': normalization(args.mean, args.std)})
    labels = label_crops(Teacher(teacher.to(device)), str(args.teacher_model or Path(args.teacher_path).name), dataset,
                         crops, top_k_classes=args.top_k, batch_size=args.batch_size, num_workers=args.num_workers,
                         seed=args.seed, device=device)
    labels.write(args.output)
    return labels


@utils.entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; returns its exit status."""
    args = parse_args(argv)
    labels = write_labels(args)
    print(f'{args.output}: {labels}')


if __name__ == '__main__':
    sys.exit(main())
