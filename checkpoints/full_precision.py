"""A quantized network's start from full precision: what a DeiT checkpoint becomes in it."""
from __future__ import annotations

import logging

import torch
import torch.nn as nn
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor

from _quan_base import ActQ, named_quantizers
from checkpoints.building import build_described
from checkpoints.descriptions import ModelInfo
from checkpoints.states import check_finite, check_shapes, is_quantizer_entry, refuse, state_of
from utils import UserError

__all__ = ['adapt_full_precision', 'load_full_precision']

_logger = logging.getLogger(__name__)


def load_full_precision(model: nn.Module, checkpoint: dict) -> list[str]:
    """Starts a network from a DeiT checkpoint: distilled or not, of another class count or resolution.

    Its quantizers are left uncalibrated. A quantized checkpoint is taken too, for a start with fewer bits (4 -> 3 ->
    2). Where it describes its network, the quantized weights are taken, because these are what that network computes
    with. Biases and IRM come with them, scales do not.

    Returns:
        What had to be adapted, a line each.

    Raises:
        UserError: tensors are missing, unexpected, or of another width; the message lists them.
    """
    given, notes = _of_more_bits(checkpoint) if 'qvit' in checkpoint else (state_of(checkpoint), [])
    state, adapted = _adapt(given, model)
    model.load_state_dict(state)
    return notes + adapted


def _of_more_bits(checkpoint: dict) -> tuple[dict[str, Tensor], list[str]]:
    """The state of the network that the checkpoint describes, its weights quantized and nothing else; what to say."""
    given = state_of(checkpoint)
    if not any(map(is_quantizer_entry, given)):
        return given, []
    where = 'the checkpoint'
    source = build_described(ModelInfo.from_dict(checkpoint['qvit'], where), given, where)
    state = source.state_dict()
    for name, layer in named_quantizers(source):
        if not isinstance(layer, ActQ) and layer.calibrated:
            state[f'{name}.weight'] = layer.quantized_weight()
    bits = source.quant.weight_bits
    return ({name: value for name, value in state.items() if not is_quantizer_entry(name)},
            [f'the checkpoint is quantized to {bits} bits: its quantized weights, biases and IRM are taken, steps are '
             'to be calibrated anew'])


def adapt_full_precision(state: dict, model: nn.Module) -> dict[str, Tensor]:
    """`load_full_precision` as a filter for timm's `pretrained=True`: the whole state_dict of the model.

    That of a quantized network, which timm reads from the hub by the same way, is left as it is.
    """
    own = model.state_dict()
    if any(map(is_quantizer_entry, state)) and {name: value.shape for name, value in state.items()} == {
            name: value.shape for name, value in own.items()}:
        return state
    state, notes = _adapt(state_of(state), model)
    for note in notes:
        _logger.info(note)
    return state


def _adapt(given: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """The whole state_dict of the model, from the given tensors where it can; what had to be adapted."""
    own, notes = model.state_dict(), []
    if any(map(is_quantizer_entry, given)):
        notes.append('the checkpoint is quantized: its latent weights are taken, its steps are not')
    if any('.norm_q.' in name for name in given) and hasattr(model, 'quant') and not model.quant.irm:
        raise UserError('the checkpoint was made with irm=True: pass --model-kwargs irm=True')
    state = {name: value for name, value in given.items() if not is_quantizer_entry(name)}
    _adapt_channels(state, own, notes)
    check_shapes({name: value for name, value in state.items() if name in own and value.ndim != own[name].ndim}, own)
    prefix_tokens = 2 if 'dist_token' in state else 1
    _adapt_distillation(state, own, notes)
    if hasattr(model, 'has_twin_tokens'):
        model.has_twin_tokens = 'dist_token' in own and 'dist_token' not in given
    if 'pos_embed' in state and 'pos_embed' in own:
        state['pos_embed'] = _adapt_pos_embed(state['pos_embed'], prefix_tokens, model, notes)
    _adapt_heads(state, own, notes)
    for name, value in own.items():  # what only a quantized network has: scales to be found, IRM as the identity
        if is_quantizer_entry(name):
            state[name] = torch.zeros_like(value) if name.endswith('init_state') else value
        elif '.norm_q.' in name or '.norm_k.' in name:
            state.setdefault(name, value)
    check_shapes(state, own)
    check_finite({name: value for name, value in state.items() if not is_quantizer_entry(name)})
    refuse([name for name in own if name not in state], [name for name in state if name not in own])
    return state, notes


def _adapt_channels(state: dict[str, Tensor], own: dict[str, Tensor], notes: list[str]) -> None:
    """Makes filters of colours those of grey images: their sum, by timm, which gives the same for a grey picture."""
    name = 'patch_embed.proj.weight'
    filters, wanted = state.get(name), own.get(name)
    if (filters is not None and wanted is not None and filters.ndim == wanted.ndim == 4
            and (filters.shape[1], wanted.shape[1]) == (3, 1)):
        notes.append('the checkpoint is of colour images: its filters are summed up for grey ones')
        state[name] = adapt_input_conv(1, filters)


def _adapt_distillation(state: dict[str, Tensor], own: dict[str, Tensor], notes: list[str]) -> None:
    """Adds or removes the distillation token and its head, as the model has them or not."""
    if 'dist_token' in own and 'dist_token' not in state:
        notes.append('the checkpoint is not distilled: distillation token and head start as copies of the class ones')
        copies = {'dist_token': 'cls_token', 'head_dist.weight': 'head.weight', 'head_dist.bias': 'head.bias'}
        state.update({name: state[source] for name, source in copies.items() if source in state})
    elif 'dist_token' in state and 'dist_token' not in own:
        notes.append('the model is not distilled: distillation token and head of the checkpoint are left out')
        for name in ('dist_token', 'head_dist.weight', 'head_dist.bias'):
            state.pop(name, None)


def _adapt_heads(state: dict[str, Tensor], own: dict[str, Tensor], notes: list[str]) -> None:
    """Lets the heads start as the model has them where the checkpoint's are of other classes."""
    for name in ('head.weight', 'head.bias', 'head_dist.weight', 'head_dist.bias'):
        if name not in own:
            state.pop(name, None)
        elif name in state and state[name].shape[0] != own[name].shape[0]:
            if name == 'head.weight':
                notes.append(f'the checkpoint has {state[name].shape[0]} classes, the model {own[name].shape[0]}: '
                             f'the heads start anew')
            state[name] = own[name]


def _adapt_pos_embed(pos_embed: Tensor, prefix_tokens: int, model: nn.Module, notes: list[str]) -> Tensor:
    """(1, prefix + patches, D) for the model's prefix tokens and grid of patches."""
    prefix, patches = pos_embed[:, :prefix_tokens], pos_embed[:, prefix_tokens:]
    side, grid = round(patches.shape[1] ** 0.5), tuple(model.patch_embed.grid_size)
    if grid != (side, side) and side * side == patches.shape[1]:
        notes.append(f'position embeddings resized from {side} x {side} to {grid[0]} x {grid[1]} patches')
        patches = resample_abs_pos_embed(patches.float(), grid, (side, side), num_prefix_tokens=0)
    prefix = prefix[:, [min(i, prefix_tokens - 1) for i in range(model.num_prefix_tokens)]]
    return torch.cat([prefix, patches], dim=1)
