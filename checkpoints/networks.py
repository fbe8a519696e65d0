"""Which network is in a file, and opening it: the one place that answers this for every command.

Its other names are those that callers need with it; they live below this module because the quantized network, which is
registered here, itself starts from checkpoints.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch.nn as nn
from torch import Tensor

import models  # noqa: F401  registers the full-precision networks
import quant_swin_transformer  # noqa: F401  registers quantized ones
import quant_vision_transformer  # noqa: F401  registers the others
from _quan_base import LinearQ, is_calibrated, named_quantizers
from checkpoints.building import check_described, create_network
from checkpoints.descriptions import ModelInfo, check_registered
from checkpoints.files import local_file, read_checkpoint
from checkpoints.full_precision import count_prefix_tokens, positions_of_prefix
from checkpoints.packed import is_packed, read_packed
from checkpoints.states import load_quantized, state_of
from utils import UserError

__all__ = ['ModelInfo', 'OpenedNetwork', 'create_network', 'load_quantized', 'names_quantized', 'network_info',
           'open_checkpoint', 'open_features', 'open_network', 'read_network', 'say_doubts', 'state_of']


class OpenedNetwork(NamedTuple):
    """A file's network: its description, the network in evaluation mode with its weights, and all that the file holds.

    Its quantizers have scales only if those in the file had: ask `is_calibrated`.
    """
    info: ModelInfo
    model: nn.Module
    checkpoint: dict[str, Any]


def open_network(path: str | Path, model: str | None = None, *, model_kwargs: dict[str, Any] | None = None,
                 input_size: int | None = None, what: str = '--model') -> OpenedNetwork:
    """The network in a checkpoint or a packed file.

    Args:
        path: of the file, or its https:// address.
        model, model_kwargs, input_size, what: as for `network_info`.

    Raises:
        UserError: the file cannot be read, or what it holds is not known or contradicts the arguments.
    """
    return open_checkpoint(path, read_network(path), model, model_kwargs=model_kwargs, input_size=input_size, what=what)


def open_checkpoint(path: str | Path, checkpoint: dict[str, Any], model: str | None = None, *,
                    model_kwargs: dict[str, Any] | None = None, input_size: int | None = None,
                    what: str = '--model') -> OpenedNetwork:
    """`open_network` of a file that `read_network` has read already."""
    info = network_info(path, checkpoint, model, model_kwargs, input_size, what=what)
    network = create_network(info.model, info.num_classes, info.input_size, what=what, **info.kwargs)
    load_quantized(network, checkpoint)
    if 'qvit' not in checkpoint:
        say_doubts(str(path), info.model, network)
    return OpenedNetwork(info, network.eval(), checkpoint)


def open_features(path: str | Path, model: str | None = None, *, out_indices: int | Sequence[int] = 4,
                  model_kwargs: dict[str, Any] | None = None, input_size: int | None = None) -> OpenedNetwork:
    """`open_network`, as timm's `features_only=True` gives it: images (B, C, H, W) -> a list of maps (B, dim, rows,
    columns), with their channels and strides in its `feature_info`.

    Args:
        out_indices: the blocks whose outputs are given, or how many of the last.

    Raises:
        UserError: as `open_network`; or there is no such block.
    """
    info, network, checkpoint = open_network(path, model, model_kwargs=model_kwargs, input_size=input_size)
    features = create_network(info.model, info.num_classes, info.input_size, features_only=True,
                              out_indices=out_indices, **info.kwargs)
    wanted = features.model.state_dict()
    features.model.load_state_dict({name: value for name, value in network.state_dict().items() if name in wanted})
    return OpenedNetwork(info, features.eval(), checkpoint)


def read_network(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint, or those of a packed file in the form of a checkpoint that describes itself."""
    file = local_file(path)
    return read_packed(file).checkpoint() if is_packed(file) else read_checkpoint(path)


def say_doubts(path: str, name: str, network: nn.Module) -> None:
    """Warns where the weights of a file that does not describe itself were trained for other bits than `name` has.

    Nothing else would show it: the tensors have the same shapes. With the step of four bits about a third of the
    weights lie beyond the codes of two; with that of two, none reaches the outer half of those of four.
    """
    layers = [layer for module, layer in named_quantizers(network) if isinstance(layer, LinearQ) and 'blocks' in module]
    if not layers or not is_calibrated(network):
        return
    beyond, outer, weights = 0, 0, sum(layer.weight.numel() for layer in layers)
    for layer in layers:
        low, high = layer.code_range
        position = layer.weight.detach() / layer.scale[:, None]
        beyond += int(((position < low - 0.5) | (position > high + 0.5)).sum())
        outer += int((position.abs() > (high + 1) / 2).sum())
    bits = layers[0].weight_bits
    if beyond > 0.2 * weights:
        print(f'warning: {beyond / weights:.0%} of the weights of {path} lie beyond the {bits}-bit codes of {name}: '
              'was it trained with more bits?')
    elif bits >= 4 and outer < 1e-3 * weights:
        print(f'warning: the weights of {path} use less than half of the {bits}-bit codes of {name}: was it trained '
              'with fewer bits?')


def names_quantized(name: str) -> bool:
    """Whether a name of timm's registry is one of the quantized variants."""
    return timm.models.is_model_in_modules(name, {'quant_vision_transformer'})


# --- which network it is ----------------------------------------------------------------------------------------------


def network_info(path: str | Path, checkpoint: dict[str, Any], model: str | None = None,
                 model_kwargs: dict[str, Any] | None = None, input_size: int | None = None, *,
                 what: str = '--model') -> ModelInfo:
    """Which network a checkpoint holds: the one that it describes, else `model`, with the sizes of its tensors.

    Args:
        path: of its file, for messages.
        checkpoint: as `read_network` gives it.
        model, model_kwargs, input_size: what the user says of it. They may repeat a description, not contradict it;
            without one, the image size follows from the tensors unless it is given.
        what: the flag that names the network, for messages.

    Raises:
        UserError: nobody says which network it is, the two contradict each other, or the description is not one of
            these tensors.
    """
    state = state_of(checkpoint)
    if 'qvit' in checkpoint:
        info = ModelInfo.from_dict(checkpoint['qvit'], str(path))
        _check_agrees(path, info, model, model_kwargs or {}, input_size, what)
        check_described(info, state, str(path))
        return info
    if model is None:
        raise UserError(f'{path} does not say which network it holds: name it with {what}')
    check_registered(model, what)
    return ModelInfo(model, dict(model_kwargs or {}), _classes(model, state), input_size or _input_size(state))


def _check_agrees(path: str | Path, info: ModelInfo, model: str | None, model_kwargs: dict[str, Any],
                  input_size: int | None, what: str) -> None:
    if model not in (None, info.model):
        raise UserError(f'model is {info.model} in {path}: leave {what} out')
    given = {'input_size': input_size} | model_kwargs
    for name, known in {'input_size': info.input_size, **info.kwargs}.items():
        if given.pop(name, None) not in (None, known):
            raise UserError(f'{name} is {known} in {path}: leave the flag out')
    if set(given) - {'input_size'}:
        raise UserError(f'{", ".join(given)} of --model-kwargs is not in {path}: leave it out')


def _classes(model: str, state: dict[str, Tensor]) -> int:
    """The number of classes that the last layer of this network has in the tensors."""
    described = timm.get_pretrained_cfg(model)
    classifier = described.classifier if described is not None and described.classifier else 'head'
    classifier = classifier if isinstance(classifier, str) else classifier[0]  # of several heads
    weight = state.get(f'{classifier}.weight')
    if weight is None or weight.ndim == 0:
        raise UserError('the checkpoint holds no vision transformer: head, position or patch embedding is missing'
                        if classifier == 'head' else f'the checkpoint has no {classifier}.weight, as {model} has it')
    return len(weight)


def _input_size(state: dict[str, Tensor]) -> int:
    """The image size that the position embeddings of a vision transformer are for; 224 of other networks."""
    positions, filters = state.get('pos_embed'), state.get('patch_embed.proj.weight')
    if positions is None or filters is None or positions.ndim != 3 or filters.ndim != 4:
        return 224
    prefix = count_prefix_tokens(state)
    patches = positions.shape[1] - positions_of_prefix(positions.shape[1], prefix)
    return max(1, round(max(0, patches) ** 0.5)) * filters.shape[-1]
