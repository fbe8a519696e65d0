"""The tensors of a checkpoint: finding them in any container, and taking them into a network of the same kind."""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
import torch.nn as nn
from torch import Tensor

import _quan_base
from utils import UserError

__all__ = ['check_fits', 'check_finite', 'check_shapes', 'check_steps', 'is_quantizer_entry', 'load_quantized',
           'refuse', 'some', 'state_of']

# Where files keep the weights: DeiT and this project, most others, DINO, and averaged weights by themselves.
CONTAINERS = ('model', 'state_dict', 'teacher', 'student', 'model_ema', 'state_dict_ema')
PREFIXES = ('module.', '_orig_mod.', 'model.', 'backbone.')  # of DDP, torch.compile, Lightning, DINO
QUANTIZER_ENTRIES = ('alpha', 'zero_point', 'init_state', 'signed')


# --- the tensors of a file --------------------------------------------------------------------------------------------


def state_of(checkpoint: Mapping) -> dict[str, Tensor]:
    """The state_dict in a checkpoint, under the names of the bare network.

    It is the checkpoint's `model` entry, or what others use in its place, or the checkpoint itself. Prefixes that every
    name has, as wrappers put them there, are taken off.

    Raises:
        UserError: there are no weights in it, or their values are not in the file.
    """
    entries = [checkpoint[key] for key in CONTAINERS if isinstance(checkpoint.get(key), Mapping)]
    found = next(filter(None, map(_tensors, [*entries, checkpoint])), None)
    if found is None:
        raise UserError(f"the checkpoint has no model: its entries are {some(checkpoint) or 'none'}")
    _check_stored(found)
    while prefix := next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in found)), None):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return {name.replace('_orig_mod.', ''): value for name, value in found.items()}  # of parts compiled by themselves


def _tensors(entries: Mapping) -> dict[str, Tensor]:
    return {name: value for name, value in entries.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _check_stored(state: dict[str, Tensor]) -> None:
    """Refuses tensors without memory for their values. A few bytes can claim to be any number of them: the network that
    they describe would take all memory there is.
    """
    absent = [name for name, value in state.items() if value.layout is not torch.strided or value.is_meta]
    if not absent:
        storages = [value.untyped_storage() for value in state.values()]
        stored = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        claimed = {name: value.numel() * value.element_size() for name, value in state.items()}
        if sum(claimed.values()) > 4 * stored + 2 ** 20:  # networks tie some weights, and broadcast a few numbers
            absent = sorted(claimed, key=claimed.__getitem__)[-1:]
    if absent:
        raise UserError(f'the checkpoint does not hold the values of {some(absent)}: it is damaged')


def is_quantizer_entry(name: str) -> bool:
    """Whether a tensor of this name belongs to a quantizer, and not to the full-precision network."""
    return name.rpartition('.')[2] in QUANTIZER_ENTRIES


def some(names: Iterable[str], most: int = 6) -> str:
    """The first of the names, and how many more there are."""
    names = list(names)
    return ', '.join(map(_plain, names[:most])) + (f' and {len(names) - most} more' if len(names) > most else '')


def _plain(name: object) -> str:
    text = str(name) if isinstance(name, str | int | float) else type(name).__name__
    return text if len(text) <= 100 and text.isprintable() else f'{text[:100]!r}...'


# --- a checkpoint of the same network ---------------------------------------------------------------------------------


def load_quantized(model: nn.Module, checkpoint: Mapping) -> None:
    """Loads a checkpoint of this very network, quantizers included.

    Raises:
        UserError: it is a full-precision one, or of another size, class count or configuration.
    """
    given = state_of(checkpoint)
    check_fits(given, model.state_dict())
    check_finite(given)
    model.load_state_dict(given)


def check_finite(state: dict[str, Tensor]) -> None:
    """Refuses weights that no network computes with.

    Raises:
        UserError: some are not finite, or no real numbers.
    """
    damaged = [name for name, value in state.items() if value.is_complex()
               or value.is_floating_point() and not torch.isfinite(value.float()).all()]
    if damaged:
        raise UserError(f'the checkpoint has NaN or infinite values in {some(damaged)}: take an earlier one')


def check_steps(state: dict[str, Tensor], where: str) -> None:
    """Refuses the quantizers of a file of this project whose steps are not positive: training keeps them so.

    Released files are another matter: theirs may have become negative, and are used as the smallest step there is.

    Raises:
        UserError: `where` begins the message.
    """
    wrong = [name for name, value in state.items() if value.is_floating_point() and (
        name.endswith('.alpha') and bool((_quan_base.learned_scale(value) <= 0).any())
        or name.endswith(('.init_state', '.signed')) and not bool(((value == 0) | (value == 1)).all()))]
    if wrong:
        raise UserError(f'{where}: the quantizers of {some(wrong, 3)} have steps that are not positive, or a state '
                        'that there is not: it is damaged, take an earlier one')


def check_fits(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Compares the tensors of a file with those of a network, which may be on the meta device.

    Raises:
        UserError: they are not of the same network; the message says what sets them apart.
    """
    is_quantized, wants_quantized = (any(map(is_quantizer_entry, names)) for names in (given, wanted))
    if wants_quantized and not is_quantized:
        raise UserError('this is a full-precision checkpoint, not a quantized one: start from it with --finetune')
    if is_quantized and not wants_quantized:
        raise UserError('this is a quantized checkpoint, but the model is a full-precision one')
    check_shapes(given, wanted)
    for option, part in (('irm', '.norm_q.'), ('quantize_attn', '.attn_act.')):
        value, ours = (any(part in name for name in names) for names in (given, wanted))
        if value != ours:
            raise UserError(f'the checkpoint was made with {option}={value}: pass --model-kwargs {option}={value}')
    refuse([name for name in wanted if name not in given], [name for name in given if name not in wanted])


def check_shapes(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Says of the first tensor whose shape differs what that means."""
    def sizes(name: str, axis: int) -> tuple[int, int] | None:
        """Theirs and ours, where the two differ in nothing but their size along the axis."""
        a, b = given[name].shape, wanted[name].shape
        return (a[axis], b[axis]) if len(a) == len(b) else None

    differing = [name for name in wanted if name in given and given[name].shape != wanted[name].shape]
    for name, axis, said in (
            ('cls_token', -1, 'the checkpoint is {} wide, the model {}: choose the --model of its size'),
            ('head.weight', 0, 'the checkpoint has {} classes, the model {}: choose the data set of its classes'),
            ('head.fc.weight', 0, 'the checkpoint has {} classes, the model {}: choose the data set of its classes'),
            ('pos_embed', 1, 'the checkpoint has {} tokens, the model {}: choose its --input-size')):
        if name in differing and (both := sizes(name, axis)):
            raise UserError(said.format(*both))
    if not differing:
        return
    numbers = given[differing[0]].numel(), wanted[differing[0]].numel()
    if 1 in numbers and all(re.search(r'[._]act\.(alpha|zero_point)$', name) for name in differing):
        granularity = 'tensor' if numbers[0] == 1 else 'channel'
        raise UserError(f"the checkpoint's activations have one step per {granularity}: "
                        f'pass --model-kwargs act_granularity={granularity}')
    theirs, ours = (list(tensors[differing[0]].shape) for tensors in (given, wanted))
    raise UserError(f'{differing[0]} has shape {theirs} in the checkpoint and {ours} in the model')


def refuse(missing: list[str], unexpected: list[str]) -> None:
    """Raises a UserError that lists the names, if there are any."""
    if missing or unexpected:
        lists = [f'{what} {some(names)}' for what, names in (('lacks', missing), ('has unknown', unexpected)) if names]
        raise UserError(f'the checkpoint does not fit the model: it {" and ".join(lists)}')
