"""Building networks by name, and those that a file describes."""
from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn as nn
from torch import Tensor

from checkpoints.descriptions import ModelInfo, check_registered, check_sizes
from checkpoints.states import check_fits, check_steps, load_quantized
from utils import UserError

__all__ = ['build_described', 'check_described', 'create_network']


def create_network(name: str, num_classes: int, input_size: int, *, what: str = '--model', **kwargs: Any) -> nn.Module:
    """A network of timm's registry, for images of (input_size, input_size).

    Args:
        what: names the network in messages.
        **kwargs: of `timm.create_model`.

    Raises:
        UserError: it is unknown, or its options do not go together.
    """
    check_registered(name, what)
    try:
        try:
            return timm.create_model(name, img_size=input_size, num_classes=num_classes, **kwargs)
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
            # Not a vision transformer: its weights do not depend on the image size.
            return timm.create_model(name, num_classes=num_classes, **kwargs)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = ' '.join(str(error).split())
        raise UserError(f'{what} {name} cannot be built ({reason}): correct its options or --input-size') from error


def check_described(info: ModelInfo, state: dict[str, Tensor], where: str) -> nn.Module | None:
    """Refuses a description of another network than that of the tensors, before any of its weights is allocated.

    Returns:
        The network on the meta device, where there are shapes without values. None where timm cannot build it there:
        older releases read a value while they build, and then only the sizes that are described have been checked.

    Raises:
        UserError: they differ, or the quantizers have steps that cannot be; `where` begins the message where it is
            about the description or the steps.
    """
    check_sizes(info, state, where)
    check_steps(state, where)
    try:
        with torch.device('meta'):
            network = _create_described(info, where)
    except UserError as error:
        if 'meta' in str(error.__cause__):
            return None
        raise
    check_fits(state, network.state_dict())
    return network


def build_described(info: ModelInfo, state: dict[str, Tensor], where: str) -> nn.Module:
    """The network that a description names, with the tensors of its file as weights.

    Raises:
        UserError: they are not of each other.
    """
    check_described(info, state, where)
    network = _create_described(info, where)
    load_quantized(network, state)
    return network


def _create_described(info: ModelInfo, where: str) -> nn.Module:
    return create_network(info.model, info.num_classes, info.input_size, what=f"{where}: its network",
                          **info.kwargs)
