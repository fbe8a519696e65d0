"""What all entry points share: mistakes and flags, files, ranks, randomness, metric logging."""

import functools
import os
import random
import re
import secrets
import statistics
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from console.mistakes import (  # noqa: F401  for all who use utils
    DivergedError,
    RunError,
    UserError,
    closed_pipe_ends_quietly,
    closest,
    printable,
)
from console.parser import Parser, key_value  # noqa: F401

T = TypeVar('T')

_speaks = True  # whether this process says what ends it, before it has met the others of a run


def speak_for_run(speaks: bool) -> None:
    """Says whether this process reports for all of its run, which one of them does."""
    global _speaks
    _speaks = speaks


def speaks_for_run() -> bool:
    return _speaks


def report(error: BaseException) -> None:
    """One line on standard error for a mistake that ends the run, from one process of a distributed run."""
    # Errors of data-loading workers come with the worker's whole traceback, and the message as its last line.
    text = printable(str(error).strip() or type(error).__name__)
    line = re.split(r'\\n[\w.]+\.UserError: ', text.removesuffix(r'\n'))[-1]
    if _is_first_to_report():
        print(f'error: {line}', file=sys.stderr, flush=True)


def _is_first_to_report() -> bool:
    if not dist.is_initialized():
        return _speaks
    # Not always rank 0: an unreadable image, for one, is met by whoever has to load it.
    try:
        return dist.distributed_c10d._get_default_store().add('errors_reported', 1) == 1
    except RuntimeError:  # the process that holds the store has reported and left
        return False


def entry_point(run: Callable[..., int | None]) -> Callable[..., int]:
    """Makes `run` return an exit status: 0, or, after one line that says why, that of what ended it.

    `run` may give the status itself. A mistake of the user's ends with 2, Ctrl-C with 130, and with 1 what comes from
    outside: a full disk, a process of the run that is gone. Everything else is an error of the program, and its
    traceback is left alone.
    """
    @functools.wraps(run)
    def status(*args: Any, **kwargs: Any) -> int:
        speak_for_run(True)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, 'reconfigure'):  # a class may have a name that the terminal's encoding lacks
                stream.reconfigure(errors='backslashreplace')
        try:
            with closed_pipe_ends_quietly():
                return run(*args, **kwargs) or 0
        except (UserError, RunError, OSError, KeyboardInterrupt) as error:
            ended_by: BaseException = error
        except RuntimeError as error:
            if not (dist.is_initialized() and _is_lost_connection(error)):
                raise
            ended_by = RunError(f'process {dist.get_rank()} of {dist.get_world_size()}: another process of the run has '
                                f'ended ({" ".join(str(error).split())[-120:]})').with_traceback(error.__traceback__)
        report(RunError('stopped by Ctrl-C') if isinstance(ended_by, KeyboardInterrupt) else ended_by)
        # Lets go of the data loaders, which end their workers; the interpreter would wait for these at its exit.
        traceback.clear_frames(ended_by.__traceback__)
        return 2 if isinstance(ended_by, UserError) else 130 if isinstance(ended_by, KeyboardInterrupt) else 1

    return status


def _is_lost_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or 'gloo' in str(error)


# --- values and files -------------------------------------------------------------------------------------------------


def pick(kind: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass `kind` with those of the values that have the names of its fields."""
    return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})


def readable(names: Iterable[str]) -> list[str]:
    """Names of folders as text that files can hold.

    Python has other characters for bytes that the locale cannot read, which no encoding takes.
    """
    return [name.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace') for name in names]


def write_whole(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` write a file beside `path` and renames it, so that `path` is always a whole file.

    It is on the disk before it has its name, so a machine that stops keeps the one or the other. The name beside is of
    no other process, be it on another machine.

    Raises:
        OSError: as writing or renaming raises it; what was at `path` before is still there.
    """
    path = Path(path)
    beside = path.with_name(f'.{path.name}.{secrets.token_hex(4)}')
    try:
        write(beside)
        _let_others_read(beside)
        _flush_to_disk(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    try:
        _flush_to_disk(path.parent)
    except OSError:  # not every file system does this for a folder, and the file is written
        return


def write_whole_text(path: str | Path, text: str) -> None:
    """`write_whole` of a text."""
    write_whole(path, lambda beside: beside.write_text(text, encoding='utf-8'))


def _let_others_read(path: Path) -> None:
    """Gives a file the mode of any new one: some libraries make theirs for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def _flush_to_disk(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes only what may be written
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


# --- distributed runs -------------------------------------------------------------------------------------------------


class Ranks(NamedTuple):
    """This process' number among those of a run, and how many they are."""
    rank: int = 0
    world_size: int = 1


def any_rank(*flags: bool, device: torch.device) -> list[bool]:
    """Says of each flag whether it is set on any rank. A collective, and a synchronisation with the device."""
    if not dist.is_initialized():
        return list(flags)
    agreed = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in agreed.tolist()]


def from_all_ranks(own: T) -> list[T]:
    """What each rank has, in their order. A collective."""
    if not dist.is_initialized():
        return [own]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return gathered


def take_from_rank_0(*tensors: Tensor) -> None:
    """Gives each tensor, in place, the values that it has on rank 0. A collective."""
    if dist.is_available() and dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean over all processes: gathered and summed in one order, so bit for bit the same on each."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.stack(parts).mean(0)


# --- memory and randomness --------------------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_states(device: torch.device) -> list[dict[str, Any]]:
    """The state of every random generator of every rank, in plain values and tensors. A collective."""
    kind, key, *rest = np.random.get_state()
    own = {'python': random.getstate(), 'numpy': (kind, key.tolist(), *rest), 'torch': torch.get_rng_state()}
    if device.type == 'cuda':
        own['cuda'] = torch.cuda.get_rng_state(device)
    return from_all_ranks(own)


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Sets this process' generators to one of the states that `rng_states` gave."""
    version, internal, gauss = state['python']
    random.setstate((version, tuple(internal), gauss))
    kind, key, *rest = state['numpy']
    np.random.set_state((kind, np.array(key, dtype=np.uint32), *rest))
    torch.set_rng_state(state['torch'])
    if device.type == 'cuda' and 'cuda' in state:
        torch.cuda.set_rng_state(state['cuda'], device)


# --- metrics ----------------------------------------------------------------------------------------------------------


class SmoothedValue:
    """A series of numbers: the median of the last 20, and the mean of all."""

    def __init__(self, form: str = '{median:.4f} ({mean:.4f})', total: float = 0., count: int = 0) -> None:
        self.form, self.recent, self.total, self.count = form, deque(maxlen=20), total, count

    def update(self, value: float) -> None:
        self.recent.append(value)
        self.total += value
        self.count += 1

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)

    @property
    def last(self) -> float:
        return self.recent[-1] if self.recent else 0.

    def __str__(self) -> str:
        median = statistics.median_low(self.recent) if self.recent else 0.
        return self.form.format(median=median, mean=self.mean, last=self.last)


def _form(name: str) -> str:
    return '{last:.6f}' if name in ('lr', 'lr_min') else '{median:.4f} ({mean:.4f})'


class MetricLogger:
    """Log lines in DeiT's form. Tensors wait on their device until `read`, which copies all of them at once.

        for batch in logger.batches(loader):
            logger.update(loss=loss)
            if logger.end_batch():      # a log line is due
                logger.read()
                logger.print_line()

    Args:
        header: begins each line, as in 'Epoch: [3]'.
        total: batches of the whole epoch, of which `done` were seen before.
        print_freq: batches between log lines; the first and the last batch have one, too.
        sums: of the batches that were seen before, what `sums` gave.
    """

    def __init__(self, header: str, total: int, print_freq: int, device: torch.device, done: int = 0,
                 sums: Mapping[str, tuple[float, int]] | None = None) -> None:
        self.header, self.total, self.print_freq, self.device, self.done = header, total, print_freq, device, done
        self.meters = {name: SmoothedValue(_form(name), *seen) for name, seen in (sums or {}).items()}
        self.data_time, self.batch_time = SmoothedValue('{mean:.4f}'), SmoothedValue('{mean:.4f}')
        self._waiting: list[dict[str, float | Tensor]] = []
        self._started = self._batch_started = time.monotonic()
        # A terminal gets one line that is written over again, everything else a line for each.
        self._in_place = sys.stdout.isatty()

    def batches(self, loader: Iterable) -> Iterator:
        """The loader's batches; measures the wait for each."""
        for batch in loader:
            self.data_time.update(time.monotonic() - self._batch_started)
            yield batch

    def update(self, **values: float | Tensor) -> None:
        """Takes the numbers, or detached 0-dim tensors, of one batch."""
        self._waiting.append(values)

    def end_batch(self) -> bool:
        """Counts and times the batch, and says whether a log line is due."""
        now = time.monotonic()
        self.batch_time.update(now - self._batch_started)
        self._batch_started = now
        self.done += 1
        return (self.done - 1) % self.print_freq == 0 or self.done == self.total

    def read(self) -> bool:
        """Brings what waits on the device to the host, in one copy, and says whether all of it is finite."""
        tensors = [value for values in self._waiting for value in values.values() if isinstance(value, Tensor)]
        numbers = iter(torch.stack([tensor.float() for tensor in tensors]).tolist() if tensors else [])
        finite = True
        for values in self._waiting:
            for name, value in values.items():
                number = next(numbers) if isinstance(value, Tensor) else value
                finite = finite and np.isfinite(number)
                self.meters.setdefault(name, SmoothedValue(_form(name))).update(number)
        self._waiting = []
        return bool(finite)

    def print_line(self) -> None:
        width = len(str(self.total))
        eta = timedelta(seconds=int(self.batch_time.mean * (self.total - self.done)))
        parts = [f'{self.header}  [{self.done - 1:{width}d}/{self.total}]', f'eta: {eta}',
                 *(f'{name}: {meter}' for name, meter in self.meters.items()),
                 f'time: {self.batch_time}', f'data: {self.data_time}']
        if self.device.type == 'cuda':
            parts.append(f'max mem: {torch.cuda.max_memory_allocated(self.device) / 2**20:.0f}')
        line = '  '.join(parts)
        if not self._in_place:
            print(line)
            return
        share = round(20 * self.done / max(self.total, 1))
        print(f'\r\x1b[2K[{"#" * share}{"." * (20 - share)}] {line}', end='' if self.done < self.total else '\n')
        sys.stdout.flush()

    def print_total(self) -> None:
        spent = time.monotonic() - self._started
        print(f'{self.header} Total time: {timedelta(seconds=int(spent))} '
              f'({spent / max(self.batch_time.count, 1):.4f} s / it)')

    def sums(self) -> dict[str, tuple[float, int]]:
        """The sum of every meter over the batches of this rank, and how many they are."""
        return {name: (meter.total, meter.count) for name, meter in self.meters.items()}

    def means(self) -> dict[str, float]:
        """The mean of every meter over all batches of all ranks. A collective."""
        sums = torch.tensor([[meter.total, meter.count] for meter in self.meters.values()], dtype=torch.float64)
        if dist.is_initialized() and self.meters:
            sums = sums.to(self.device)
            dist.all_reduce(sums)
        return {name: total / max(count, 1) for name, (total, count) in zip(self.meters, sums.tolist(), strict=True)}
