"""Runs the inputs of a campaign in a process of their own, and counts how they end."""
from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from utils import DivergedError, UserError

LIMIT_SECONDS = 5      # an input that takes longer hangs
LIMIT_BYTES = 2 ** 30  # more memory than this at once is a blow-up
ACCEPTED, REFUSED, TRACEBACK, HANG, MEMORY = KINDS = ('accepted', 'refused', 'tracebacks', 'hangs', 'blow-ups')

# Makes an input from a random generator in an empty folder: what it is, and the call that reads it.
Campaign = Callable[[random.Random, Path], tuple[str, Callable[[], object]]]


class Failure(NamedTuple):
    """An input that did not end as it should."""
    number: int
    kind: str
    about: str
    detail: str


class _Hang(BaseException):
    """The time is up; no `except Exception` of the reader catches it."""


def _stop(*_: object) -> None:
    raise _Hang


def _peak_bytes() -> int:
    """The largest resident set since `_forget_peak`; 0 where the system does not tell."""
    try:
        lines = Path('/proc/self/status').read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith('VmHWM')), 0)


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')


def printable_line(text: str) -> bool:
    """Whether a terminal shows the text as it is, on one line."""
    return bool(text) and text.isprintable()


def judge(call: Callable[[], object]) -> tuple[str, str]:
    """How a call ends, and what it said."""
    said = io.StringIO()
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            call()
    except (UserError, DivergedError) as error:
        if not printable_line(str(error)):
            return TRACEBACK, f'the message is no printable line: {str(error)!r}'
        return REFUSED, str(error)
    except _Hang:
        return HANG, traceback.format_exc(limit=-4)
    except Exception:
        return TRACEBACK, traceback.format_exc(limit=-6)
    except SystemExit as error:
        return TRACEBACK, f'left with {error.code!r}'
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if any(not line.isprintable() for line in said.getvalue().splitlines()):
        return TRACEBACK, f'printed control characters: {said.getvalue()!r:.300}'
    return ACCEPTED, ''


def _work(name: str, campaign: Campaign, seed: int, numbers: range, results: Connection) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _stop)
    # A guard for the machine: what takes this much has long been counted as a blow-up.
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2 ** 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:
            about, call = campaign(random.Random(f'{seed} {name} {number}'), Path(folder))
            results.send((number, None, about, ''))
            _forget_peak()
            before = _peak_bytes()
            kind, detail = judge(call)
            if _peak_bytes() - before > LIMIT_BYTES:
                kind, detail = MEMORY, f'{(_peak_bytes() - before) / 2 ** 20:.0f} MiB'
            for path in Path(folder).rglob('*'):  # what an input made unreadable is to be removed all the same
                if path.is_dir() and not path.is_symlink():
                    path.chmod(0o700)
        results.send((number, kind, about, detail))
    results.send(None)


def run_campaign(name: str, campaign: Campaign, count: int, seed: int) -> tuple[Counter, list[Failure]]:
    """Counts how the inputs end, by `KINDS`, and lists those that failed.

    A process that dies, or that does not answer its alarm, costs the input that it was at, and another one goes on
    behind it.
    """
    counts, failures, done = Counter(), [], 0
    context = multiprocessing.get_context('fork')
    while done < count:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(name, campaign, seed, range(done, count), theirs), daemon=True)
        process.start()
        theirs.close()
        about = ''
        while True:
            try:
                message = ours.recv() if ours.poll(60 + LIMIT_SECONDS) else (done, HANG, about, 'does not react')
            except EOFError:
                process.join()
                message = done, TRACEBACK, about, f'the process died with status {process.exitcode}'
            if message is None:
                break
            number, kind, about, detail = message
            if kind is None:
                continue
            counts[kind] += 1
            done = number + 1
            if kind not in (ACCEPTED, REFUSED):
                failures.append(Failure(number, kind, about, detail))
            if detail.startswith(('the process died', 'does not react')):
                break
        os.kill(process.pid, signal.SIGKILL) if process.is_alive() else None
        process.join()
    return counts, failures
