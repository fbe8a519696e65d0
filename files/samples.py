"""Data sets of images: of files, of timm's readers, by number or as a stream, of torchvision."""

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from files.images import keep_to_formats, load_image
from files.readers import Labels, ReaderSource, open_reader, their_datasets
from utils import UserError, printable

__all__ = ['ImageList', 'ReaderImages', 'StreamedImages', 'TorchvisionImages', 'first_images', 'seeded']

_MAX_UNREADABLE = 50


class ImageList(Dataset):
    """Image files with labels.

    A file that cannot be decoded stops an evaluation, which must cover exactly its images, and is replaced by the
    next readable one in training, where one image among many does not matter but the run does.

    Args:
        samples: (path, label) pairs, at least one.
        classes: name of each label.
        transform: applied to the RGB image.
        skip_unreadable: replace unreadable images (training) instead of raising (evaluation).
        upright: whether images are turned as EXIF says.
    """

    def __init__(self, samples: list[tuple[str, int]], classes: list[str], transform: Callable, skip_unreadable: bool,
                 upright: bool = False) -> None:
        self.samples = samples
        self.classes = classes
        self.transform = transform
        self.skip_unreadable = skip_unreadable
        self.upright = upright
        self.skipped = 0

    def file(self, index: int) -> str | BinaryIO:
        """The file of an image, by its path or opened."""
        return self.samples[index][0]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The transformed image and its label.

        Raises:
            UserError: an unreadable image, where these are not skipped, or 50 of them in a row.
        """
        for offset in range(_MAX_UNREADABLE):
            chosen = (index + offset) % len(self)
            path, label = self.samples[chosen]
            try:
                image = load_image(self.file(chosen), self.upright)
            except Exception as error:  # decoders raise nearly anything on a damaged file
                reason = str(error) if isinstance(error, UserError) else (
                    f'{path} is not a readable image ({" ".join(f"{type(error).__name__}: {error}".split())})')
            else:
                return self.transform(image), label
            if not self.skip_unreadable:
                raise UserError(f'{reason}: replace the file or remove it')
            self.skipped += 1
            warnings.warn(printable(f'skipped unreadable image number {self.skipped}: {reason}'), stacklevel=2)
        raise UserError(f'{_MAX_UNREADABLE} images in a row are unreadable, at last {reason}: check the data')


class ReaderImages(ImageList):
    """The images of one of timm's readers.

    Args:
        source: what the reader reads; another process opens it anew.
        reader: gives opened files by their number.
        numbers: of the images that count.
        samples: what to call them, and their labels.
        args: of `ImageList`, from `classes` on.
    """

    def __init__(self, source: ReaderSource, reader: Any, numbers: Sequence[int], samples: list[tuple[str, int]],
                 *args: Any) -> None:
        super().__init__(samples, *args)
        self.source, self.reader, self.numbers = source, reader, numbers

    def file(self, index: int) -> BinaryIO:
        if self.reader is None:
            self.reader = open_reader(self.source).reader
        with their_datasets(self.source.name.partition('/')[0]):
            return self.reader[self.numbers[index]][0]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {'reader': None}


class TorchvisionImages(Dataset):
    """A data set of torchvision, its images made RGB."""

    def __init__(self, base: Dataset, targets: list[int], classes: list[str], transform: Callable) -> None:
        self.base, self.targets, self.classes, self.transform = base, targets, classes, transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.base[index][0].convert('RGB')), self.targets[index]


class StreamedImages(IterableDataset):
    """Images that come in the order of their reader, which shuffles those of training.

    Each image's augmentation follows from the seed, the epoch, the process, the worker and the image's place.

    Args:
        source: what the reader reads. The images of an evaluation are all read by every process.
        listed: the names of the classes, where they are given.
        transform: applied to the RGB image.

    Raises:
        UserError: the images cannot be read, or their number or their classes are not known.
    """

    def __init__(self, source: ReaderSource, listed: list[str] | None, transform: Callable) -> None:
        self.source, self.listed, self.transform = source, listed, transform
        self.base = open_reader(source)
        reader = self.base.reader
        self.rank = getattr(reader, 'dist_rank', 0)
        if not source.is_train:
            reader.dist_rank, reader.dist_num_replicas, reader.global_num_workers = 0, 1, reader.num_workers
        names = getattr(reader, 'class_to_idx', {})
        said = f'--data-set {source.name}'
        self.labels = Labels(sorted(names, key=names.get), listed, said)
        self.classes = self.labels.classes
        self.epoch, self.is_over = 0, False
        if not len(self.base):
            raise UserError(f'{said} does not say how many images {source.split} has: add their number, as in '
                            "'val-{00..31}.tar|50000'")

    def __len__(self) -> int:
        return 0 if self.is_over else len(self.base)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        keep_to_formats()  # readers decode by themselves
        worker = get_worker_info()
        place = (self.source.seed, self.epoch, self.rank, worker.id if worker else 0)
        self.base.reader.ds = None  # its pipeline, whose random state would go on from the epoch before
        items = iter(() if self.is_over else self.base)
        for number in count():
            with their_datasets(self.source.name.partition('/')[0]):  # not while others have their turn
                item = next(items, None)
            if item is None:
                return
            with seeded((*place, number)):
                transformed = self.transform(item[0].convert('RGB'))
            yield transformed, self.labels.number(int(item[1]))

    def set_epoch(self, epoch: int, is_over: bool = False) -> None:
        """Chooses the epoch, of which nothing is left where it is over."""
        self.epoch, self.is_over = epoch, is_over
        self.base.set_epoch(epoch)

    def set_workers(self, number: int) -> None:
        """Says how many processes of a loader are going to read; of `len`, each has its share."""
        self.base.set_loader_cfg(num_workers=number)

    def anew(self, transform: Callable) -> 'StreamedImages':
        """The same images from the first on, read apart from these."""
        return StreamedImages(self.source, self.listed, transform)


def first_images(dataset: Dataset, number: int) -> Tensor:
    """The first images, (number, C, H, W), or as many as there are."""
    if isinstance(dataset, IterableDataset):
        items = islice(dataset.anew(dataset.transform), number)
    else:
        items = (dataset[index] for index in range(min(number, len(dataset))))
    return torch.stack([image for image, _ in items])


@contextmanager
def seeded(seed: int | Sequence[int]) -> Iterator[None]:
    """Seeds Python, numpy and torch (CPU); afterwards their states are those from before."""
    # Seeded with the same number, numpy and torch would draw the same bits: an augmentation that is chosen with
    # one of them would go together with what the other one decides.
    python_seed, numpy_seed, torch_seed = np.random.SeedSequence(seed).generate_state(3).tolist()
    # Not torch.manual_seed, which also seeds the accelerators.
    generator = torch.default_generator
    states = random.getstate(), np.random.get_state(), generator.get_state()
    try:
        random.seed(python_seed)
        np.random.seed(numpy_seed)
        generator.manual_seed(torch_seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        generator.set_state(states[2])
