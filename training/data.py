"""The data of a run, built from its flags: data sets, mixing, loaders."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from timm.data import Mixup
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from datasets import SeededSamples, build_dataset
from samplers import ExactEvalSampler, ResumableSampler, build_train_sampler
from training.methods.stored_labels import StoredCrops, StoredLabels
from utils import UserError, outlive_signals


def mixes(args: Namespace) -> bool:
    """Whether batches are mixed, so that labels are distributions over the classes."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def build_mixup(args: Namespace, num_classes: int) -> Mixup | None:
    if not mixes(args):
        return None
    return Mixup(args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
                 label_smoothing=args.smoothing, num_classes=num_classes)


@contextmanager
def _rank_0_first(args: Namespace) -> Iterator[None]:
    """Rank 0 runs the body, then the others: what it downloads is there for them."""
    if dist.is_initialized() and args.rank > 0:
        dist.barrier()
    try:
        yield
    finally:
        if dist.is_initialized() and args.rank == 0:
            dist.barrier()


def build_datasets(args: Namespace) -> tuple[Dataset | None, Dataset, int]:
    """Training part (None where a checkpoint is only evaluated), evaluation part, number of classes."""
    with _rank_0_first(args):
        if args.eval and args.resume:
            return None, *build_dataset(False, args)
        train, num_classes = build_dataset(True, args)
        args.nb_classes = num_classes
        if args.soft_labels:
            train = StoredCrops(train, StoredLabels.read(args.soft_labels), args.input_size)
            print(f'--soft-labels {args.soft_labels}: {train.stored}; without further augmentation')
        return SeededSamples(train), build_dataset(False, args)[0], num_classes


def _loader_options(args: Namespace) -> dict[str, Any]:
    # A generator of their own: starting a loader must not draw from the global one, whose state a checkpoint holds.
    return {'num_workers': args.num_workers, 'generator': torch.Generator().manual_seed(args.seed),
            'pin_memory': args.pin_mem and args.device.startswith('cuda'),
            'worker_init_fn': outlive_signals}


def build_train_loader(args: Namespace, dataset: Dataset) -> tuple[DataLoader, ResumableSampler]:
    """The loader of this rank's training batches, and its sampler, which is told the epoch and the position.

    Raises:
        UserError: there are not enough images for a batch.
    """
    sampler = build_train_sampler(dataset, args.repeated_aug, args.world_size, args.rank, args.seed)
    if len(sampler) < args.batch_size:
        raise UserError(f'--batch-size {args.batch_size}, but an epoch has {len(sampler)} images for each process: '
                        'choose a smaller one')
    return DataLoader(dataset, args.batch_size, sampler=sampler, drop_last=True,
                      persistent_workers=args.num_workers > 0, **_loader_options(args)), sampler


def build_eval_loader(args: Namespace, dataset: Dataset) -> DataLoader:
    """The loader of this rank's share of the evaluation images: all of them without --dist-eval."""
    sampler = ExactEvalSampler(dataset, args.world_size, args.rank) if args.dist_eval else SequentialSampler(dataset)
    return DataLoader(dataset, max(1, int(1.5 * args.batch_size)), sampler=sampler, **_loader_options(args))
