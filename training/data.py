"""The data of a run: its data sets, the mixing of images, the loaders, and the images that calibration sees."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from datasets import Augmentation, SeededSamples, build_dataset, build_transform
from samplers import ExactEvalSampler, ResumableSampler, build_train_sampler
from training.methods.soft_labels import StoredCrops, StoredLabels
from training.signals import outlive_signals
from utils import Ranks, UserError

__all__ = ['DataSource', 'Loading', 'Mixing', 'build_eval_dataset', 'build_eval_loader', 'build_mixup',
           'build_train_dataset', 'build_train_loader', 'calibration_images', 'first_batch_images', 'rank_0_first']


@dataclass(frozen=True)
class DataSource:
    """Which images a run sees: the data set, where it lies, and the size of its images.

    Attributes:
        data_set: a name of `datasets.DATASETS`.
        data_path: its folder; DIGITS needs none.
        inat_category: what iNaturalist's labels are of.
        eval_crop_ratio: see `datasets.build_transform`.

    Raises:
        UserError: DIGITS with a folder.
    """
    data_set: str
    data_path: str | None
    input_size: int
    inat_category: str = 'name'
    eval_crop_ratio: float = 0.875

    def __post_init__(self) -> None:
        if self.data_set == 'DIGITS' and self.data_path is not None:
            raise UserError(f'--data-path {self.data_path}: the data set is DIGITS, which comes with scikit-learn and '
                            'has no folder: leave it out, or name the --data-set of the folder')


@dataclass(frozen=True)
class Loading:
    """How images become batches.

    Attributes:
        batch_size: images of a process at a time.
        repeated_aug: each chosen image comes three times in an epoch (`samplers.RASampler`).
        dist_eval: the images of an evaluation are shared out to the processes.
        seed: of the order of the images and of their augmentation.
    """
    batch_size: int
    num_workers: int = 0
    pin_mem: bool = True
    repeated_aug: bool = True
    dist_eval: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Mixing:
    """Mixup and cutmix, in timm's values; label smoothing is part of it, since mixed labels are made here."""
    mixup: float = 0.
    cutmix: float = 0.
    cutmix_minmax: tuple[float, float] | None = None
    mixup_prob: float = 1.
    mixup_switch_prob: float = 0.5
    mixup_mode: str = 'batch'
    smoothing: float = 0.

    @property
    def active(self) -> bool:
        """Whether batches are mixed, so that labels are distributions over the classes."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


def build_mixup(mixing: Mixing, num_classes: int) -> Mixup | None:
    if not mixing.active:
        return None
    return Mixup(mixing.mixup, mixing.cutmix, mixing.cutmix_minmax, mixing.mixup_prob, mixing.mixup_switch_prob,
                 mixing.mixup_mode, label_smoothing=mixing.smoothing, num_classes=num_classes)


# --- data sets --------------------------------------------------------------------------------------------------------


@contextmanager
def rank_0_first(ranks: Ranks) -> Iterator[None]:
    """Lets rank 0 run the body before the others do: what it downloads is there for them."""
    if dist.is_initialized() and ranks.rank > 0:
        dist.barrier()
    try:
        yield
    finally:
        if dist.is_initialized() and ranks.rank == 0:
            dist.barrier()


def _evaluation_transform(source: DataSource) -> Any:
    return build_transform(False, source.input_size, source.data_set, eval_crop_ratio=source.eval_crop_ratio)


def build_train_dataset(source: DataSource, augmentation: Augmentation, soft_labels: str = '') -> SeededSamples:
    """The training part with its augmentation, or the crops that a file of soft labels is of.

    Raises:
        UserError: data or soft labels that are missing, damaged, or of other images.
    """
    transform = build_transform(True, source.input_size, source.data_set, augmentation=augmentation,
                                eval_crop_ratio=source.eval_crop_ratio)
    dataset, _ = build_dataset(True, source.data_set, source.data_path, transform, inat_category=source.inat_category)
    if soft_labels:
        dataset = StoredCrops(dataset, StoredLabels.read(soft_labels), source.input_size)
        print(f'--soft-labels {soft_labels}: {dataset.stored}; without further augmentation')
    return SeededSamples(dataset)


def build_eval_dataset(source: DataSource, num_classes: int | None = None) -> Dataset:
    """The evaluation part; `num_classes` are expected of a folder that cannot be counted by its training part."""
    return build_dataset(False, source.data_set, source.data_path, _evaluation_transform(source),
                         inat_category=source.inat_category, num_classes=num_classes)[0]


# --- loaders ----------------------------------------------------------------------------------------------------------


def _loader_options(loading: Loading, device: torch.device) -> dict[str, Any]:
    # A generator of their own: starting a loader must not draw from the global one, whose state a checkpoint holds.
    return {'num_workers': loading.num_workers, 'generator': torch.Generator().manual_seed(loading.seed),
            'pin_memory': loading.pin_mem and device.type == 'cuda', 'worker_init_fn': outlive_signals}


def build_train_loader(dataset: SeededSamples, loading: Loading, ranks: Ranks, device: torch.device,
                       ) -> tuple[DataLoader, ResumableSampler]:
    """The loader of this rank's training batches, and its sampler, which is told the epoch and the position.

    Raises:
        UserError: there are not enough images for a batch.
    """
    sampler = build_train_sampler(dataset, loading.repeated_aug, ranks.world_size, ranks.rank, loading.seed)
    if len(sampler) < loading.batch_size:
        raise UserError(f'--batch-size {loading.batch_size}, but an epoch has {len(sampler)} images for each process: '
                        'choose a smaller one')
    return DataLoader(dataset, loading.batch_size, sampler=sampler, drop_last=True,
                      persistent_workers=loading.num_workers > 0, **_loader_options(loading, device)), sampler


def build_eval_loader(dataset: Dataset, loading: Loading, ranks: Ranks, device: torch.device) -> DataLoader:
    """The loader of this rank's share of the evaluation images: all of them without `dist_eval`."""
    is_shared = loading.dist_eval
    sampler = ExactEvalSampler(dataset, ranks.world_size, ranks.rank) if is_shared else SequentialSampler(dataset)
    return DataLoader(dataset, max(1, int(1.5 * loading.batch_size)), sampler=sampler,
                      **_loader_options(loading, device))


# --- images to calibrate on -------------------------------------------------------------------------------------------


def calibration_images(dataset: SeededSamples, source: DataSource, count: int, seed: int) -> Tensor:
    """`count` training images, (count, 3, H, W), that the seed draws, transformed as in evaluation; alike on all ranks.

    All of the data set's where it has fewer.
    """
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count]
    augmented, dataset.base.transform = dataset.base.transform, _evaluation_transform(source)
    try:
        return torch.stack([dataset[index][0] for index in drawn.tolist()])
    finally:
        dataset.base.transform = augmented


def first_batch_images(dataset: SeededSamples, sampler: ResumableSampler, batch_size: int) -> Tensor:
    """The images, (B, 3, H, W), of the first batch that a loader with this sampler would give."""
    return torch.stack([dataset[index][0] for index in itertools.islice(sampler, batch_size)])
