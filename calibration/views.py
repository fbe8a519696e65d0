"""Several views of each calibration image: what is learned from few images is to hold for others."""
from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2

__all__ = ['view_of']

AREA = (0.5, 1.)  # of the image that a view shows


def view_of(images: Tensor, seed: int) -> Tensor:
    """Another view of each image: a part of it at full size, mirrored or not. (B, C, H, W) -> (B, C, H, W).

    It follows from the seed; no global random state is used.
    """
    crop = v2.RandomResizedCrop(images.shape[-2:], scale=AREA, antialias=True)
    flip = v2.RandomHorizontalFlip()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.stack([flip(crop(image)) for image in images])
