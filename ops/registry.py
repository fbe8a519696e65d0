"""The implementations of `ops` by name. A layer holds the name, a string, so that it can be copied and pickled."""
from __future__ import annotations

from collections.abc import Callable

from ops.reference import Reference

__all__ = ['get', 'names', 'register']

_makers: dict[str, Callable[[], Reference]] = {}
_made: dict[str, Reference] = {}


def register(name: str, make: Callable[[], Reference]) -> None:
    """Adds an implementation, which is made when it is first used."""
    _makers[name] = make


def names() -> tuple[str, ...]:
    return tuple(_makers)


def get(name: str) -> Reference:
    """The implementation of that name.

    Raises:
        ValueError: there is none of that name.
        NativeUnavailable: its code cannot be compiled here.
    """
    if name not in _made:
        if name not in _makers:
            raise ValueError(f'no implementation is called {name!r}: choose one of {", ".join(_makers)}')
        _made[name] = _makers[name]()
    return _made[name]
