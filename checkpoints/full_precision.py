"""A quantized network's start from full precision: what the checkpoint of a vision transformer becomes in it."""
from __future__ import annotations

import logging
import math
import re

import torch
import torch.nn as nn
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn
from torch import Tensor

from _quan_base import ActQ, named_quantizers
from checkpoints.building import build_described
from checkpoints.descriptions import ModelInfo
from checkpoints.states import check_finite, check_shapes, is_quantizer_entry, refuse, state_of
from utils import UserError

__all__ = ['adapt_full_precision', 'count_prefix_tokens', 'load_full_precision', 'positions_of_prefix']

_logger = logging.getLogger(__name__)


def load_full_precision(model: nn.Module, checkpoint: dict) -> list[str]:
    """Starts a network from a checkpoint of DeiT, DeiT III, ViT, DINO or Swin: of another class count or resolution,
    with or without distillation, LayerScale, positions of the class token, or a head.

    Its quantizers are left uncalibrated. A quantized checkpoint is taken too, for a start with fewer bits (4 -> 3 ->
    2). Where it describes its network, the quantized weights are taken, because these are what that network computes
    with. Biases and IRM come with them, scales do not.

    Returns:
        What had to be adapted, a line each.

    Raises:
        UserError: tensors are missing, unexpected, or of another width; the message lists them. Or the network in the
            checkpoint computes what quantized ones do not (gated MLPs, normalized queries), or not with these options.
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
    state = _usual_names({name: value for name, value in given.items() if not is_quantizer_entry(name)}, notes)
    if isinstance(model, SwinTransformer):
        state = _adapt_swin(state, model, notes)
    _adapt_channels(state, own, notes)
    check_shapes({name: value for name, value in state.items() if name in own and value.ndim != own[name].ndim}, own)
    if hasattr(model, 'quant'):
        _check_kind(state, own)
    prefix_tokens = count_prefix_tokens(state)
    _adapt_distillation(state, own, notes)
    if hasattr(model, 'has_twin_tokens'):
        model.has_twin_tokens = 'dist_token' in own and 'dist_token' not in given
    if 'pos_embed' in state and 'pos_embed' in own:
        _adapt_positions(state, prefix_tokens, model, notes)
    _adapt_layer_scale(state, own, notes)
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


HEADS = ('head.weight', 'head.bias', 'head_dist.weight', 'head_dist.bias', 'head.fc.weight', 'head.fc.bias')
PREFIX_TOKENS = ('cls_token', 'dist_token', 'reg_token')


def _usual_names(state: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """The state under timm's names: DeiT III and DINO name some parts otherwise, and have some that only pretraining
    needs."""
    if any(name.startswith('backbone.blocks.') for name in state):
        notes.append("the checkpoint is of pretraining: its backbone is taken, its projection heads are left out")
        state = {name.removeprefix('backbone.'): value for name, value in state.items()
                 if name.startswith('backbone.')}
    names = {'register_tokens': 'reg_token'} | {
        name: re.sub(r'\.gamma_([12])$', r'.ls\1.gamma', name) for name in state if '.gamma_' in name}
    return {names.get(name, name): value for name, value in state.items() if name != 'mask_token'}


def _adapt_swin(state: dict[str, Tensor], model: SwinTransformer, notes: list[str]) -> dict[str, Tensor]:
    """The state under timm's names, also of the files of Swin's authors, position biases resized to the windows."""
    tables = {name: value.shape for name, value in state.items() if name.endswith('.relative_position_bias_table')}
    own = model.state_dict()
    if any(name not in own or len(shape) != 2 for name, shape in tables.items()):
        return state  # refused for what else it lacks or has
    if any(own[name].shape != shape for name, shape in tables.items()):
        notes.append('relative position biases resized to the windows of the model')
    return checkpoint_filter_fn(state, model)


def _check_kind(state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Refuses weights of networks that compute what quantized ones do not, or that need options of the model."""
    for pattern, what in ((r'\.attn\.[qk]_norm\.', 'normalizes queries and keys (qk_norm)'),
                          (r'\.mlp\.(w\d+|fc1_[gx])\.', 'has gated MLPs (SwiGLU)'),
                          (r'^attn_pool\.', 'pools by attention')):
        if found := next((name for name in state if re.search(pattern, name)), None):
            raise UserError(f'the checkpoint is of a network that {what}, see {found}: there is no quantized one')
    fc1, fc2 = (state.get(f'blocks.0.mlp.{layer}.weight') for layer in ('fc1', 'fc2'))
    if fc1 is not None and fc2 is not None and fc1.shape[:1] != fc2.shape[1:]:
        raise UserError(f'the checkpoint is of a network that has gated MLPs (SwiGLU), {fc1.shape[0]} channels before '
                        f'and {fc2.shape[-1]} after the gate: there is no quantized one')
    if 'dist_token' in own:
        found = [name for name in ('reg_token', 'norm_pre.weight') if name in state]
        if found:
            raise UserError(f'the checkpoint has {", ".join(found)}, the model has none: choose one with one head '
                            '(..._vit_...)')
        return
    registers = state['reg_token'].shape[1] if 'reg_token' in state and state['reg_token'].ndim == 3 else 0
    for name, option in (('reg_token', f'reg_tokens={registers}'), ('norm_pre.weight', 'pre_norm=True'),
                         ('fc_norm.weight', 'global_pool=avg')):
        if name in state and name not in own:
            raise UserError(f'the checkpoint was made with {option}: pass --model-kwargs {option}')
    if 'fc_norm.weight' in own and 'norm.weight' in state:
        raise UserError('the checkpoint normalizes all tokens, not their mean: pass --model-kwargs fc_norm=False')
    if 'cls_token' in own and 'cls_token' not in state and 'pos_embed' in state:
        raise UserError('the checkpoint has no class token: pass --model-kwargs class_token=False global_pool=avg')


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
    """Lets the heads start as the model has them where the checkpoint has none, or of other classes."""
    if ('head.weight' in own or 'head.fc.weight' in own) and not any(name.startswith('head') for name in state):
        notes.append('the checkpoint has no head: it starts anew')
        state.update({name: value for name, value in own.items() if name in HEADS})
    for name in HEADS:
        if name not in own:
            state.pop(name, None)
        elif name in state and state[name].shape[0] != own[name].shape[0]:
            if name in ('head.weight', 'head.fc.weight'):
                notes.append(f'the checkpoint has {state[name].shape[0]} classes, the model {own[name].shape[0]}: '
                             f'the heads start anew')
            state[name] = own[name]


def _adapt_layer_scale(state: dict[str, Tensor], own: dict[str, Tensor], notes: list[str]) -> None:
    """Multiplies LayerScale into the layer before it where the model has none: that is the same network."""
    folded = False
    for name in [name for name in state if re.search(r'\.ls[12]\.gamma$', name) and name not in own]:
        block, which = name.split('.ls')
        layer = f'{block}.attn.proj' if which[0] == '1' else f'{block}.mlp.fc2'
        if f'{layer}.weight' not in state or f'{layer}.bias' not in state:
            continue  # refused as a tensor that is not known
        gamma = state.pop(name).to(torch.promote_types(state[f'{layer}.weight'].dtype, torch.float32))
        state[f'{layer}.weight'], state[f'{layer}.bias'] = gamma[:, None] * state[f'{layer}.weight'], (
            gamma * state[f'{layer}.bias'])
        folded = True
    if folded:
        notes.append('the model has no LayerScale: that of the checkpoint is multiplied into the layers before it')
    for name in own:
        if re.search(r'\.ls[12]\.gamma$', name) and name not in state:
            state[name] = torch.ones_like(own[name])


def _adapt_positions(state: dict[str, Tensor], prefix_tokens: int, model: nn.Module, notes: list[str]) -> None:
    """Position embeddings for the model's grid of patches, and for its prefix tokens where these have positions.

    A checkpoint has them for all its prefix tokens, for the class token alone (DINOv2), or for none. A token that has
    none of its own gets zeros; where the model has none, they are added to the token itself: the same network.
    """
    positions, grid = state['pos_embed'], tuple(model.patch_embed.grid_size)
    found = positions_of_prefix(positions.shape[1], prefix_tokens, math.prod(grid))
    prefix, patches = positions[:, :found], positions[:, found:]
    side = math.isqrt(patches.shape[1])
    if grid != (side, side) and side * side == patches.shape[1]:
        notes.append(f'position embeddings resized from {side} x {side} to {grid[0]} x {grid[1]} patches')
        patches = resample_abs_pos_embed(patches.float(), grid, (side, side), num_prefix_tokens=0)
    if getattr(model, 'no_embed_class', False):
        for name in PREFIX_TOKENS:
            if name in state and prefix.shape[1]:
                own, prefix = prefix[:, :state[name].shape[1]], prefix[:, state[name].shape[1]:]
                state[name] = torch.cat([state[name][:, :own.shape[1]] + own, state[name][:, own.shape[1]:]], 1)
        state['pos_embed'] = patches
        return
    wanted = model.num_prefix_tokens
    if found and found == prefix_tokens:
        prefix = prefix[:, [min(i, found - 1) for i in range(wanted)]]
    else:
        prefix = torch.cat([prefix, prefix.new_zeros(1, wanted, prefix.shape[2])], 1)[:, :wanted]
    state['pos_embed'] = torch.cat([prefix, patches], dim=1)


def count_prefix_tokens(state: dict[str, Tensor]) -> int:
    """How many class, distillation and register tokens a state_dict has."""
    return sum(state[name].shape[1] for name in PREFIX_TOKENS if name in state and state[name].ndim == 3)


def positions_of_prefix(positions: int, prefix_tokens: int, patches: int | None = None) -> int:
    """How many of the positions are those of prefix tokens: of all, of the class token alone, or of none.

    Args:
        patches: of the model, where it is known; else, or where these do not fit, a square grid is taken.
    """
    possible = [count for count in (prefix_tokens, 1, 0) if count <= prefix_tokens]
    of_grid = [count for count in possible if positions - count == patches]
    of_square = [count for count in possible if positions > count and math.isqrt(positions - count) ** 2
                 == positions - count]
    return next(iter([*of_grid, *of_square, prefix_tokens]))
