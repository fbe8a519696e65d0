"""Mistakes, and what is said of them: one line that names the value and what to do."""

import difflib
import os
import reprlib
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ['DivergedError', 'RunError', 'UserError', 'closed_pipe_ends_quietly', 'closest', 'printable', 'shown']

_SHORT = reprlib.Repr()  # looks a few levels and entries far, however large a value is
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100


def printable(text: str) -> str:
    """The text with its control characters escaped: names from files must not steer the terminal that shows them."""
    return text if text.isprintable() else ''.join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class UserError(ValueError):
    """A mistake of the user's: one line that names the value and what to do. Entry points exit with status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class RunError(RuntimeError):
    """What ends a run though its command line is right: one line. Entry points exit with status 1."""


class DivergedError(RunError):
    """Training met a loss that is not finite."""


def closest(name: str, known: Collection[str]) -> str:
    """What to say after `name` turned out not to be among `known`."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f'did you mean {", ".join(close)}?' if close else 'no name comes close to it'


def shown(value: Any) -> str:
    """The value for a message of one line."""
    try:
        text = ' '.join(_SHORT.repr(value).split())
    except ValueError:  # whole numbers of thousands of digits have no text
        text = type(value).__name__
    return text if len(text) <= 60 else f'{text[:60]}...'


@contextmanager
def closed_pipe_ends_quietly() -> Iterator[None]:
    """Ends the process, with what a shell reports of SIGPIPE, where nobody reads its output on: as in `... | head`."""
    try:
        yield
        sys.stdout.flush()  # what waits in the buffer meets the closed pipe here, and not at the interpreter's exit
    except BrokenPipeError:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (OSError, ValueError):  # a stand-in for the stream, which has no descriptor
            pass
        sys.exit(141)
