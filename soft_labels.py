"""Stores a teacher's answers for random crops of the training images, for runs without a teacher (`stored_labels.py`).

    python soft_labels.py --data-path /path/to/imagenet --teacher-model deit_tiny_patch16_224 --crops-per-image 4 \
        --top-k 10 --output labels.safetensors
    python main.py --soft-labels labels.safetensors --distillation-type both --data-path /path/to/imagenet ...

The teacher is named as for main.py. Crops have 8 to 100 % of an image's area unless --crop-scale says otherwise, and
are mirrored at random where that leaves the meaning (not digits). The same seed draws the same crops.
"""

import sys
from argparse import ArgumentDefaultsHelpFormatter, Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop

import utils
from datasets import DATASETS, SeededSamples, build_dataset
from models import Teacher
from training import networks
from training.flags import DEFAULT_SIZE, get_args_parser
from training.methods.stored_labels import StoredLabels, fingerprint, raw_image, take_crop, top_k
from utils import UserError


class DrawnCrops(Dataset):
    """Random crops of a data set's images: boxes (M, 4), flips (M,), pixels (M, 3, size, size) of each."""

    def __init__(self, base: Dataset, args: Namespace) -> None:
        self.base, self.args = base, args
        base.transform = raw_image

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image, args = self.base[index][0], self.args
        flips = torch.rand(args.crops_per_image) < (0. if args.data_set == 'DIGITS' else 0.5)
        boxes = [RandomResizedCrop.get_params(image, args.crop_scale, (3 / 4, 4 / 3)) for _ in flips]
        pixels = [take_crop(image, box, bool(flip), args.input_size, args.train_interpolation)
                  for box, flip in zip(boxes, flips, strict=True)]
        return torch.tensor(boxes, dtype=torch.int32), flips, torch.stack(pixels)


@torch.no_grad()
def label_crops(teacher: Teacher, dataset: Dataset, args: Namespace) -> StoredLabels:
    """The teacher's answers for `args.crops_per_image` crops of each image of a data set, which is left without its
    transform."""
    about = {'input_size': str(args.input_size), 'interpolation': args.train_interpolation,
             'fingerprint': fingerprint(dataset), 'teacher': str(args.teacher_model or Path(args.teacher_path).name)}
    order = [(index, args.seed * len(dataset) + index) for index in range(len(dataset))]
    loader = DataLoader(SeededSamples(DrawnCrops(dataset, args)), max(1, args.batch_size // args.crops_per_image),
                        sampler=order, num_workers=args.num_workers)
    logger = utils.MetricLogger('Soft labels:', len(loader), args.print_freq, torch.device(args.device))
    parts = []
    for boxes, flips, pixels in logger.batches(loader):                     # (B, M, 4), (B, M), (B, M, 3, H, W)
        logits, _ = teacher(pixels.flatten(0, 1).to(args.device))
        indices, values = top_k(logits.float().softmax(1).unflatten(0, flips.shape), args.top_k)
        parts.append((boxes, flips, indices.cpu(), values.cpu()))
        if logger.end_batch():
            logger.print_line()
    return StoredLabels(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)), about=about)


def parse_args(argv: Sequence[str] | None) -> Namespace:
    """The flags of this command, over the defaults of main.py's."""
    parser = utils.Parser(description=__doc__.splitlines()[0], allow_abbrev=False,
                          formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('--output', required=True, metavar='FILE', help='.safetensors file to write')
    add('--data-path', help='folder of the data set')
    add('--data-set', choices=DATASETS, help='IMNET where there is a --data-path, else DIGITS')
    add('--teacher-model', help="timm's name")
    add('--teacher-path', help="its checkpoint; without one, timm's pretrained weights")
    add('--crops-per-image', type=int, default=4)
    add('--top-k', type=int, default=10, help='classes to store of each crop')
    add('--crop-scale', type=float, nargs=2, default=[0.08, 1.], help="smallest and largest share of an image's area")
    add('--input-size', type=int, default=DEFAULT_SIZE)
    add('--train-interpolation', choices=('bilinear', 'bicubic'), default='bicubic')
    add('--batch-size', type=int, default=64, help='crops at a time')
    add('--num_workers', '--num-workers', type=int, default=get_args_parser().get_default('num_workers'))
    add('--device', choices=('cuda', 'cpu'), default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--seed', type=int, default=0)
    own = parser.parse_args(argv)
    for name in ('crops_per_image', 'top_k', 'input_size', 'batch_size'):
        if getattr(own, name) < 1:
            raise UserError(f'--{name.replace("_", "-")} {getattr(own, name)}: choose a value of at least 1')
    for name in ('num_workers', 'seed'):
        if getattr(own, name) < 0:
            raise UserError(f'--{name} {getattr(own, name)}: choose a value of at least 0')
    if not 0 < own.crop_scale[0] <= own.crop_scale[1] <= 1:
        raise UserError(f'--crop-scale {own.crop_scale[0]} {own.crop_scale[1]}: choose two rising values up to 1')
    if own.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda: PyTorch finds no CUDA GPU here, choose cpu')
    if not (own.teacher_model or own.teacher_path):
        raise UserError('the labels are those of a teacher: name it with --teacher-model or --teacher-path')
    args = Namespace(**vars(get_args_parser().parse_args(['--distillation-type', 'soft'])) | vars(own))
    args.data_set = args.data_set or ('DIGITS' if args.data_path is None else 'IMNET')
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    try:
        args = parse_args(argv)
        if args.data_set != 'DIGITS' and args.data_path is None:
            raise UserError(f'--data-set {args.data_set} needs --data-path')
        dataset, num_classes = build_dataset(True, args)
        if args.top_k > num_classes:
            raise UserError(f'--top-k {args.top_k}: {args.data_set} has {num_classes} classes')
        if not Path(args.output).parent.is_dir():
            raise UserError(f'--output {args.output}: there is no such folder')
        teacher = Teacher(networks.build_teacher(args, num_classes).to(args.device), return_qk=False)
        labels = label_crops(teacher, dataset, args)
        labels.write(args.output)
    except UserError as error:
        utils.report(error)
        return 2
    print(f'{args.output}: {labels}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
