"""Top-1 of a full-precision DeiT and of the quantized network that starts from it, calibrated and not trained.

    python benchmarks/calibration_accuracy.py --data-path DIR --weights deit_tiny.pth

DIR holds train/ and val/, a folder a class. The quantized network is calibrated on a random draw of train/ in the
evaluation transform, and both networks are evaluated on both folders.
"""
import argparse
import platform
import sys
import time
from pathlib import Path

import timm
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import quant_vision_transformer  # noqa: E402, F401  registers the variants
from calibration.first_batch import calibrate  # noqa: E402
from checkpoints.files import read_checkpoint  # noqa: E402
from checkpoints.full_precision import load_full_precision  # noqa: E402
from datasets import build_dataset, build_transform  # noqa: E402


@torch.inference_mode()
def top1(model: torch.nn.Module, dataset: Dataset) -> float:
    """Per cent of the images classified right."""
    correct = sum((model(images).argmax(1) == labels).sum() for images, labels in DataLoader(dataset, batch_size=32))
    return 100 * correct.item() / len(dataset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-path', required=True)
    parser.add_argument('--weights', required=True, help='full-precision DeiT checkpoint')
    parser.add_argument('--teacher-model', default='deit_tiny_patch16_224', help="the weights' network")
    parser.add_argument('--model', nargs='+', default=['fourbits_deit_tiny_patch16_224'])
    parser.add_argument('--images', type=int, default=64, help='images to calibrate on')
    parser.add_argument('--seeds', type=int, default=3, help='draws of calibration images')
    args = parser.parse_args()

    transform = build_transform(False, 224)
    train = ImageFolder(Path(args.data_path, 'train'), transform)
    folders = train, build_dataset(False, 'IMNET', args.data_path, transform)[0]
    weights = read_checkpoint(args.weights)
    print(f'# {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, '
          f'timm {timm.__version__}; calibrated on {args.images} images of train/')
    print('| network | draw | train top-1 (%) | val top-1 (%) | calibration (s) |\n|---|---|---|---|---|')
    teacher = timm.create_model(args.teacher_model)
    load_full_precision(teacher, weights)
    print(f'| {args.teacher_model}, full precision | | ' +
          ' | '.join(f'{top1(teacher.eval(), folder):.1f}' for folder in folders) + ' | |', flush=True)
    for name in args.model:
        for seed in range(args.seeds):
            draw = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:args.images]
            images = torch.stack([train[i][0] for i in draw.tolist()])
            student = timm.create_model(name)
            load_full_precision(student, weights)
            start = time.perf_counter()
            calibrate(student, images)
            seconds = time.perf_counter() - start
            print(f'| {name} | {seed} | ' + ' | '.join(
                f'{top1(student.eval(), folder):.1f}' for folder in folders) + f' | {seconds:.1f} |', flush=True)


if __name__ == '__main__':
    main()
