"""Which network a checkpoint holds, and taking it into that network."""
from __future__ import annotations

import re
from collections.abc import Iterable

import timm
import torch
import torch.nn as nn
from torch import Tensor

from utils import UserError

__all__ = ['create_from_checkpoint', 'load_quantized', 'model_info']

FORMAT_VERSION = 1
QUANTIZER_ENTRIES = ('alpha', 'zero_point', 'init_state', 'signed')


def model_info(model_name: str, model_kwargs: dict, num_classes: int, input_size: int,
                classes: list[str] | None = None, data_set: str | None = None) -> dict:
    """The `qvit` entry: what `create_from_checkpoint` needs, and where the classes come from."""
    return {'format_version': FORMAT_VERSION, 'model': model_name, 'kwargs': dict(model_kwargs),
            'num_classes': num_classes, 'input_size': input_size, 'classes': classes, 'data_set': data_set}


def create_from_checkpoint(checkpoint: dict) -> nn.Module:
    """The network that the checkpoint's `qvit` entry describes, with its weights. Import its module first."""
    about = checkpoint.get('qvit')
    if about is None:
        raise UserError('the checkpoint does not say which network it holds: name it with --model')
    if about['format_version'] > FORMAT_VERSION:
        raise UserError(f'the checkpoint has format version {about["format_version"]}, this code reads up to '
                        f'{FORMAT_VERSION}: update it')
    model = timm.create_model(about['model'], num_classes=about['num_classes'], img_size=about['input_size'],
                              **about['kwargs'])
    load_quantized(model, checkpoint)
    return model


def _state_dict(checkpoint: dict) -> dict[str, Tensor]:
    """The model's entry of a checkpoint, or the checkpoint itself where it is a bare state_dict."""
    entries = [checkpoint[key] for key in ('model', 'state_dict') if isinstance(checkpoint.get(key), dict)]
    state = entries[0] if entries else checkpoint
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"the checkpoint has no model: its entries are {_some(checkpoint) or 'none'}")
    return {name.removeprefix('module.'): value for name, value in state.items()}


def _is_quantizer_entry(name: str) -> bool:
    return name.rpartition('.')[2] in QUANTIZER_ENTRIES


def _some(names: Iterable[str], most: int = 6) -> str:
    names = list(map(str, names))
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


# --- a checkpoint of the same network ---------------------------------------------------------------------------------


def load_quantized(model: nn.Module, checkpoint: dict) -> None:
    """Loads a checkpoint of this very network, quantizers included.

    Raises:
        UserError: it is a full-precision one, or of another size, class count or configuration.
    """
    given, wanted = _state_dict(checkpoint), model.state_dict()
    is_quantized, wants_quantized = (any(map(_is_quantizer_entry, names)) for names in (given, wanted))
    if wants_quantized and not is_quantized:
        raise UserError('this is a full-precision checkpoint, not a quantized one: start from it with --finetune')
    if is_quantized and not wants_quantized:
        raise UserError('this is a quantized checkpoint, but the model is a full-precision one')
    _check_shapes(given, wanted)
    missing, unexpected = [name for name in wanted if name not in given], [name for name in given if name not in wanted]
    for option, part in (('irm', '.norm_q.'), ('quantize_attn', '.attn_act.')):
        value, ours = (any(part in name for name in names) for names in (given, wanted))
        if value != ours:
            raise UserError(f'the checkpoint was made with {option}={value}: pass --model-kwargs {option}={value}')
    _refuse(missing, unexpected)
    damaged = [name for name, value in given.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if damaged:
        raise UserError(f'the checkpoint has NaN or infinite values in {_some(damaged)}: take an earlier one')
    model.load_state_dict(given)


def _check_shapes(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Says of the first tensor whose shape differs what that means."""
    def shapes(name: str) -> tuple[list[int], list[int]]:
        return list(given[name].shape), list(wanted[name].shape)

    differing = [name for name in wanted if name in given and given[name].shape != wanted[name].shape]
    if not differing:
        return
    if 'cls_token' in differing:
        theirs, ours = (shape[-1] for shape in shapes('cls_token'))
        raise UserError(f'the checkpoint is {theirs} wide, the model {ours}: choose the --model of its size')
    if 'head.weight' in differing:
        theirs, ours = (shape[0] for shape in shapes('head.weight'))
        raise UserError(f'the checkpoint has {theirs} classes, the model {ours}: choose the data set of its classes')
    if 'pos_embed' in differing:
        theirs, ours = (shape[1] for shape in shapes('pos_embed'))
        raise UserError(f'the checkpoint has {theirs} tokens, the model {ours}: choose its --input-size')
    sizes = given[differing[0]].numel(), wanted[differing[0]].numel()
    if 1 in sizes and all(re.search(r'[._]act\.(alpha|zero_point)$', name) for name in differing):
        granularity = 'tensor' if sizes[0] == 1 else 'channel'
        raise UserError(f"the checkpoint's activations have one step per {granularity}: "
                        f'pass --model-kwargs act_granularity={granularity}')
    theirs, ours = shapes(differing[0])
    raise UserError(f'{differing[0]} has shape {theirs} in the checkpoint and {ours} in the model')


def _refuse(missing: list[str], unexpected: list[str]) -> None:
    if missing or unexpected:
        lists = [f'{what} {_some(names)}' for what, names in (('lacks', missing), ('has unknown', unexpected)) if names]
        raise UserError(f'the checkpoint does not fit the model: it {" and ".join(lists)}')
