"""What the flags of main.py need besides argparse: types with a range, help with every default, files of --config."""

import argparse
import os
from collections.abc import Callable
from typing import Any, TypeVar

import yaml

from console.mistakes import UserError, closest, shown
from console.parser import LARGEST_IMAGE, MOST_CLASSES, path_text
from files.paths import read_text

__all__ = ['HelpFormatter', 'add_data_arguments', 'bits', 'class_count', 'config_flags', 'crop_ratio', 'exponent',
           'few', 'frequency', 'image_size', 'non_negative', 'non_negative_int', 'positive', 'positive_int', 'seed',
           'share', 'share_above_0', 'workers']

T = TypeVar('T', int, float)
SMALLEST, LARGEST = 1e-30, 1e30  # of real numbers: single precision holds their squares no longer


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
            raise argparse.ArgumentTypeError(f'{shown(value)}: choose {range_in_words}')
        return value

    read.__name__ = kind.__name__  # argparse says 'invalid int value' by it
    return read


def within(low: int, high: int) -> Callable[[str], int]:
    """A type for whole numbers that says which of its ends was passed."""
    def read(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'{shown(value)}: choose a value of at ' + (
                f'least {low}' if value < low else f'most {high}'))
        return value

    read.__name__ = 'int'
    return read


# The upper ends are far beyond what helps. They keep a slip of the keyboard from taking all memory or time there is.
positive_int = within(1, 2 ** 31 - 1)
non_negative_int = within(0, 2 ** 31 - 1)
few = within(1, 1000)
seed = within(0, 2 ** 62)
workers = within(0, 1024)
bits = within(2, 8)
class_count = within(1, MOST_CLASSES)
image_size = number(int, f'a value above 0 and up to {LARGEST_IMAGE}', lambda value: 0 < value <= LARGEST_IMAGE)
non_negative = number(float, 'a value of at least 0', lambda value: 0 <= value <= LARGEST)
positive = number(float, 'a value above 0', lambda value: SMALLEST <= value <= LARGEST)
exponent = number(float, 'a value from 0 to 100', lambda value: 0 <= value <= 100)
crop_ratio = number(float, 'a value above 0, from 0.05 to 1', lambda value: 0.05 <= value <= 1)
share_above_0 = number(float, 'a value above 0 and up to 1', lambda value: SMALLEST <= value <= 1)
share = number(float, 'a value from 0 to 1', lambda value: 0 <= value <= 1)
frequency = number(float, 'one value between 0 and 1, or two', lambda value: 0 < value < 1)


def add_data_arguments(add: Callable[..., argparse.Action], data_set: str) -> None:
    """Adds the flags that say where images come from and how they are read, the same for all commands.

    The names in their help are spelled out: what knows them takes seconds to import, which --help shall not.

    Args:
        data_set: what is taken without --data-set, for its help.
    """
    add('--data-path', metavar='DIR', type=path_text, help='folder of the data set')
    add('--data-set', metavar='NAME', help='IMNET, CIFAR (CIFAR-100), CIFAR10, INAT, INAT19 or DIGITS, or, by timm\'s '
        f'readers, hfds/..., hfids/..., tfds/..., wds/..., torch/...; {data_set}')
    add('--inat-category', default='name', metavar='NAME', help='kingdom, phylum, class, order, '
        'supercategory, family, genus or name (default: %(default)s)')
    add('--class-map', metavar='FILE', type=path_text, help='names of the classes, one a line, in the order of '
        'their labels; others are left out of folders')
    add('--train-split', default='train', metavar='NAME', help="a reader's name of the training part")
    add('--val-split', default='validation', metavar='NAME', help="a reader's name of the evaluation part")
    add('--input-key', metavar='NAME', help="a reader's name of the image")
    add('--target-key', metavar='NAME', help="a reader's name of the label")
    add('--mean', type=share, nargs='+', metavar='M', help="mean of the pixels, from 0 to 1, one value or one for "
        "each colour; ImageNet's unless given")
    add('--std', type=positive, nargs='+', metavar='S', help='their standard deviation')
    add('--exif-orientation', action='store_true', help="turn the data set's images as their cameras were held; "
        'single pictures always are')


# --- files of --config ------------------------------------------------------------------------------------------------


def config_flags(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """The command line that says the same as the file, so that types and ranges are checked alike.

    Raises:
        UserError: the file cannot be read, or names something that is no flag.
    """
    actions = {action.dest: action for action in parser._actions if action.dest not in ('help', 'config')}
    flags = []
    for key, value in _read(path).items():
        dest = key.replace('-', '_') if isinstance(key, str) else shown(key)
        if dest not in actions:
            raise UserError(f'--config {path}: {shown(key)} is no flag, {closest(dest, actions)}')
        if not _is_value(value):
            raise UserError(f'--config {path}: {dest} is {shown(value)}, which is no value of a flag')
        flags += _as_typed(actions[dest], value)
    return flags


class _Loader(yaml.SafeLoader):
    """Refuses keys that come twice, of which YAML would take the last, and keys without a value, which it takes for
    null: a slip where somebody meant to write one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value.replace('-', '_') in seen:
                raise yaml.constructor.ConstructorError(None, None, f'{shown(key.value)} comes twice', key.start_mark)
            if isinstance(value, yaml.ScalarNode) and value.value == '' and value.style is None:
                raise yaml.constructor.ConstructorError(
                    None, None, f'{shown(key.value)} has no value: write one, or null', key.start_mark)
            seen.add(str(key.value).replace('-', '_'))
        return super().construct_mapping(node, deep)


def _read(path: str) -> dict[Any, Any]:
    if not os.path.lexists(path):
        raise UserError(f'--config {path}: No such file or directory')
    text = read_text(path, f'--config {path}')
    try:
        config = yaml.load(text, _Loader)
    # Of constructors: a number of thousands of digits, an impossible date, a key that is a list.
    except (yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f'--config {path} is not YAML: {" ".join(str(error).split())[:200]}') from error
    if not isinstance(config, dict):
        raise UserError(f'--config {path} is not a mapping of flags to values')
    return config


def _is_value(value: Any) -> bool:
    """Whether a flag can have it: a plain value, or a flat list or mapping of them."""
    items = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return all(item is None or isinstance(item, bool | float | str) or isinstance(item, int) and abs(item) < 10 ** 300
               for item in items)


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
