"""Images for a look into a network, and back to pictures."""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from datasets import IMAGENET, Normalization
from files.samples import first_images

__all__ = ['stacked', 'to_pictures']


def stacked(dataset: Dataset, count: int | None = None) -> Tensor:
    """Images of the data set, (B, C, H, W): all of them, or `count` at equal distances from the first to the last.

    Of a stream, which cannot be asked for an image, they are the first.
    """
    if isinstance(dataset, IterableDataset):
        return first_images(dataset, count or len(dataset))
    count = len(dataset) if count is None else min(count, len(dataset))
    indices = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
    return torch.stack([dataset[index][0] for index in indices])


def to_pictures(images: Tensor, by: Normalization = IMAGENET) -> np.ndarray:
    """Normalized images (B, C, H, W) as pictures (B, H, W, 3) from 0 to 1."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (by.mean, by.std))
    pictures = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
    return pictures.expand(-1, -1, -1, 3).numpy()
