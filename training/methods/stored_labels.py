"""A teacher's answers for several crops of each training image, stored: training on them needs no teacher forward.

FKD (Shen and Xing, ECCV 2022, arXiv 2112.01528): for each image, M random crops with the teacher's probabilities for
each. Of these the K largest are kept, in half precision, and what is missing to 1 is spread evenly over the other
classes (the paper's marginal smoothing). The teacher has seen just these crops, so training shows no others: there is
no further augmentation. One of an image's crops is drawn each time; the paper takes several of them in a batch, as
repeated augmentation does here.

A file is in the safetensors format. `soft_labels.py` writes it.

Cost: none in the deployed network. In training, the teacher's forward is saved; a label is scattered to its classes.
In the file, 17 + 6 K bytes a crop.
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
from utils import UserError

__all__ = ['StoredCrops', 'StoredLabels', 'fingerprint', 'raw_image', 'take_crop', 'top_k']

FORMAT = 'soft labels 1'


def top_k(probabilities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(indices, values) of the k largest, int32 and half: (..., classes) -> (..., k) each."""
    values, indices = probabilities.topk(k, dim=-1)
    return indices.to(torch.int32), values.half()


def take_crop(image: Image.Image, box: list[int], flip: bool, size: int, interpolation: str) -> Tensor:
    """The crop as networks take it, (3, size, size).

    Args:
        box: top, left, height, width in pixels of the image.
        interpolation: 'bilinear' or 'bicubic'.
    """
    image = functional.resized_crop(image, *box, [size, size], transforms.InterpolationMode(interpolation))
    return transforms.Compose(normalized())(functional.hflip(image) if flip else image)


def raw_image(image: Image.Image) -> Image.Image:
    """The transform of a data set whose images are to be cropped by a wrapper of it."""
    return image


def fingerprint(dataset: Dataset) -> str:
    """Of the images' order: file names and labels, or the labels of a data set without files."""
    samples = getattr(dataset, 'samples', None)
    items = list(dataset.targets) if samples is None else [(os.path.basename(path), label) for path, label in samples]
    return hashlib.sha256(json.dumps([items, list(dataset.classes)]).encode()).hexdigest()


@dataclass
class StoredLabels:
    """What a file holds.

    Attributes:
        boxes: top, left, height, width of every crop, int32 (images, M, 4).
        flips: whether it is mirrored, bool (images, M).
        indices: int32 (images, M, K), and values: half (images, M, K), see `top_k`.
        about: input_size, interpolation, fingerprint and teacher.
    """
    boxes: Tensor
    flips: Tensor
    indices: Tensor
    values: Tensor
    about: dict[str, str]

    def __str__(self) -> str:
        images, crops, k = self.values.shape
        return f'{crops} crops of {images} images, {k} classes each, by {self.about["teacher"]}'

    def write(self, path: str | Path) -> None:
        path = Path(path)
        beside = path.with_name(f'.{path.name}.{os.getpid()}')
        tensors = {name: getattr(self, name) for name in ('boxes', 'flips', 'indices', 'values')}
        try:
            safetensors.torch.save_file(tensors, beside, {'format': FORMAT, **self.about})
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: str | Path) -> StoredLabels:
        """Raises UserError: no such file, or one of another kind."""
        try:
            with safetensors.safe_open(path, 'pt') as file:
                about = file.metadata() or {}
                if about.pop('format', None) != FORMAT:
                    raise UserError(f'--soft-labels {path} holds no soft labels: write it with soft_labels.py')
                tensors = {name: file.get_tensor(name) for name in ('boxes', 'flips', 'indices', 'values')}
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f'--soft-labels {path} cannot be read ({" ".join(str(error).split())}): write it with '
                            'soft_labels.py') from error
        return cls(**tensors, about=about)


class StoredCrops(Dataset):
    """The stored crops of a data set: an item is one of an image's, (3, size, size), with its `SoftLabels`.

    Args:
        base: the data set that the labels are of; its transform is taken out.
        size: of the images in training.

    Raises:
        UserError: the labels are of other images, or of another size.
    """

    def __init__(self, base: Dataset, stored: StoredLabels, size: int) -> None:
        about = stored.about
        if len(base) != len(stored.values) or about['fingerprint'] != fingerprint(base):
            raise UserError(f'--soft-labels are of {len(stored.values)} other images than the {len(base)} here: write '
                            'them anew with soft_labels.py')
        if int(about['input_size']) != size:
            raise UserError(f'--soft-labels are for --input-size {about["input_size"]}, not {size}')
        base.transform = raw_image
        self.base, self.stored, self.size = base, stored, size
        self.transform = None  # calibration sets another for a while, and sees whole images

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
                           stored.about['interpolation'])
        return pixels, SoftLabels(torch.tensor(label), stored.indices[index, crop], stored.values[index, crop])
