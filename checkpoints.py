"""Checkpoint files: reading them safely, writing them whole, and taking them into a network.

A file has the form that DeiT and Q-ViT release: a dict with `model`, `optimizer`, `lr_scheduler`, `epoch`, `scaler`
and `args` (an argparse.Namespace). Files of this project add `qvit`, which says what network they hold. Nothing but
tensors, plain values and that Namespace is ever unpickled.
"""
from __future__ import annotations

import argparse
import logging
import os
import pickle
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import safetensors.torch
import timm
import torch
import torch.nn as nn
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from _quan_base import ActQ, named_quantizers
from utils import UserError

__all__ = ['adapt_full_precision', 'create_from_checkpoint', 'description', 'load_full_precision', 'load_quantized',
           'read_checkpoint', 'write_checkpoint']

FORMAT_VERSION = 1
QUANTIZER_ENTRIES = ('alpha', 'zero_point', 'init_state', 'signed')
_logger = logging.getLogger(__name__)


def read_checkpoint(path: str | Path) -> dict:
    """The contents of a checkpoint file (or URL, or .safetensors file), on the CPU.

    Raises:
        UserError: the file is missing, truncated, of another kind, or would run code.
    """
    if str(path).startswith('https://'):
        return _load(lambda: torch.hub.load_state_dict_from_url(str(path), map_location='cpu', weights_only=True), path)
    if not Path(path).is_file():
        raise UserError(f'{path}: no such checkpoint file')
    if Path(path).suffix == '.safetensors':
        return _load(lambda: safetensors.torch.load_file(path), path)
    return _load(lambda: torch.load(path, map_location='cpu', weights_only=True), path)


def _load(load, path: str | Path) -> dict:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Detected pickle protocol')  # what cannot be read is said below
            checkpoint = load()
    except pickle.UnpicklingError as error:
        refused = re.search(r'GLOBAL ([\w.]+)', str(error))
        raise UserError(f'{path}: refused, loading it would import {refused[1]}; only tensors and plain values are read'
                        if refused else f'{path}: not a PyTorch checkpoint, or damaged') from error
    except Exception as error:  # a damaged file can raise nearly any, from struct.error to SafetensorError
        raise UserError(f'{path}: truncated or damaged, or not a PyTorch checkpoint') from error
    if not isinstance(checkpoint, dict):
        raise UserError(f'{path}: holds a {type(checkpoint).__name__}, not a checkpoint')
    return checkpoint


def write_checkpoint(state: dict, path: str | Path) -> None:
    """Writes `state` beside `path` and renames it, so that `path` is always a whole file."""
    path = Path(path)
    beside = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        torch.save(state, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


# --- what a file holds ------------------------------------------------------------------------------------------------


def description(model_name: str, model_kwargs: dict, num_classes: int, input_size: int,
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


# --- a full-precision checkpoint for a quantized network --------------------------------------------------------------


def load_full_precision(model: nn.Module, checkpoint: dict) -> list[str]:
    """Starts a network from a DeiT checkpoint: distilled or not, of another class count or resolution.

    The steps are left uncalibrated. A quantized checkpoint is taken too, for a start with fewer bits (4 -> 3 -> 2): if
    it describes its network, with its quantized weights, for these are what it computes with; latent weights carry
    rounding errors that they never make. Biases and IRM come with them, steps do not. No cost in the network.

    Returns:
        What had to be adapted, a line each.

    Raises:
        UserError: tensors are missing, unexpected, or of another width; the message lists them.
    """
    given, notes = _of_more_bits(checkpoint) if 'qvit' in checkpoint else (_state_dict(checkpoint), [])
    state, adapted = _adapt(given, model)
    model.load_state_dict(state)
    return notes + adapted


def _of_more_bits(checkpoint: dict) -> tuple[dict[str, Tensor], list[str]]:
    """The state of the network that the checkpoint describes, its weights quantized and nothing else; what to say."""
    given = _state_dict(checkpoint)
    if not any(map(_is_quantizer_entry, given)):
        return given, []
    source = create_from_checkpoint(checkpoint)
    state = source.state_dict()
    for name, layer in named_quantizers(source):
        if not isinstance(layer, ActQ) and layer.calibrated:
            state[f'{name}.weight'] = layer.quantized_weight()
    bits = source.quant.weight_bits
    return ({name: value for name, value in state.items() if not _is_quantizer_entry(name)},
            [f'the checkpoint is quantized to {bits} bits: its quantized weights, biases and IRM are taken, steps are '
             'to be calibrated anew'])


def adapt_full_precision(state: dict, model: nn.Module) -> dict[str, Tensor]:
    """`load_full_precision` as a filter for timm's `pretrained=True`: the whole state_dict of the model."""
    state, notes = _adapt(_state_dict(state), model)
    for note in notes:
        _logger.info(note)
    return state


def _adapt(given: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    own, notes = model.state_dict(), []
    if any(map(_is_quantizer_entry, given)):
        notes.append('the checkpoint is quantized: its latent weights are taken, its steps are not')
    if any('.norm_q.' in name for name in given) and hasattr(model, 'quant') and not model.quant.irm:
        raise UserError('the checkpoint was made with irm=True: pass --model-kwargs irm=True')
    state = {name: value for name, value in given.items() if not _is_quantizer_entry(name)}
    prefix_tokens = 2 if 'dist_token' in state else 1
    if 'dist_token' in own and 'dist_token' not in state:
        notes.append('the checkpoint is not distilled: distillation token and head start as copies of the class ones')
        state |= {'dist_token': state.get('cls_token'), 'head_dist.weight': state.get('head.weight'),
                  'head_dist.bias': state.get('head.bias')}
        state = {name: value for name, value in state.items() if value is not None}
    elif 'dist_token' in state and 'dist_token' not in own:
        notes.append('the model is not distilled: distillation token and head of the checkpoint are left out')
        for name in ('dist_token', 'head_dist.weight', 'head_dist.bias'):
            state.pop(name, None)
    if 'pos_embed' in state and 'pos_embed' in own:
        state['pos_embed'] = _adapt_pos_embed(state['pos_embed'], prefix_tokens, model, notes)
    for name in ('head.weight', 'head.bias', 'head_dist.weight', 'head_dist.bias'):
        if name not in own:
            state.pop(name, None)
        elif name in state and state[name].shape[0] != own[name].shape[0]:
            if name == 'head.weight':
                notes.append(f'the checkpoint has {state[name].shape[0]} classes, the model {own[name].shape[0]}: '
                             f'the heads start anew')
            state[name] = own[name]
    for name, value in own.items():  # what only a quantized network has: steps to be calibrated, IRM as the identity
        if _is_quantizer_entry(name):
            state[name] = torch.zeros_like(value) if name.endswith('init_state') else value
        elif '.norm_q.' in name or '.norm_k.' in name:
            state.setdefault(name, value)
    _check_shapes(state, own)
    _refuse([name for name in own if name not in state], [name for name in state if name not in own])
    return state, notes


def _adapt_pos_embed(pos_embed: Tensor, prefix_tokens: int, model: nn.Module, notes: list[str]) -> Tensor:
    """(1, prefix + patches, D) for the model's prefix tokens and grid of patches."""
    prefix, patches = pos_embed[:, :prefix_tokens], pos_embed[:, prefix_tokens:]
    side, grid = round(patches.shape[1] ** 0.5), tuple(model.patch_embed.grid_size)
    if grid != (side, side) and side * side == patches.shape[1]:
        notes.append(f'position embeddings resized from {side} x {side} to {grid[0]} x {grid[1]} patches')
        patches = resample_abs_pos_embed(patches.float(), grid, (side, side), num_prefix_tokens=0)
    prefix = prefix[:, [min(i, prefix_tokens - 1) for i in range(model.num_prefix_tokens)]]
    return torch.cat([prefix, patches], dim=1)
