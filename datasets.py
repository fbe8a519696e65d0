"""The data sets by name, their image transforms, and reproducible randomness for each sample."""

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100

from files.images import images_of, load_image, subfolders
from files.paths import parse_json, read_text
from utils import UserError, printable, readable

__all__ = ['DATASETS', 'INAT_CATEGORIES', 'Augmentation', 'Digits', 'ImageList', 'SeededSamples', 'build_dataset',
           'build_transform', 'normalized']

INAT_CATEGORIES = ('kingdom', 'phylum', 'class', 'order', 'supercategory', 'family', 'genus', 'name')

_BICUBIC = transforms.InterpolationMode.BICUBIC
# Up to this size images are taken whole: such data sets (CIFAR) have nothing to spare around the object.
_SMALL = 32
_MAX_UNREADABLE = 50
LONGEST_NAME = 200  # of a class, in characters


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's operation, which Pillow 13 refuses for the 0 bits that RandAugment's noise can ask for: those give black.
    """
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


auto_augment.NAME_TO_OP.update(Posterize=_posterize, PosterizeIncreasing=_posterize, PosterizeOriginal=_posterize)


def _some(names: Sequence[str]) -> str:
    """The first of `names`, and how many more there are."""
    return repr(names[0]) + (f' (and {len(names) - 1} more)' if len(names) > 1 else '')


class ImageList(Dataset):
    """Image files with labels.

    A file that cannot be decoded stops an evaluation, which must cover exactly its images, and is replaced by the
    next readable one in training, where one image among many does not matter but the run does.

    Args:
        samples: (path, label) pairs, at least one.
        classes: name of each label.
        transform: applied to the RGB image.
        skip_unreadable: replace unreadable images (training) instead of raising (evaluation).
    """

    def __init__(
        self, samples: list[tuple[str, int]], classes: list[str], transform: Callable, skip_unreadable: bool
    ) -> None:
        self.samples = samples
        self.classes = classes
        self.transform = transform
        self.skip_unreadable = skip_unreadable
        self.skipped = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The transformed image and its label.

        Raises:
            UserError: an unreadable image, where these are not skipped, or 50 of them in a row.
        """
        for offset in range(_MAX_UNREADABLE):
            path, label = self.samples[(index + offset) % len(self)]
            try:
                image = load_image(path)
            except Exception as error:  # decoders raise nearly anything on a damaged file
                reason = ' '.join(f'{type(error).__name__}: {error}'.split())
            else:
                return self.transform(image), label
            if not self.skip_unreadable:
                raise UserError(f'{path} is not a readable image ({reason}): replace the file or remove it')
            self.skipped += 1
            warnings.warn(printable(f'skipped unreadable image number {self.skipped}: {path} ({reason})'), stacklevel=2)
        raise UserError(f'{_MAX_UNREADABLE} images in a row are unreadable, up to {path} ({reason}): check the data')


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
            return self.base[index]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            generator.set_state(states[2])


# --- transforms -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """The random augmentation of training, DeiT's unless told otherwise; timm's `create_transform` explains the values.

    Attributes:
        aa: timm's name of a policy; 'none', '' or None for colour jitter instead of a policy.
        train_interpolation: 'random', 'bilinear' or 'bicubic'.
        random_resized_crop: False takes the fixed crop of evaluation.
        reprob, remode, recount: how likely an image has parts erased, with what they are filled, and how many.
    """
    color_jitter: float = 0.4
    aa: str | None = 'rand-m9-mstd0.5-inc1'
    train_interpolation: str = 'bicubic'
    random_resized_crop: bool = True
    reprob: float = 0.25
    remode: str = 'pixel'
    recount: int = 1


def _fixed_crop(size: int, ratio: float) -> list[Callable]:
    """The crop of evaluation: the middle of the resized image, or all of it for small sizes."""
    resized = size if size <= _SMALL else int(size / ratio)
    return [transforms.Resize(resized, interpolation=_BICUBIC), transforms.CenterCrop(size)]


def normalized() -> list[Callable]:
    """The last transforms of all: they turn a PIL image into the normalized tensor that networks take."""
    return [transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]


def _digits_transform(is_train: bool, size: int) -> transforms.Compose:
    """Digits change their meaning by flips and by strong augmentation, so training only moves them a little."""
    moved = transforms.RandomAffine(
        degrees=8, translate=(0.08, 0.08), scale=(0.92, 1.08), interpolation=transforms.InterpolationMode.BILINEAR
    )
    resized = transforms.Resize((size, size), interpolation=_BICUBIC)
    return transforms.Compose([resized, *([moved] if is_train else []), *normalized()])


def build_transform(is_train: bool, input_size: int, data_set: str = 'IMNET', *,
                    augmentation: Augmentation = Augmentation(),
                    eval_crop_ratio: float = 0.875) -> transforms.Compose:
    """The transform from a PIL image to a normalized float tensor of shape (3, input_size, input_size).

    Args:
        is_train: with the random augmentations of training.
        data_set: a name of `DATASETS`; DIGITS has augmentations of its own.
        eval_crop_ratio: share of the resized image's side that the fixed crop takes.

    Raises:
        UserError: an unknown interpolation, erasing mode or augmentation policy.
    """
    if data_set == 'DIGITS':
        return _digits_transform(is_train, input_size)
    fixed_crop = _fixed_crop(input_size, eval_crop_ratio)
    if not is_train:
        return transforms.Compose([*fixed_crop, *normalized()])

    transform = _augmented(input_size, augmentation)
    # The first of timm's transforms is its RandomResizedCrop.
    if not augmentation.random_resized_crop:
        transform.transforms[:1] = fixed_crop
    elif input_size <= _SMALL:
        whole = transforms.Resize(input_size, interpolation=_BICUBIC)
        transform.transforms[:1] = [whole, transforms.RandomCrop(input_size, padding=4)]
    return transform


def _augmented(input_size: int, augmentation: Augmentation) -> transforms.Compose:
    """timm's transform of training, beginning with RandomResizedCrop."""
    interpolation, remode, aa = augmentation.train_interpolation, augmentation.remode, augmentation.aa
    if interpolation not in ('random', 'bilinear', 'bicubic'):
        raise UserError(f'--train-interpolation {interpolation!r}: choose random, bilinear or bicubic')
    if remode not in ('const', 'rand', 'pixel'):
        raise UserError(f'--remode {remode!r}: choose const, rand or pixel')
    try:
        return create_transform(
            input_size=input_size, is_training=True, color_jitter=augmentation.color_jitter,
            auto_augment=None if aa in (None, '', 'none') else aa, interpolation=interpolation,
            re_prob=augmentation.reprob, re_mode=remode, re_count=augmentation.recount)
    except (AssertionError, IndexError, KeyError, ValueError) as error:
        raise UserError(f"--aa {aa!r} is not a policy: choose e.g. 'rand-m9-mstd0.5-inc1' or 'none'") from error


# --- data sets by name ------------------------------------------------------------------------------------------------


def _existing(data_path: str | Path) -> Path:
    root = Path(data_path).expanduser()
    if not root.is_dir():
        raise UserError(f'--data-path {data_path} is not a folder: name the folder that holds the data set')
    return root


def _class_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(f'{folder} is missing: --data-path must hold train/ and val/ with one folder per class')
    names = subfolders(folder)
    if not names:
        raise UserError(f'{folder} has no class folders: put the images of each class into a folder of its own')
    odd = [name for name in names if not name.isprintable() or len(name) > LONGEST_NAME]
    if odd:  # a checkpoint, which names the classes, could not be read again
        raise UserError(f'{folder} has a class folder {_some(odd)}: rename it, without control characters and to at '
                        f'most {LONGEST_NAME} characters')
    return names


def _classes_of_val(train: Path, val: Path, num_classes: int | None) -> list[str]:
    """The classes that number the labels of val/: those of train/, or its own where there is no train/."""
    found = _class_folders(val)
    if train.is_dir():
        classes = _class_folders(train)
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


def _imnet(is_train: bool, data_path: str | Path, transform: Callable, *, num_classes: int | None, **_: Any,
           ) -> ImageList:
    """One folder per class in train/ and val/; the class folders of train/ number the labels."""
    root = _existing(data_path)
    train, val = root / 'train', root / 'val'
    folder = train if is_train else val
    classes = _class_folders(train) if is_train else _classes_of_val(train, val, num_classes)
    label_of = {name: label for label, name in enumerate(classes)}
    # val/ need not have all classes.
    samples = [(path, label) for name, label in label_of.items() if (folder / name).is_dir()
               for path in images_of(folder / name)]
    if is_train:
        filled = {label for _, label in samples}
        empty = [str(train / name) for name, label in label_of.items() if label not in filled]
        if empty:
            raise UserError(f'no images in class folder {_some(empty)}: add images or remove the folder')
    elif not samples:
        raise UserError(f'no images in {val}: add images to its class folders')
    return ImageList(samples, classes, transform, skip_unreadable=is_train)


def _read_json(path: Path) -> Any:
    text = read_text(path, f'{path}, one of the iNaturalist annotations,')
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f'{path} is not valid JSON: fetch the file again') from error


def _inat(is_train: bool, data_path: str | Path, transform: Callable, *, year: int, inat_category: str, **_: Any,
          ) -> ImageList:
    """iNaturalist with labels numbered as in DeiT: by first appearance of the category in the training annotations."""
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
    return ImageList(samples, list(label_of), transform, skip_unreadable=is_train)


def _cifar(is_train: bool, data_path: str | Path, transform: Callable, *, source: type[CIFAR10], **_: Any) -> CIFAR10:
    root = Path(data_path).expanduser()
    folder = root / source.base_folder
    download = not folder.is_dir()
    try:
        return source(str(root), train=is_train, transform=transform, download=download)
    except (OSError, RuntimeError, HTTPException) as error:
        if not download:
            raise UserError(f'{folder} is incomplete or damaged: replace it, or remove it to download it') from error
        reason = ' '.join(str(error).split())
        raise UserError(
            f'{folder} is missing and cannot be downloaded ({reason}): unpack {source.filename} into {root}'
        ) from error


def _digits(is_train: bool, data_path: str | Path | None, transform: Callable, **_: Any) -> Digits:
    return Digits(is_train, transform)


# Each builder is called as builder(is_train, data_path, transform, inat_category=..., num_classes=...) and returns a
# data set that has `classes`.
DATASETS: dict[str, Callable[..., Dataset]] = {
    'CIFAR': partial(_cifar, source=CIFAR100),
    'CIFAR10': partial(_cifar, source=CIFAR10),
    'DIGITS': _digits,
    'IMNET': _imnet,
    'INAT': partial(_inat, year=2018),
    'INAT19': partial(_inat, year=2019),
}


def build_dataset(is_train: bool, data_set: str, data_path: str | Path | None, transform: Callable, *,
                  inat_category: str = 'name', num_classes: int | None = None) -> tuple[Dataset, int]:
    """The training or the evaluation part of a data set, and its number of classes.

    Items are (transformed image, label) pairs; `.classes` names the labels.

    Args:
        data_set: a name of `DATASETS`.
        data_path: the folder that holds it; DIGITS needs none.
        transform: applied to the RGB image, see `build_transform`.
        inat_category: what iNaturalist's labels are of, one of `INAT_CATEGORIES`.
        num_classes: how many classes to expect, where an ImageNet folder has no train/ to count them by.

    Raises:
        UserError: an unknown name, or data that is missing, empty or inconsistent.
    """
    if data_set not in DATASETS:
        raise UserError(f'--data-set {data_set!r} is unknown: choose one of {", ".join(DATASETS)}')
    build = DATASETS[data_set]
    dataset = build(is_train, data_path, transform, inat_category=inat_category, num_classes=num_classes)
    dataset.classes = readable(dataset.classes)
    return dataset, len(dataset.classes)
