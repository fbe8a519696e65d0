"""Parsers of command lines, and types of flags that every command has."""

import ast
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Sequence
from os.path import expanduser
from pathlib import Path
from typing import Any, NoReturn

from console.mistakes import UserError, closed_pipe_ends_quietly

__all__ = ['LARGEST_IMAGE', 'MOST_CLASSES', 'Parser', 'answer_help', 'file_path', 'key_value', 'path_text']

MOST_CLASSES, LARGEST_IMAGE = 10 ** 6, 4096  # that flags and descriptions of networks may say


class Parser(ArgumentParser):
    """A parser whose complaints are the user's mistakes: one line. It takes every flag with `-` and with `_`."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        given = list(sys.argv[1:] if args is None else args)
        end = given.index('--') if '--' in given else len(given)
        return super().parse_known_args([*map(self.as_defined, given[:end]), *given[end:]], namespace)

    def as_defined(self, text: str) -> str:
        """An argument, with the flag in it, if any, spelled as it was added."""
        flag, equals, value = text.partition('=')
        if not flag.startswith('--') or flag in self._option_string_actions:
            return text
        known = {flag.replace('_', '-'): flag for flag in self._option_string_actions}
        return f'{known.get(flag.replace("_", "-"), flag)}{equals}{value}'

    def error(self, message: str) -> NoReturn:
        # argparse says 'argument --decay-rate/--dr: -1: choose ...' of a value that its type refuses.
        refused = re.fullmatch(r'argument (?:\S+/)?(--\S+): (\S+: choose .*)', message)
        if refused:
            raise UserError(f'{refused[1]} {refused[2]}')
        raise UserError(f'{message} (--help lists the flags)')


def key_value(text: str) -> tuple[str, Any]:
    """A type for `add_argument`: KEY=VALUE, where the value is a Python literal, a truth value in any case, or text."""
    key, equals, value = text.partition('=')
    if not (key.isidentifier() and equals):
        raise ArgumentTypeError(f'{text!r} is not of the form key=value')
    if value.lower() in ('true', 'false', 'none'):
        value = value.capitalize()
    try:
        return key, ast.literal_eval(value)
    except (MemoryError, RecursionError, SyntaxError, ValueError):  # the first two: of brackets in thousands
        return key, value


def answer_help(parser: Callable[[], ArgumentParser]) -> None:
    """Ends the process with the help, where the command line asks for nothing else but that."""
    if not {'-h', '--help'}.isdisjoint(sys.argv[1:]):
        with closed_pipe_ends_quietly():
            parser().print_help()
        sys.exit()


def path_text(text: str) -> str:
    """A type for `add_argument`: a path or an address; `~` is the home folder, as in a shell."""
    return expanduser(text)


def file_path(text: str) -> Path:
    """`path_text` as a `Path`."""
    return Path(path_text(text))
