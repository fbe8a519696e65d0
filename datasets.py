"""The data sets by name, their image transforms, and reproducible randomness for each sample."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100

from files.images import images_of, is_no_class, subfolders
from files.paths import fault, is_folder, parse_json, read_text
from files.readers import (
    READERS,
    Labels,
    ReaderSource,
    is_reader,
    is_stream,
    open_reader,
    read_class_map,
    read_labels,
)
from files.samples import ImageList, ReaderImages, StreamedImages, TorchvisionImages, seeded
from files.transforms import IMAGENET, Augmentation, Normalization, build_transform, normalization, normalized
from utils import UserError, printable, readable

__all__ = ['DATASETS', 'IMAGENET', 'INAT_CATEGORIES', 'Augmentation', 'Digits', 'ImageList', 'Normalization', 'Reading',
           'SeededSamples', 'build_dataset', 'build_transform', 'choose_data_set', 'normalization', 'normalized']

INAT_CATEGORIES = ('kingdom', 'phylum', 'class', 'order', 'supercategory', 'family', 'genus', 'name')

LONGEST_NAME = 200  # of a class, in characters


def _some(names: Sequence[str]) -> str:
    """The first of `names`, and how many more there are."""
    return repr(names[0]) + (f' (and {len(names) - 1} more)' if len(names) > 1 else '')


class Digits(Dataset):
    """scikit-learn's 1797 real handwritten digits (8x8 grey levels) as RGB images.

    Every fifth image of each digit is held out for evaluation.
    """

    classes = [str(digit) for digit in range(10)]

    def __init__(self, is_train: bool, transform: Callable) -> None:
        from sklearn.datasets import load_digits  # slow to import, and no other data set needs it

        data = load_digits()
        held_out = np.zeros(len(data.target), dtype=bool)
        for digit in range(10):
            held_out[np.flatnonzero(data.target == digit)[4::5]] = True
        chosen = ~held_out if is_train else held_out
        # Ink is given as 0 .. 16.
        self.images = np.round(data.images[chosen] * (255 / 16)).astype(np.uint8)
        self.targets = data.target[chosen].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index]).convert('RGB')), self.targets[index]


class SeededSamples(Dataset):
    """Makes each sample of `base` a function of its index and a given seed.

    An item is asked for by an (index, seed) pair, as `samplers.ResumableSampler` yields them. The random states of
    Python, numpy and torch (CPU) are put back afterwards, so that loading in the training process itself does not
    disturb that process' own randomness. A plain index is passed on to `base` as it is.
    """

    def __init__(self, base: Dataset) -> None:
        self.base = base

    @property
    def classes(self) -> list[str]:
        return self.base.classes

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int | tuple[int, int]) -> Any:
        if not isinstance(index, tuple):
            return self.base[index]
        index, seed = index
        with seeded(seed):
            return self.base[index]


# --- data sets by name ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a data set's name and folder leave open.

    Attributes:
        inat_category: what iNaturalist's labels are of, one of `INAT_CATEGORIES`.
        class_map: path of a list of the classes, a name a line, in the order of their labels; None or '' for none.
        train_split, val_split: the reader's names of the parts.
        input_key, target_key: its names of image and label; None for its defaults.
        exif_orientation: images are turned as EXIF says.
        batch_size, seed: for streams, which give whole batches in an order that the seed draws.
    """
    inat_category: str = 'name'
    class_map: str | None = None
    train_split: str = 'train'
    val_split: str = 'validation'
    input_key: str | None = None
    target_key: str | None = None
    exif_orientation: bool = False
    batch_size: int = 1
    seed: int = 0


def _existing(data_path: str | Path) -> Path:
    root = Path(data_path).expanduser()
    if not is_folder(root):
        raise UserError(f'--data-path {data_path} is not a folder: name the folder that holds the data set')
    return root


def _class_folders(folder: Path) -> list[str]:
    if not is_folder(folder):
        archive = folder.with_suffix('.zip')
        raise UserError(f'{archive} is to be unpacked: archives of images are read in .tar' if archive.is_file() else
                        f'{folder} is missing: --data-path must hold train/ and val/ with one folder per class')
    names = subfolders(folder)
    if not names:
        raise UserError(f'{folder} has no class folders: put the images of each class into a folder of its own')
    odd = [name for name in names if not name.isprintable() or len(name) > LONGEST_NAME]
    if odd:  # a checkpoint, which names the classes, could not be read again
        raise UserError(f'{folder} has a class folder {_some(odd)}: rename it, without control characters and to at '
                        f'most {LONGEST_NAME} characters')
    return names


def _class_names(part: Path) -> list[str]:
    """The names of the classes in a folder, or in a tar archive, by which labels are numbered: sorted."""
    if part.suffix != '.tar':
        return _class_folders(part)
    source = ReaderSource('', str(part), '')
    names = sorted(name for name in read_labels(source, open_reader(source))[1] if not is_no_class(name))
    if not names:
        raise UserError(f'{part} has no class folders: pack a folder for each class')
    return names


def _classes_of_val(train: Path, val: Path, num_classes: int | None) -> list[str]:
    """The classes that number the labels of val: those of train, or its own where there is no train."""
    found = _class_names(val)
    if train.exists():
        classes = _class_names(train)
        unknown = sorted(set(found) - set(classes))
        if unknown:
            raise UserError(f'{val} has class folder {_some(unknown)} that {train} lacks: remove it or add it there')
        return classes
    # Labels counted from val/ alone are right only if it has all the classes.
    if num_classes not in (None, len(found)):
        raise UserError(
            f'{val} has {len(found)} class folders, not {num_classes}: add {train} with a folder for every class'
        )
    return found


def _part(root: Path, name: str) -> Path:
    """The folder of a part, or its tar archive where there is no folder."""
    archive = root / f'{name}.tar'
    return archive if archive.is_file() and not is_folder(root / name) else root / name


def _imnet(is_train: bool, data_path: str | Path, transform: Callable, *, num_classes: int | None,
           reading: Reading) -> ImageList:
    """One folder per class in train/ and val/, or in train.tar and val.tar; those of train number the labels."""
    root = _existing(data_path)
    train, val = _part(root, 'train'), _part(root, 'val')
    part = train if is_train else val
    if reading.class_map:
        classes = read_class_map(reading.class_map)
        left_out = sorted(set(_class_names(part)) - set(classes))
        if left_out:
            print(f'--class-map {reading.class_map} leaves out {len(left_out)} class folders of {part}')
    else:
        classes = _class_names(train) if is_train else _classes_of_val(train, val, num_classes)
    dataset = _images_of_part(part, classes, transform, is_train, reading)
    if is_train:
        filled = {label for _, label in dataset.samples}
        empty = [str(train / name) for label, name in enumerate(classes) if label not in filled]
        if empty:
            raise UserError(f'no images in class folder {_some(empty)}: add images or remove the folder')
    elif not dataset.samples:
        raise UserError(f'no images in {val}: add images to its class folders')
    return dataset


def _images_of_part(part: Path, classes: list[str], transform: Callable, is_train: bool, reading: Reading) -> ImageList:
    """The images of these classes, not all of which need to be there."""
    if part.suffix != '.tar':
        samples = [(path, label) for label, name in enumerate(classes) if is_folder(part / name)
                   for path in images_of(part / name)]
        return ImageList(samples, classes, transform, is_train, reading.exif_orientation)
    source = ReaderSource('', str(part), '')
    opened = open_reader(source)
    samples, names = read_labels(source, opened)
    label_of = {name: label for label, name in enumerate(classes)}
    # In the order of the folders that were packed.
    found = sorted((label_of[names[label]], os.path.split(path), number) for number, (path, label) in enumerate(samples)
                   if names[label] in label_of and not os.path.basename(path).startswith('.'))
    return ReaderImages(source, opened.reader, [number for *_, number in found],
                        [(samples[number][0], label) for label, _, number in found], classes, transform, is_train,
                        reading.exif_orientation)


def _read_json(path: Path) -> Any:
    text = read_text(path, f'{path}, one of the iNaturalist annotations,')
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f'{path} is not valid JSON: fetch the file again') from error


def _inat(is_train: bool, data_path: str | Path, transform: Callable, *, year: int, reading: Reading, **_: Any,
          ) -> ImageList:
    """iNaturalist with labels numbered as in DeiT: by first appearance of the category in the training annotations."""
    inat_category = reading.inat_category
    if inat_category not in INAT_CATEGORIES:
        raise UserError(f'--inat-category {inat_category!r}: choose one of {", ".join(INAT_CATEGORIES)}')
    root = _existing(data_path)
    train = _read_json(root / f'train{year}.json')
    listed = train if is_train else _read_json(root / f'val{year}.json')
    entries = _read_json(root / 'categories.json')
    try:
        name_of = {int(entry.get('id', row)): str(entry[inat_category]) for row, entry in enumerate(entries)}
        seen = dict.fromkeys(name_of[int(note['category_id'])] for note in train['annotations'])
        label_of = {name: label for label, name in enumerate(seen)}
        # Four parts: images' folder, kingdom, category number, file.
        files = [image['file_name'].split('/') for image in listed['images']]
        labels = [label_of[name_of[int(parts[2])]] for parts in files]
        # The archives' own layout, or that of DeiT, without the kingdom's folder: the first image tells.
        if not root.joinpath(*files[0]).is_file():
            files = [[top, category, name] for top, _, category, name in files]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f'{type(error).__name__}: {error}'
        raise UserError(
            f'the {year} annotations in {root} do not fit together ({reason}): fetch the JSON files again'
        ) from error
    samples = [(str(root.joinpath(*parts)), label) for parts, label in zip(files, labels, strict=True)]
    return ImageList(samples, list(label_of), transform, is_train, reading.exif_orientation)


def _cifar(is_train: bool, data_path: str | Path, transform: Callable, *, source: type[CIFAR10], **_: Any) -> CIFAR10:
    root = Path(data_path).expanduser()
    folder = root / source.base_folder
    download = not is_folder(folder)
    try:
        for entry in () if download else os.scandir(folder):
            entry.stat()  # of files that it may not look at, torchvision says that they are missing
        return source(str(root), train=is_train, transform=transform, download=download)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = fault(error)
        if not download:
            at = getattr(error, 'filename', None) or folder
            raise UserError(f'{at} cannot be read ({reason})' if reason else
                            f'{folder} is incomplete or damaged: replace it, or remove it to download it') from error
        reason = ' '.join(str(error).split())
        raise UserError(
            f'{folder} is missing and cannot be downloaded ({reason}): unpack {source.filename} into {root}'
        ) from error


def _digits(is_train: bool, data_path: str | Path | None, transform: Callable, **_: Any) -> Digits:
    return Digits(is_train, transform)


def _of_reader(is_train: bool, data_set: str, data_path: str | None, transform: Callable, reading: Reading) -> Dataset:
    """What one of timm's readers reads."""
    root = None if data_path is None else str(Path(data_path).expanduser())
    source = ReaderSource(data_set, root, reading.train_split if is_train else reading.val_split, reading.input_key,
                          reading.target_key, is_train, reading.batch_size, reading.seed)
    listed = read_class_map(reading.class_map) if reading.class_map else None
    if is_stream(data_set):
        if reading.exif_orientation:
            raise UserError(f'--exif-orientation: {data_set} gives its images decoded, leave it out')
        return StreamedImages(source, listed, transform)
    opened = open_reader(source)
    found, names = read_labels(source, opened)
    labels = Labels(names, listed, f'--data-set {data_set}')
    samples = [(name, labels.number(label)) for name, label in found]
    if not samples:
        raise UserError(f'--data-set {data_set}: {source.split} has no images')
    if hasattr(opened, 'reader'):
        return ReaderImages(source, opened.reader, range(len(samples)), samples, labels.classes, transform, is_train,
                            reading.exif_orientation)
    return TorchvisionImages(opened, [label for _, label in samples], labels.classes, transform)


# Each builder is called as builder(is_train, data_path, transform, num_classes=..., reading=...) and returns a data set
# that has `classes`.
DATASETS: dict[str, Callable[..., Dataset]] = {
    'CIFAR': partial(_cifar, source=CIFAR100),
    'CIFAR10': partial(_cifar, source=CIFAR10),
    'DIGITS': _digits,
    'IMNET': _imnet,
    'INAT': partial(_inat, year=2018),
    'INAT19': partial(_inat, year=2019),
}


def choose_data_set(asked: str | None, data_path: str | None, described: str | None = None, file: str = '') -> str:
    """The data set of a command: the one asked for, else that of the file, else the default of --data-path.

    Args:
        asked: what --data-set names.
        described: what `file` says that its network was trained on.

    Raises:
        UserError: it is unknown, or nobody says where it lies.
    """
    chosen = asked or described or ('DIGITS' if data_path is None else 'IMNET')
    said = f'--data-set {chosen}' if asked or not described else f'{file} is of {chosen}'
    if chosen not in DATASETS and not is_reader(chosen):
        raise UserError(f'--data-set {chosen!r} is unknown: choose one of {", ".join(DATASETS)}, or '
                        f'{", ".join(f"{prefix}/NAME" for prefix in READERS)}')
    if is_reader(chosen) and not asked:  # a file does not decide what is fetched
        raise UserError(f'{said}: pass its --data-set')
    if data_path is None and chosen != 'DIGITS' and not chosen.startswith(('hfds/', 'hfids/', 'tfds/')):
        raise UserError(f'{said} needs --data-path' if asked else f'{said}: pass its --data-path')
    return chosen


def build_dataset(is_train: bool, data_set: str, data_path: str | Path | None, transform: Callable, *,
                  num_classes: int | None = None, reading: Reading = Reading()) -> tuple[Dataset, int]:
    """The training or the evaluation part of a data set, and its number of classes.

    Items are (transformed image, label) pairs; `.classes` names the labels.

    Args:
        data_set: a name of `DATASETS`, or one of timm's readers, see `files.readers`.
        data_path: the folder that holds it; DIGITS needs none.
        transform: applied to the RGB image, see `build_transform`.
        num_classes: how many classes to expect, where an ImageNet folder has no train/ to count them by.
        reading: what else there is to say.

    Raises:
        UserError: an unknown name, or data that is missing, empty or inconsistent.
    """
    data_set = choose_data_set(data_set, None if data_path is None else str(data_path))
    if reading.class_map and data_set != 'IMNET' and not is_reader(data_set):
        raise UserError(f'--class-map is of folders and of {", ".join(READERS)}, {data_set} names its classes itself')
    if is_reader(data_set):
        dataset = _of_reader(is_train, data_set, data_path, transform, reading)
    else:
        dataset = DATASETS[data_set](is_train, data_path, transform, num_classes=num_classes, reading=reading)
    dataset.classes = [printable(name) for name in readable(dataset.classes)]
    longest = max(dataset.classes, key=len)
    if len(longest) > LONGEST_NAME:
        raise UserError(f'class {longest[:40]!r}... has a name of {len(longest)} characters, at most {LONGEST_NAME} '
                        'can be kept: rename it')
    return dataset, len(dataset.classes)
