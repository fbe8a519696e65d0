"""Data sets of images: of files, of one of timm's readers, of torchvision."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

from torch.utils.data import Dataset

from files.images import load_image
from files.readers import ReaderSource, open_reader, their_datasets
from utils import UserError, printable

__all__ = ['ImageList', 'ReaderImages', 'TorchvisionImages']

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
