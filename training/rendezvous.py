"""How the processes of a run learn of one another: what their launcher says in the environment, and how they meet."""

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from utils import Ranks, RunError, UserError, speak_for_run

__all__ = ['init_distributed', 'launched_as', 'print_on_rank_0']

MEETING_LIMIT = 600.  # seconds that processes wait for one another at the start
SAID_EVERY = 30.      # seconds between the lines that say so
ATTEMPT = 5.          # seconds of one attempt to reach rank 0, which Ctrl-C cannot end


# --- what the launcher says -------------------------------------------------------------------------------------------


def _variable(name: str, default: int | None = None, least: int = 0, most: int | None = None) -> int:
    """The whole number that a variable of the environment holds.

    Raises:
        UserError: it holds something else, or, without a default, is not set.
    """
    text = os.environ.get(name, '' if default is None else str(default))
    value = int(text) if text.isascii() and text.isdigit() else -1
    if value < least or most is not None and value > most:
        choices = f'of at least {least}' if most is None else f'from {least} to {most}'
        raise UserError(f'{name}={text} in the environment: the launcher sets a whole number {choices}, unset it or '
                        'start with torchrun or srun')
    return value


def launched_as() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, processes of this node) as torchrun, torch.distributed.launch or srun set them.

    Raises:
        UserError: they do not fit together.
    """
    env = os.environ
    if 'RANK' in env and 'WORLD_SIZE' in env:
        world = _variable('WORLD_SIZE', least=1)
        local_world = _variable('LOCAL_WORLD_SIZE', world, least=1, most=world)
        return (_variable('RANK', most=world - 1), world, _variable('LOCAL_RANK', 0, most=local_world - 1),
                local_world)
    if 'SLURM_PROCID' not in env:
        return 0, 1, 0, 1
    # Within a batch script or an interactive shell of Slurm, SLURM_PROCID is there too, but no step of several tasks.
    world = _variable('SLURM_STEP_NUM_TASKS', 1, least=1)
    if world == 1:
        return 0, 1, 0, 1
    nodes = _variable('SLURM_STEP_NUM_NODES', 1, least=1, most=world)
    return (_variable('SLURM_PROCID', most=world - 1), world, _variable('SLURM_LOCALID', 0, most=world - 1),
            -(-world // nodes))


def print_on_rank_0() -> None:
    """Lets rank 0 alone print, and its lines appear as they come also in files and pipes.

    Raises:
        UserError: the environment does not tell the rank.
    """
    rank = launched_as()[0]
    speak_for_run(rank == 0)
    if rank > 0:
        sys.stdout = open(os.devnull, 'w', encoding='utf-8')
    elif hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(line_buffering=True)


# --- how they meet ----------------------------------------------------------------------------------------------------


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
        RunError: some of the processes did not come.
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
    store = _meet(dist_url, Ranks(rank, world))
    store.set_timeout(timedelta(minutes=30))
    dist.init_process_group('nccl' if own.type == 'cuda' else 'gloo', store=store, rank=rank, world_size=world,
                            timeout=timedelta(minutes=30))
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
        except (IndexError, OSError, subprocess.CalledProcessError) as error:
            raise UserError(f'cannot tell the first of the nodes {nodes}: set MASTER_ADDR and MASTER_PORT') from error
    os.environ['MASTER_ADDR'] = address
    if 'MASTER_PORT' not in os.environ:
        os.environ['MASTER_PORT'] = str(10000 + _variable('SLURM_JOB_ID', 0) % 50000)


class _Wait:
    """Says what is waited for and since when, from time to time, and ends the run when that lasts too long."""

    def __init__(self, where: str) -> None:
        self._where, self._since, self._started = where, time.strftime('%H:%M:%S'), time.monotonic()
        self._said = self._started

    def go_on(self, what: str, is_said: bool = True) -> None:
        """Waits for `what`.

        Raises:
            RunError: for too long.
        """
        line, now = f'{what} at {self._where}, since {self._since}', time.monotonic()
        if now - self._started > MEETING_LIMIT:
            raise RunError(f'{line}: given up after {MEETING_LIMIT / 60:g} minutes, look whether all processes started')
        if is_said and now - self._said > SAID_EVERY:
            self._said = now
            print(f'{line}; for at most {MEETING_LIMIT / 60:g} minutes', file=sys.stderr, flush=True)
        time.sleep(0.02)


def _meet(dist_url: str, ranks: Ranks) -> dist.Store:
    """The store of the run, when all its processes have come to it.

    Raises:
        UserError: no such place.
        RunError: some of them did not come.
    """
    host, port = _address(dist_url)
    wait = _Wait(f'{host}:{port}' if host else dist_url)
    # What a launcher starts again within a run meets at the same place.
    store = dist.PrefixStore(f'attempt_{os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}',
                             _tcp_store(host, port, ranks, wait) if host else _other_store(dist_url, ranks))
    store.add('arrived', 1)
    while (arrived := store.add('arrived', 0)) < ranks.world_size:
        wait.go_on(f'{arrived} of {ranks.world_size} processes have met', is_said=ranks.rank == 0)
    return store


def _address(dist_url: str) -> tuple[str, int]:
    """Host and port that the URL names; no host where it names something else."""
    if dist_url == 'env://':
        if not os.environ.get('MASTER_ADDR'):
            _address_from_slurm()
        return os.environ['MASTER_ADDR'], _variable('MASTER_PORT', least=1, most=65535)
    try:
        url = urlsplit(dist_url)
        if url.scheme == 'tcp' and url.hostname and url.port:
            return url.hostname, url.port
        if url.scheme == 'file' and url.path:
            return '', 0
    except ValueError:  # a port that is no number
        pass
    raise UserError(f'--dist_url {dist_url}: choose env://, tcp://HOST:PORT or file:///PATH')


def _tcp_store(host: str, port: int, ranks: Ranks, wait: _Wait) -> dist.Store:
    # torchrun holds the store itself, for all the processes that it starts.
    is_of_agent = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True' and (
        (host, str(port)) == (os.environ.get('MASTER_ADDR'), os.environ.get('MASTER_PORT')))
    is_host = ranks.rank == 0 and not is_of_agent
    while True:
        try:
            if not is_host:  # PyTorch's own attempt says a page about each that fails
                socket.create_connection((host, port), ATTEMPT).close()
            return dist.TCPStore(host, port, ranks.world_size, is_host, timedelta(seconds=ATTEMPT), multi_tenant=True,
                                 wait_for_workers=False)
        except (RuntimeError, OSError) as error:  # which of PyTorch's, depends on its version
            if is_host and 'in use' in str(error):
                raise UserError(f'MASTER_PORT {port} of {host} is in use: choose another') from error
            wait.go_on(f'process {ranks.rank} of {ranks.world_size} waits for process 0')


def _other_store(dist_url: str, ranks: Ranks) -> dist.Store:
    try:
        return next(dist.rendezvous(dist_url, ranks.rank, ranks.world_size))[0]
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f'--dist_url {dist_url} cannot be used ({" ".join(str(error).split())[:200]})') from error
