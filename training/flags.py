"""What the flags of main.py need besides argparse: types with a range, help with every default, files of --config."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from utils import UserError, closest

__all__ = ['HelpFormatter', 'config_flags', 'frequency', 'image_size', 'non_negative', 'non_negative_int', 'positive',
           'positive_int', 'share']

T = TypeVar('T', int, float)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default there is, also of flags whose name says it all."""

    def add_argument(self, action: argparse.Action) -> None:
        if action.help is None:  # argparse leaves blank ones out
            action.help = '' if action.default in (None, '') else '(default: %(default)s)'
        super().add_argument(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, '') else super()._get_help_string(action)


# --- types ------------------------------------------------------------------------------------------------------------


def number(kind: Callable[[str], T], range_in_words: str, is_in_range: Callable[[T], bool]) -> Callable[[str], T]:
    """A type for `add_argument`: `kind` within a range. `utils.Parser` names the flag in its complaint."""
    def read(text: str) -> T:
        value = kind(text)
        if not is_in_range(value):
            raise argparse.ArgumentTypeError(f'{value}: choose {range_in_words}')
        return value

    read.__name__ = kind.__name__  # argparse says 'invalid int value' by it
    return read


positive_int = number(int, 'a value of at least 1', lambda value: value >= 1)
non_negative_int = number(int, 'a value of at least 0', lambda value: value >= 0)
image_size = number(int, 'a value above 0', lambda value: value > 0)
non_negative = number(float, 'a value of at least 0', lambda value: value >= 0)
positive = number(float, 'a value above 0', lambda value: 0 < value < math.inf)
share = number(float, 'a value from 0 to 1', lambda value: 0 <= value <= 1)
frequency = number(float, 'one value between 0 and 1, or two', lambda value: 0 < value < 1)


# --- files of --config ------------------------------------------------------------------------------------------------


def config_flags(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """The command line that says the same as the file, so that types and ranges are checked alike.

    Raises:
        UserError: the file cannot be read, or names something that is no flag.
    """
    actions = {action.dest: action for action in parser._actions if action.dest not in ('help', 'config')}
    flags = []
    for key, value in _read(path).items():
        dest = str(key).replace('-', '_')
        if dest not in actions:
            raise UserError(f'--config {path}: {key!r} is no flag, {closest(dest, actions)}')
        flags += _as_typed(actions[dest], value)
    return flags


def _read(path: str) -> dict[Any, Any]:
    try:
        config = yaml.safe_load(Path(path).read_text(encoding='utf-8'))
    except OSError as error:
        raise UserError(f'--config {path}: {error.strerror}') from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f'--config {path} is not YAML: {" ".join(str(error).split())}') from error
    if not isinstance(config, dict):
        raise UserError(f'--config {path} is not a mapping of flags to values')
    return config


def _as_typed(action: argparse.Action, value: Any) -> list[str]:
    """One flag with its value, as a command line has it."""
    flag = action.option_strings[0]
    if isinstance(value, bool) and action.nargs == 0:
        if value:
            return [flag]
        # A flag without a --no- form is off unless it is given.
        return [f'--no-{flag[2:]}'] if len(action.option_strings) > 1 else []
    if isinstance(value, dict):
        return [flag, *(f'{name}={item}' for name, item in value.items())]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [] if value is None else [f'{flag}={value}']
