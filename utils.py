"""What all entry points share: mistakes and flags, files, distributed start-up, randomness, metric logging."""

import ast
import difflib
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar('T')


def printable(text: str) -> str:
    """The text with its control characters escaped: names from files must not steer the terminal that shows them."""
    return text if text.isprintable() else ''.join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class UserError(ValueError):
    """A mistake of the user's: one line that names the value and what to do. Entry points exit with status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class DivergedError(RuntimeError):
    """Training met a loss that is not finite: one line. Entry points exit with status 1."""


def closest(name: str, known: Collection[str]) -> str:
    """What to say after `name` turned out not to be among `known`."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f'did you mean {", ".join(close)}?' if close else 'no name comes close to it'


def report(error: Exception) -> None:
    """One line on standard error for a mistake that ends the run, from one process of a distributed run."""
    # Errors of data-loading workers come with the worker's whole traceback, and the message as its last line.
    line = printable(str(error).strip()).removesuffix(r'\n').rpartition(r'\nutils.UserError: ')[2]
    if dist.is_initialized():
        # Not always rank 0: an unreadable image, for one, is met by whoever has to load it.
        try:
            first = dist.distributed_c10d._get_default_store().add('errors_reported', 1) == 1
        except RuntimeError:  # the process that holds the store has reported and left
            first = False
    else:
        first = launched_as()[0] == 0
    if first:
        print(f'error: {line}', file=sys.stderr, flush=True)


# --- flags ------------------------------------------------------------------------------------------------------------


class Parser(ArgumentParser):
    """A parser whose complaints are the user's mistakes: one line."""

    def error(self, message: str) -> NoReturn:
        # argparse says 'argument --num_workers/--num-workers: -1: choose ...' of a value that its type refuses.
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


# --- values and files -------------------------------------------------------------------------------------------------


def pick(kind: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass `kind` with those of the values that have the names of its fields."""
    return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})


def write_whole(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` write a file beside `path` and renames it, so that `path` is always a whole file.

    Raises:
        OSError: as writing or renaming raises it; what was at `path` before is still there.
    """
    path = Path(path)
    beside = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


# --- distributed runs -------------------------------------------------------------------------------------------------


class Ranks(NamedTuple):
    """This process' number among those of a run, and how many they are."""
    rank: int = 0
    world_size: int = 1


def launched_as() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, processes of this node) as torchrun, torch.distributed.launch or srun set them."""
    env = os.environ
    if 'RANK' in env and 'WORLD_SIZE' in env:
        world = int(env['WORLD_SIZE'])
        return int(env['RANK']), world, int(env.get('LOCAL_RANK', 0)), int(env.get('LOCAL_WORLD_SIZE', world))
    # Within a batch script or an interactive shell of Slurm, SLURM_PROCID is there too, but no step of several tasks.
    world = int(env.get('SLURM_STEP_NUM_TASKS', 1))
    if world > 1 and 'SLURM_PROCID' in env:
        nodes = int(env.get('SLURM_STEP_NUM_NODES', 1))
        return int(env['SLURM_PROCID']), world, int(env.get('SLURM_LOCALID', 0)), -(-world // nodes)
    return 0, 1, 0, 1


def print_on_rank_0() -> None:
    """Lets rank 0 alone print, and its lines appear as they come also in files and pipes."""
    if launched_as()[0] > 0:
        sys.stdout = open(os.devnull, 'w')
    elif hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(line_buffering=True)


def init_distributed(device: str, world_size: int, dist_url: str) -> tuple[torch.device, Ranks]:
    """Joins the processes of the run, if there are several. NCCL connects GPUs, gloo anything else.

    Args:
        device: 'cuda' or 'cpu'; of several processes each gets a GPU of its own.
        world_size: how many processes to expect, 1 for however many there are.
        dist_url: where they meet.

    Returns:
        This process' device, and its number among those of the run.

    Raises:
        UserError: processes, GPUs or addresses do not fit together.
    """
    rank, world, local_rank, local_world = launched_as()
    if world_size not in (1, world):
        raise UserError(f'--world_size {world_size}, but {world} process{"es" if world > 1 else ""} started: '
                        f'start with torchrun --nproc_per_node={world_size}')
    own = torch.device(device)
    if own.type == 'cuda':
        own = own if world == 1 else torch.device('cuda', _gpu_of(local_rank, local_world))
        torch.cuda.set_device(own)
    if world == 1:
        return own, Ranks(rank, world)

    if own.type != 'cuda' and 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))
    if dist_url == 'env://' and 'MASTER_ADDR' not in os.environ:
        _address_from_slurm()
    dist.init_process_group('nccl' if own.type == 'cuda' else 'gloo', init_method=dist_url, rank=rank,
                            world_size=world, timeout=timedelta(minutes=30))
    return own, Ranks(rank, world)


def _gpu_of(local_rank: int, local_world: int) -> int:
    """The index of a process' GPU. A launcher that shows each process one GPU, its own, calls it 0 in all of them."""
    visible = torch.cuda.device_count()
    if visible > 1 and local_rank >= visible:
        raise UserError(f'{local_world} processes on a node with {visible} GPUs: start one process per GPU')
    return 0 if visible == 1 else local_rank


def _address_from_slurm() -> None:
    """The first node of the step as the meeting point, at a port that follows from the job's number."""
    nodes = os.environ.get('SLURM_STEP_NODELIST', os.environ.get('SLURM_JOB_NODELIST', 'localhost'))
    address = nodes
    if '[' in nodes or ',' in nodes:
        try:
            command = ['scontrol', 'show', 'hostnames', nodes]
            address = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f'cannot tell the first of the nodes {nodes}: set MASTER_ADDR and MASTER_PORT') from error
    os.environ['MASTER_ADDR'] = address
    os.environ.setdefault('MASTER_PORT', str(10000 + int(os.environ.get('SLURM_JOB_ID', 0)) % 50000))


def any_rank(*flags: bool, device: torch.device) -> list[bool]:
    """Says of each flag whether it is set on any rank. A collective, and a synchronisation with the device."""
    if not dist.is_initialized():
        return list(flags)
    agreed = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in agreed.tolist()]


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean over all processes: gathered and summed in one order, so bit for bit the same on each."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.stack(parts).mean(0)


class StopRequest:
    """Within `with`, SIGTERM and SIGINT set `requested` instead of ending the process."""

    def __init__(self) -> None:
        self.requested = False

    def _request(self, *_: Any) -> None:
        self.requested = True

    def __enter__(self) -> 'StopRequest':
        self._previous = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def outlive_signals(_worker: int) -> None:
    """Keeps a data-loading worker alive through a signal to the whole process group, until the parent has its batch.

    SIGINT is left to the parent. SIGTERM ends a worker 20 s later, which is time for the parent to end its update; it
    is not ignored, because the interpreter ends forgotten workers with it at its exit.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))


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
    if not dist.is_initialized():
        return [own]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, own)
    return states


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

    def __init__(self, form: str = '{median:.4f} ({mean:.4f})') -> None:
        self.form, self.recent, self.total, self.count = form, deque(maxlen=20), 0., 0

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
    """

    def __init__(self, header: str, total: int, print_freq: int, device: torch.device, done: int = 0) -> None:
        self.header, self.total, self.print_freq, self.device, self.done = header, total, print_freq, device, done
        self.meters: dict[str, SmoothedValue] = {}
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
                form = '{last:.6f}' if name in ('lr', 'lr_min') else '{median:.4f} ({mean:.4f})'
                self.meters.setdefault(name, SmoothedValue(form)).update(number)
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

    def means(self) -> dict[str, float]:
        """The mean of every meter over all batches of all ranks. A collective."""
        sums = torch.tensor([[meter.total, meter.count] for meter in self.meters.values()], dtype=torch.float64)
        if dist.is_initialized() and self.meters:
            sums = sums.to(self.device)
            dist.all_reduce(sums)
        return {name: total / max(count, 1) for name, (total, count) in zip(self.meters, sums.tolist(), strict=True)}
