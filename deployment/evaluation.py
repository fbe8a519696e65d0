"""The accuracy of a deployed network on the images of a data set, and how often it agrees with another network."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from checkpoints.networks import ModelInfo
from deployment.predictor import Predictor
from utils import UserError

__all__ = ['Evaluated', 'agreement', 'check_classes', 'check_comparable', 'evaluate_classes', 'evenly_spread']


class Evaluated(NamedTuple):
    """An evaluation: the statistics, and the class that was predicted for every image, (n,)."""
    stats: dict[str, Any]
    classes: Tensor


def check_classes(path: str, info: ModelInfo, data_set: str, classes: list[str]) -> None:
    """Checks that a data set has the network's classes, and warns where it has as many of other names.

    Raises:
        UserError: their numbers differ.
    """
    if len(classes) != info.num_classes:
        raise UserError(f'{path} has {info.num_classes} classes, {data_set} has {len(classes)}: choose the data set of '
                        'its classes')
    if info.classes not in (None, list(classes)):
        print('warning: the classes of the data set have other names than those that the network was trained on')


def evenly_spread(dataset: Dataset, limit: int | None) -> Dataset:
    """At most `limit` images of the data set, evenly spread over it; all of them where it is None."""
    if limit is None or limit >= len(dataset):
        return dataset
    if isinstance(dataset, IterableDataset):
        raise UserError(f'--limit {limit}: images that only come in the order of their reader cannot be picked')
    return Subset(dataset, [index * len(dataset) // limit for index in range(limit)])


def evaluate_classes(evaluate: Callable[[Predictor], dict[str, Any]], predict: Predictor) -> Evaluated:
    """Evaluates a predictor, and notes the class that it predicts for every image.

    Args:
        evaluate: what takes a predictor through the images and returns its statistics.
    """
    classes = []

    def predict_and_note(images: Tensor) -> Tensor:
        logits = predict(images)
        classes.append(logits.argmax(1))
        return logits

    stats = evaluate(predict_and_note)
    return Evaluated(stats, torch.cat(classes))


def check_comparable(path: str, info: ModelInfo, other_path: str, other: ModelInfo) -> None:
    """Refuses to compare the networks of two files that do not take the same images to the same classes."""
    if (other.num_classes, other.input_size) != (info.num_classes, info.input_size):
        raise UserError(f'--checkpoint {other_path} has other classes or another image size than {path}')
    if other.normalization != info.normalization:
        raise UserError(f'--checkpoint {other_path} takes images of another mean, deviation or number of channels than '
                        f'{path}')


def agreement(one: Evaluated, other: Evaluated) -> str:
    """Says for how many images both predict the same class."""
    same, images = int((one.classes == other.classes).sum()), len(one.classes)
    return f'Both predict the same class for {same} of {images} images: {100 * same / images:.1f}%'
