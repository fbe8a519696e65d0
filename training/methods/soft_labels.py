"""A teacher's answers for several crops of each training image, stored: training on them needs no teacher forward.

FKD (Shen and Xing, ECCV 2022, arXiv 2112.01528): for each image, M random crops with the teacher's probabilities for
each. Of these the K largest are kept, in half precision, and what is missing to 1 is spread evenly over the other
classes (the paper's marginal smoothing). The teacher has seen just these crops, so training shows no others: there is
no further augmentation. Each time an image comes up, one of its crops is drawn; the paper puts several of them into a
batch, as repeated augmentation does here.

The command `soft_labels.py` writes a file, in the safetensors format.

Nothing of this costs the deployed network anything. Training saves the teacher's forward, and only has to spread a
stored label over the classes (`losses.SoftLabels`). A file takes 17 + 6 K bytes a crop.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import functional

from datasets import IMAGENET, Normalization, normalized
from files.paths import fault
from losses import SoftLabels
from utils import RunError, UserError, printable, write_whole

__all__ = ['StoredCrops', 'StoredLabels', 'fingerprint', 'raw_image', 'take_crop', 'top_k']

FORMAT = 'soft labels 1'
_TENSORS = 'boxes', 'flips', 'indices', 'values'
LARGEST_BOX = 2 ** 20  # pixels


def top_k(probabilities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The classes and the values of the k largest, as int32 and half: (..., classes) -> (..., k) each."""
    values, indices = probabilities.topk(k, dim=-1)
    return indices.to(torch.int32), values.half()


def take_crop(image: Image.Image, box: list[int], flip: bool, size: int, interpolation: str,
              by: Normalization = IMAGENET) -> Tensor:
    """The crop as networks take it, normalized, (C, size, size).

    Args:
        box: top, left, height, width in pixels of the image.
        flip: mirror the crop.
        interpolation: 'bilinear' or 'bicubic'.
    """
    image = functional.resized_crop(image, *box, [size, size], transforms.InterpolationMode(interpolation))
    return transforms.Compose(normalized(by))(functional.hflip(image) if flip else image)


def raw_image(image: Image.Image) -> Image.Image:
    """The transform of a data set that leaves its images as they are, for a wrapper to crop them."""
    return image


def fingerprint(dataset: Dataset) -> str:
    """A hash that tells whether two data sets have the same images in the same order.

    It is made of file names and labels, or of the labels alone where the images are no files.
    """
    samples = getattr(dataset, 'samples', None)
    items = list(dataset.targets) if samples is None else [(os.path.basename(path), label) for path, label in samples]
    return hashlib.sha256(json.dumps([items, list(dataset.classes)]).encode()).hexdigest()


@dataclass
class StoredLabels:
    """What a file holds.

    Attributes:
        boxes: top, left, height, width of every crop, int32 (images, M, 4).
        flips: whether it is mirrored, bool (images, M).
        indices: the classes of its K largest probabilities, int32 (images, M, K), see `top_k`.
        values: these probabilities, half (images, M, K).
        origin: what the labels are of: input_size, interpolation, fingerprint and teacher.
    """
    boxes: Tensor
    flips: Tensor
    indices: Tensor
    values: Tensor
    origin: dict[str, str]

    def __str__(self) -> str:
        images, crops, k = self.values.shape
        return f'{crops} crops of {images} images, {k} classes each, by {printable(self.origin["teacher"])}'

    def write(self, path: str | Path) -> None:
        tensors = {name: getattr(self, name) for name in _TENSORS}
        metadata = {'format': FORMAT, **self.origin}
        try:
            write_whole(path, lambda beside: safetensors.torch.save_file(tensors, beside, metadata))
        except (OSError, safetensors.SafetensorError) as error:
            raise RunError(f'{path} cannot be written ({" ".join(str(error).split())})') from error

    @classmethod
    def read(cls, path: str | Path) -> StoredLabels:
        """What `write` wrote.

        Raises:
            UserError: no such file, or one of another kind.
        """
        remedy = 'write it with soft_labels.py'
        if not os.path.isfile(path):  # opening a pipe would wait for a writer
            raise UserError(f'--soft-labels {path} cannot be read (no such file): {remedy}')
        try:
            with safetensors.safe_open(path, 'pt') as file:
                origin = file.metadata() or {}
                if origin.pop('format', None) != FORMAT:
                    raise UserError(f'--soft-labels {path} holds no soft labels: {remedy}')
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
        except (MemoryError, OSError, safetensors.SafetensorError) as error:
            raise UserError(f'--soft-labels {path} cannot be read ({fault(error) or " ".join(str(error).split())}): '
                            f'{remedy}') from error
        wrong = _wrong_origin(origin) or _wrong_tensor(**tensors)
        if wrong:
            raise UserError(f'--soft-labels {path}: {wrong}: {remedy}')
        return cls(**tensors, origin=origin)


def _wrong_origin(origin: dict[str, str]) -> str | None:
    """What a file says of its labels that cannot be; None where all is right."""
    kinds = {'input_size': '[1-9][0-9]{0,3}', 'interpolation': 'bilinear|bicubic', 'fingerprint': '[0-9a-f]{64}',
             'teacher': '(?s:.*)'}
    for name, kind in kinds.items():
        if name not in origin or not re.fullmatch(kind, origin[name]):
            return f'its {name} is {origin[name][:40]!r}' if name in origin else f'its {name} is missing'
    return None


def _wrong_tensor(boxes: Tensor, flips: Tensor, indices: Tensor, values: Tensor) -> str | None:
    """What is no label of a crop; None where all are."""
    kinds = {'boxes': (boxes, torch.int32, 3), 'flips': (flips, torch.bool, 2), 'indices': (indices, torch.int32, 3),
             'values': (values, torch.float16, 3)}
    for name, (tensor, dtype, axes) in kinds.items():
        if tensor.dtype != dtype or tensor.ndim != axes or 0 in tensor.shape or tensor.shape[:2] != flips.shape:
            return f'{name} are of type {tensor.dtype} and shape {list(tensor.shape)}'
    if boxes.shape[2] != 4 or indices.shape != values.shape:
        return 'boxes have not 4 numbers, or there are not as many indices as values'
    if int(boxes.min()) < 0 or int(boxes[..., 2:].min()) < 1 or int(boxes.max()) > LARGEST_BOX:
        return 'boxes lie outside of any image'
    if int(indices.min()) < 0 or bool((indices.sort(-1).values.diff(dim=-1) == 0).any()):
        return 'indices are negative, or name a class twice'
    numbers = values.float()
    if not bool(((numbers >= 0) & (numbers <= 1)).all()) or bool((numbers.diff(dim=-1) > 0).any()):
        return 'values are no probabilities from 0 to 1 in falling order'
    if float(numbers.sum(-1).max()) > 1.01:  # each of them is rounded to half precision
        return 'values of a crop add up to more than 1'
    return None


class StoredCrops(Dataset):
    """A data set's images as their stored crops: an item is one of them, (C, size, size), and its `SoftLabels`.

    Args:
        base: the data set that the labels are of; from here on it gives raw images.
        size: height and width of the images in training.
        by: their normalization.

    Raises:
        UserError: the labels are of other images, or of another size.
    """

    def __init__(self, base: Dataset, stored: StoredLabels, size: int, by: Normalization = IMAGENET) -> None:
        origin = stored.origin
        if len(base) != len(stored.values) or origin['fingerprint'] != fingerprint(base):
            raise UserError(f'--soft-labels are of {len(stored.values)} other images than the {len(base)} here: write '
                            'them anew with soft_labels.py')
        if int(stored.indices.max()) >= len(base.classes):
            raise UserError(f'--soft-labels name class {int(stored.indices.max())}, the data set has '
                            f'{len(base.classes)}: write them anew with soft_labels.py')
        if int(origin['input_size']) != size:
            raise UserError(f'--soft-labels are for --input-size {origin["input_size"]}, not {size}')
        base.transform = raw_image
        self.base, self.stored, self.size, self.normalization = base, stored, size, by
        self.transform = None  # calibration sets one for a while, to see whole images instead of crops

    @property
    def classes(self) -> list[str]:
        return self.base.classes

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> tuple[Tensor, SoftLabels | int]:
        image, label = self.base[index]
        if self.transform is not None:
            return self.transform(image), label
        stored = self.stored
        crop = int(torch.randint(stored.boxes.shape[1], ()))
        top, left, height, width = box = stored.boxes[index, crop].tolist()
        if left + width > image.width or top + height > image.height:
            raise UserError(f'--soft-labels have a crop outside of image {index}: write them anew with soft_labels.py')
        pixels = take_crop(image, box, bool(stored.flips[index, crop]), self.size,
                           stored.origin['interpolation'], self.normalization)
        return pixels, SoftLabels(torch.tensor(label), stored.indices[index, crop], stored.values[index, crop])
