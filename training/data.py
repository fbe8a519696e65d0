"""The data of a run: its data sets, the mixing of images, the loaders, and the images that calibration sees."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler

from checkpoints.descriptions import ModelInfo
from datasets import (
    IMAGENET,
    Augmentation,
    Normalization,
    Reading,
    SeededSamples,
    build_dataset,
    build_transform,
    normalization,
)
from files.samples import StreamedImages, first_images
from samplers import ExactEvalSampler, ResumableSampler, StreamOrder, build_train_sampler
from training.methods.soft_labels import StoredCrops, StoredLabels
from training.signals import outlive_signals
from utils import Ranks, UserError, pick

__all__ = ['DataSource', 'Loading', 'Mixing', 'build_eval_dataset', 'build_eval_loader', 'build_mixup',
           'build_train_dataset', 'build_train_loader', 'calibration_images', 'first_batch_images', 'rank_0_first',
           'source_of']


@dataclass(frozen=True)
class DataSource(Reading):
    """Which images a run sees: the data set, where it lies, and what they become.

    Attributes:
        data_set: as `datasets.choose_data_set` gives it.
        data_path: its folder; DIGITS needs none.
        eval_crop_ratio: see `datasets.build_transform`.
        normalization: of the images, which says whether they are grey.

    Raises:
        UserError: DIGITS with a folder.
    """
    data_set: str
    data_path: str | None
    input_size: int
    eval_crop_ratio: float = 0.875
    normalization: Normalization = IMAGENET

    def __post_init__(self) -> None:
        if self.data_set == 'DIGITS' and self.data_path is not None:
            raise UserError(f'--data-path {self.data_path}: the data set is DIGITS, which comes with scikit-learn and '
                            'has no folder: leave it out, or name the --data-set of the folder')

    def part(self, is_train: bool, transform: Callable, num_classes: int | None = None) -> Dataset:
        """The training or the evaluation part, see `datasets.build_dataset`."""
        return build_dataset(is_train, self.data_set, self.data_path, transform, num_classes=num_classes,
                             reading=self)[0]

    def evaluation_transform(self) -> Callable:
        return build_transform(False, self.input_size, self.data_set, eval_crop_ratio=self.eval_crop_ratio,
                               normalization=self.normalization)


def source_of(info: ModelInfo, flags: Mapping[str, Any]) -> DataSource:
    """The images that a network of that description takes.

    Args:
        flags: values of the command line by name, with the data set that was chosen; --mean and --std win.
    """
    by = normalization(flags['mean'] or info.mean, flags['std'] or info.std, info.kwargs.get('in_chans') or 3)
    return pick(DataSource, {**flags, 'input_size': info.input_size, 'normalization': by})


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


def build_train_dataset(source: DataSource, augmentation: Augmentation, soft_labels: str = '',
                        ) -> SeededSamples | StreamedImages:
    """The training part with its augmentation, or the crops that a file of soft labels is of.

    Raises:
        UserError: data or soft labels that are missing, damaged, or of other images.
    """
    transform = build_transform(True, source.input_size, source.data_set, augmentation=augmentation,
                                eval_crop_ratio=source.eval_crop_ratio, normalization=source.normalization)
    dataset = source.part(True, transform)
    if soft_labels and isinstance(dataset, IterableDataset):
        raise UserError(f'--soft-labels are of images by their number: {source.data_set} only gives them in its order')
    if soft_labels:
        dataset = StoredCrops(dataset, StoredLabels.read(soft_labels), source.input_size, source.normalization)
        print(f'--soft-labels {soft_labels}: {dataset.stored}; without further augmentation')
    return dataset if isinstance(dataset, IterableDataset) else SeededSamples(dataset)


def build_eval_dataset(source: DataSource, num_classes: int | None = None) -> Dataset:
    """The evaluation part; `num_classes` are expected of a folder that cannot be counted by its training part."""
    return source.part(False, source.evaluation_transform(), num_classes)


# --- loaders ----------------------------------------------------------------------------------------------------------


def _loader_options(loading: Loading, device: torch.device) -> dict[str, Any]:
    # A generator of their own: starting a loader must not draw from the global one, whose state a checkpoint holds.
    return {'num_workers': loading.num_workers, 'generator': torch.Generator().manual_seed(loading.seed),
            'pin_memory': loading.pin_mem and device.type == 'cuda', 'worker_init_fn': outlive_signals}


def build_train_loader(dataset: SeededSamples | StreamedImages, loading: Loading, ranks: Ranks, device: torch.device,
                       ) -> tuple[DataLoader, ResumableSampler | StreamOrder]:
    """The loader of this rank's training batches, and its sampler, which is told the epoch and the position.

    Of a stream the position is always the beginning.

    Raises:
        UserError: there are not enough images for a batch.
    """
    if isinstance(dataset, IterableDataset):
        return _stream_loader(dataset, loading, device)
    sampler = build_train_sampler(dataset, loading.repeated_aug, ranks.world_size, ranks.rank, loading.seed)
    if len(sampler) < loading.batch_size:
        raise UserError(f'--batch-size {loading.batch_size}, but an epoch has {len(sampler)} images for each process: '
                        'choose a smaller one')
    return DataLoader(dataset, loading.batch_size, sampler=sampler, drop_last=True,
                      persistent_workers=loading.num_workers > 0, **_loader_options(loading, device)), sampler


def _stream_loader(stream: StreamedImages, loading: Loading, device: torch.device) -> tuple[DataLoader, StreamOrder]:
    print(f'--data-set {stream.source.name}: images come in the order of their reader: '
          + ('each once an epoch, in spite of --repeated-aug; ' if loading.repeated_aug else '')
          + 'a run that is resumed within an epoch begins it anew')
    stream.set_workers(loading.num_workers)
    options = _loader_options(loading, device)
    # New workers for every epoch: they begin where the stream does.
    loader = DataLoader(stream, loading.batch_size, drop_last=True, **options)
    return loader, StreamOrder(stream, options['generator'], loading.seed)


def build_eval_loader(dataset: Dataset, loading: Loading, ranks: Ranks, device: torch.device) -> DataLoader:
    """The loader of this rank's share of the evaluation images: all of them without `dist_eval`."""
    if isinstance(dataset, IterableDataset):
        if loading.dist_eval:
            raise UserError(f'--dist-eval: {dataset.source.name} is read whole by every process, leave it out')
        dataset.set_workers(loading.num_workers)
        return DataLoader(dataset, max(1, int(1.5 * loading.batch_size)), **_loader_options(loading, device))
    is_shared = loading.dist_eval
    sampler = ExactEvalSampler(dataset, ranks.world_size, ranks.rank) if is_shared else SequentialSampler(dataset)
    return DataLoader(dataset, max(1, int(1.5 * loading.batch_size)), sampler=sampler,
                      **_loader_options(loading, device))


# --- images to calibrate on -------------------------------------------------------------------------------------------


def calibration_images(dataset: SeededSamples | StreamedImages, source: DataSource, count: int, seed: int) -> Tensor:
    """`count` training images, (count, C, H, W), that the seed draws, transformed as in evaluation; alike on all ranks.

    All of the data set's where it has fewer.
    """
    if isinstance(dataset, IterableDataset):  # in its order, which the seed has drawn
        return first_images(dataset.anew(source.evaluation_transform()), count)
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count]
    augmented, dataset.base.transform = dataset.base.transform, source.evaluation_transform()
    try:
        return torch.stack([dataset[index][0] for index in drawn.tolist()])
    finally:
        dataset.base.transform = augmented


def first_batch_images(dataset: SeededSamples | StreamedImages, sampler: ResumableSampler | StreamOrder,
                       batch_size: int) -> Tensor:
    """The images, (B, C, H, W), of the first batch that a loader with this sampler would give."""
    if isinstance(dataset, IterableDataset):
        return first_images(dataset, batch_size)
    return torch.stack([dataset[index][0] for index in itertools.islice(sampler, batch_size)])
