"""What a training run's file holds besides the network, checked before any of it is used.

Entries are checked for what they have to be, not for what this code last wrote: an entry may be missing, as in released
files, and then training says so and starts it anew.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from console.mistakes import shown
from utils import UserError

__all__ = ['MOST_EPOCHS', 'check_entries', 'check_moments']

_Check = Callable[[Any], bool]
MOST_EPOCHS = 10 ** 6
# States of optimizers that have a value for each one of their parameter.
_MOMENTS = {'exp_avg', 'exp_avg_sq', 'exp_avg_diff', 'exp_avg_var', 'exp_inf', 'max_exp_avg_sq', 'momentum_buffer',
            'square_avg', 'grad_avg', 'acc_delta', 'sum', 'slow_buffer'}


def check_entries(checkpoint: Mapping[str, Any], where: str) -> None:
    """Refuses entries of training that are not what they have to be.

    Args:
        where: begins the messages: the file's path.

    Raises:
        UserError: the first of them.
    """
    for name, (is_right, wanted) in _ENTRIES.items():
        if name in checkpoint and not is_right(checkpoint[name]):
            raise UserError(f'{where}: its entry {name} is {shown(checkpoint[name])}, which is to be {wanted}: the '
                            'file is damaged, take an earlier one')


def check_moments(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], where: str) -> None:
    """Refuses the state of an optimizer, of the form that `check_entries` asks for, that is not one of its parameters.

    Raises:
        UserError: a moment has another shape, is not finite, or is missing where others have it.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    numbers = [number for group in saved['param_groups'] for number in group['params']]
    if [len(group['params']) for group in saved['param_groups']] != [
            len(group['params']) for group in optimizer.param_groups]:
        return  # of another network or of other groups, as the optimizer itself will say
    known: dict[bool, set] = {}  # of parameters with several axes, and of others
    for number, parameter in zip(numbers, parameters, strict=True):
        state = saved['state'].get(number)
        if state is None:
            continue
        names = known.setdefault(parameter.ndim > 1, set(state))
        wrong = sorted(map(str, names ^ set(state)))
        wrong += [name for name, value in state.items() if not _is_state(name, value, parameter)]
        if wrong:
            raise UserError(f'{where}: its optimizer has {wrong[0]} missing, of another shape or not finite for '
                            f'parameter {number}: the file is damaged, take an earlier one')


def _is_state(name: str, value: Any, parameter: Tensor) -> bool:
    if name == 'step':
        return _is_step(value)
    if not isinstance(value, Tensor):
        return name not in _MOMENTS or value is None  # SGD without momentum
    is_finite = _is_stored(value) and (not value.is_floating_point() or bool(value.isfinite().all()))
    return is_finite and (name not in _MOMENTS or value.shape == parameter.shape)


# --- kinds of values --------------------------------------------------------------------------------------------------


def _whole(low: int, high: int) -> _Check:
    return lambda value: type(value) is int and low <= value <= high


def _or_none(check: _Check) -> _Check:
    return lambda value: value is None or check(value)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 10 ** 300 and math.isfinite(value)


def _is_stored(value: Tensor) -> bool:
    """Whether each of its numbers has a place of its own in the file."""
    return (value.layout is torch.strided and not value.is_meta
            and value.numel() * value.element_size() <= value.untyped_storage().nbytes())


def _is_step(value: Any) -> bool:
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 and _is_stored(value) else value
    return _is_finite(number) and number >= 0


def _is_plain(value: Any) -> bool:
    """Whether JSON could hold it, as flags are."""
    if isinstance(value, dict):
        return all(type(name) is str and _is_plain(item) for name, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, float, str) or _whole(-2 ** 63, 2 ** 64)(value)


def _is_args(value: Any) -> bool:
    return _is_plain(getattr(value, '__dict__', value))  # of a Namespace, or a dict


def _is_optimizer(value: Any) -> bool:
    if not (isinstance(value, dict) and isinstance(value.get('state'), dict)
            and isinstance(value.get('param_groups'), list)):
        return False
    return (all(isinstance(state, dict) and all(type(name) is str for name in state)
                for state in value['state'].values())
            and all(isinstance(group, dict) and isinstance(group.get('params'), list)
                    and all(map(_whole(0, 2 ** 31), group['params'])) and _is_step(group.get('step', 0))
                    for group in value['param_groups']))


def _is_generator(value: Any) -> bool:
    """Whether it is the state of a process' random generators, as `utils.rng_states` gives it."""
    if not isinstance(value, dict) or not all(name in value for name in ('python', 'numpy', 'torch')):
        return False
    python, numpy = value['python'], value['numpy']
    word = _whole(0, 2 ** 32 - 1)
    return (isinstance(python, tuple) and len(python) == 3 and python[0] == 3 and type(python[0]) is int
            and isinstance(python[1], tuple) and len(python[1]) == 625 and all(map(word, python[1]))
            and python[1][624] <= 624 and (python[2] is None or _is_finite(python[2]))
            and isinstance(numpy, tuple) and len(numpy) == 5 and type(numpy[0]) is str and numpy[0] == 'MT19937'
            and isinstance(numpy[1], list) and len(numpy[1]) == 624 and all(map(word, numpy[1]))
            and _whole(0, 624)(numpy[2]) and _whole(0, 1)(numpy[3]) and _is_finite(numpy[4])
            and all(isinstance(value[name], Tensor) and value[name].dtype == torch.uint8 and value[name].ndim == 1
                    and _is_stored(value[name]) for name in ('torch', 'cuda') if name in value)
            and value['torch'].shape == torch.get_rng_state().shape)


def _is_scaler(value: Any) -> bool:
    """{} of a run without fp16, else the numbers of torch.amp.GradScaler."""
    return isinstance(value, dict) and all(
        type(name) is str and _is_finite(number) and (number >= 0 if name == '_growth_tracker' else number > 0)
        for name, number in value.items())


def _is_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(item, Tensor) for item in value.values())


def _is_method(value: Any) -> bool:
    """Whether it is the state of a method of training: tensors by name, of each layer."""
    return isinstance(value, dict) and all(isinstance(state, dict) and all(
        isinstance(item, Tensor) and _is_stored(item) for item in state.values()) for state in value.values())


_ENTRIES: dict[str, tuple[_Check, str]] = {
    'epoch': (_whole(-1, MOST_EPOCHS), f'a whole number from -1 to {MOST_EPOCHS}'),
    'step': (_whole(0, 2 ** 40), 'a number of batches'),
    'max_accuracy': (lambda value: _is_finite(value) and value <= 100, 'a number of percent'),
    'args': (_is_args, 'the flags as plain values'),
    'optimizer': (_or_none(_is_optimizer), 'the state of an optimizer'),
    'scaler': (_or_none(_is_scaler), 'positive numbers by name'),
    'rng': (lambda value: isinstance(value, list) and all(map(_is_generator, value)), 'states of random generators'),
    'model_ema': (_or_none(_is_tensors), 'tensors by name'),
    'oscillations': (_is_method, 'tensors by name, of each layer'),
}
