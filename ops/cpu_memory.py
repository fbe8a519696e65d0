"""How a training step on the CPU gets its memory."""
from __future__ import annotations

import ctypes
import os

__all__ = ['keep_freed_memory']


def keep_freed_memory() -> None:
    """Lets glibc keep the memory that a training step freed for the next one.

    By default much of it goes back to the system, which clears it page by page: a twentieth of a quantized step's time.
    MALLOC_* variables of the environment have precedence.
    """
    try:
        mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    except TypeError:  # Windows has no library without a name
        return
    if mallopt is None or any(name.startswith('MALLOC_') for name in os.environ):
        return
    trim_threshold, mmap_threshold, largest = -1, -3, 2 ** 31 - 1  # its names in malloc.h
    mallopt(trim_threshold, largest)
    if not mallopt(mmap_threshold, largest):  # older ones allow half of an arena at most
        mallopt(mmap_threshold, 2 ** 25)
