"""The output folder of a run: one run at a time writes into it, and what a killed one left half written goes."""

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ['output_folder']

LOCK = '.lock'
# What `utils.write_whole` names the files of a run while it writes them.
NAMES = ('checkpoint.pth', 'best_checkpoint.pth', 'calibrated.pth', 'calibration.pth', 'args.json', 'log.txt',
         'model_card.json', 'model_card.md')
HALF_WRITTEN = re.compile(rf'\.({"|".join(map(re.escape, NAMES))})\.[0-9a-f]+')
_held: set[int] = set()


def _let_go_in_a_fork() -> None:
    """A data-loading worker that outlives its run must not keep the next one out."""
    while _held:
        os.close(_held.pop())


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_let_go_in_a_fork)


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Within, the folder is there and belongs to this process; half-written files of a run before are gone.

    Where the file system has no locks, the folder is not locked, which is said, and nothing is removed.

    Raises:
        UserError: it cannot be written, or another run writes into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f'--output_dir {folder} cannot be written ({error.strerror}): choose another') from error
    _held.add(lock)
    try:
        if _is_locked(lock, folder):
            for path in folder.iterdir():
                if HALF_WRITTEN.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        yield
    finally:
        _held.discard(lock)
        os.close(lock)


def _is_locked(lock: int, folder: Path) -> bool:
    """Takes the lock, with a word of who has it."""
    try:
        if fcntl is None:
            raise OSError('no fcntl')
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f'--output_dir {folder} is in use by {_holder(lock)}: wait for it or choose another') from error
    except OSError as error:
        print(f'warning: {folder} cannot be locked ({error.strerror or error}): let no other run write into it')
        return False
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps({'host': socket.gethostname(), 'pid': os.getpid(),
                                    'since': time.strftime('%Y-%m-%d %H:%M:%S')}).encode(), 0)
    except OSError:  # a full disk: the lock holds all the same
        pass
    return True


def _holder(lock: int) -> str:
    try:
        holder = json.loads(os.pread(lock, 1000, 0))
        return f'process {holder["pid"]} on {holder["host"]}, since {holder["since"]}'
    except (OSError, KeyError, TypeError, ValueError):
        return 'another run'
