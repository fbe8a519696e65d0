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

from datasets import normalized
from losses import SoftLabels
from utils import RunError, UserError, write_whole

__all__ = ['StoredCrops', 'StoredLabels', 'fingerprint', 'raw_image', 'take_crop', 'top_k']

FORMAT = 'soft labels 1'
_TENSORS = 'boxes', 'flips', 'indices', 'values'


def top_k(probabilities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The classes and the values of the k largest, as int32 and half: (..., classes) -> (..., k) each."""
    values, indices = probabilities.topk(k, dim=-1)
    return indices.to(torch.int32), values.half()


def take_crop(image: Image.Image, box: list[int], flip: bool, size: int, interpolation: str) -> Tensor:
    """The crop as networks take it, normalized, (3, size, size).

    Args:
        box: top, left, height, width in pixels of the image.
        flip: mirror the crop.
        interpolation: 'bilinear' or 'bicubic'.
    """
    image = functional.resized_crop(image, *box, [size, size], transforms.InterpolationMode(interpolation))
    return transforms.Compose(normalized())(functional.hflip(image) if flip else image)


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
        return f'{crops} crops of {images} images, {k} classes each, by {self.origin["teacher"]}'

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
        try:
            with safetensors.safe_open(path, 'pt') as file:
                origin = file.metadata() or {}
                if origin.pop('format', None) != FORMAT:
                    raise UserError(f'--soft-labels {path} holds no soft labels: write it with soft_labels.py')
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f'--soft-labels {path} cannot be read ({" ".join(str(error).split())}): write it with '
                            'soft_labels.py') from error
        return cls(**tensors, origin=origin)


class StoredCrops(Dataset):
    """A data set's images as their stored crops: an item is one of them, (3, size, size), and its `SoftLabels`.

    Args:
        base: the data set that the labels are of; from here on it gives raw images.
        size: height and width of the images in training.

    Raises:
        UserError: the labels are of other images, or of another size.
    """

    def __init__(self, base: Dataset, stored: StoredLabels, size: int) -> None:
        origin = stored.origin
        if len(base) != len(stored.values) or origin['fingerprint'] != fingerprint(base):
            raise UserError(f'--soft-labels are of {len(stored.values)} other images than the {len(base)} here: write '
                            'them anew with soft_labels.py')
        if int(origin['input_size']) != size:
            raise UserError(f'--soft-labels are for --input-size {origin["input_size"]}, not {size}')
        base.transform = raw_image
        self.base, self.stored, self.size = base, stored, size
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
        pixels = take_crop(image, stored.boxes[index, crop].tolist(), bool(stored.flips[index, crop]), self.size,
                           stored.origin['interpolation'])
        return pixels, SoftLabels(torch.tensor(label), stored.indices[index, crop], stored.values[index, crop])
