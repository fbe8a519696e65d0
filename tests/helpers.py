"""The smallest runs of main.py."""

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import main
from checkpoints.files import write_checkpoint
from training import state

ROOT = Path(main.__file__).parent
SHARED = ROOT.parent / 'shared'  # real images and weights, which tests do without where they are absent
SHAPE = ('--model-kwargs', 'embed_dim=24', 'depth=2', 'num_heads=2', 'patch_size=8')
# 11 batches an epoch.
TINY = (*SHAPE, '--input-size', '16', '--batch-size', '128', '--num_workers', '0', '--device', 'cpu', '--opt',
        'fusedlamb', '--lr', '1e-2', '--warmup-epochs', '0', '--weight-decay', '0', '--no-repeated-aug', '--print-freq',
        '4')

FORMS = {  # options of timm's VisionTransformer, those of networks with one head
    'vit': {}, 'layer scale': {'init_values': 0.1}, 'patch 14': {'patch_size': 14, 'img_size': 28},
    'patch 16': {'patch_size': 16}, 'patch 32': {'patch_size': 32, 'img_size': 64},
    'registers': {'reg_tokens': 4, 'init_values': 0.1}, 'deit3': {'no_embed_class': True, 'init_values': 1e-6},
    'dinov2 registers': {'no_embed_class': True, 'reg_tokens': 4, 'init_values': 1e-5},
    'average': {'global_pool': 'avg'}, 'average without class token': {'global_pool': 'avg', 'class_token': False},
    'gap with registers': {'global_pool': 'avg', 'class_token': False, 'no_embed_class': True, 'reg_tokens': 4},
    'average of normalized tokens': {'global_pool': 'avg', 'fc_norm': False},
    'average of all tokens': {'global_pool': 'avg', 'pool_include_prefix': True},
    'clip': {'pre_norm': True}, 'normalized class token': {'fc_norm': True}}


def require(package: str) -> ModuleType:
    """A third-party package; the test or module that asks for it is skipped where it is not installed.

    pytest.importorskip would also skip what imports a module of this project that was moved.
    """
    assert not (ROOT / package).is_dir() and not (ROOT / f'{package}.py').exists(), f'{package} is our own'
    return pytest.importorskip(package)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The error of what was found, by norms."""
    return ((found - wanted).norm() / wanted.norm()).item()


def run(*flags: object) -> int:
    """main.py in this process: its exit status."""
    return main.main([str(flag) for flag in flags])


def launch(*flags: object) -> subprocess.CompletedProcess:
    """main.py in two processes of one thread each, started as the published commands do."""
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = probe.getsockname()[1]
    return subprocess.run(
        [sys.executable, '-m', 'torch.distributed.launch', f'--master_port={port}', '--nproc_per_node=2', '--use_env',
         str(ROOT / 'main.py'), *map(str, flags)],
        env=os.environ | {'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=200)


class Fork:
    """main.py in a fork of this process, which spares it the imports; stdout and stderr are files in `folder`.

    Args:
        prepare: is called in the fork, before.
    """

    def __init__(self, folder: Path, *flags: object, prepare: Callable[[], None] = lambda: None, **env: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.stdout, self.stderr = folder / 'stdout.txt', folder / 'stderr.txt'
        self._process = multiprocessing.get_context('fork').Process(target=self._run, args=(flags, prepare, env))
        self._process.start()
        self.kill = self._process.kill

    def _run(self, flags: tuple, prepare: Callable[[], None], env: dict[str, object]) -> None:
        sys.stdout, sys.stderr = self.stdout.open('w'), self.stderr.open('w')
        os.environ.update({name: str(value) for name, value in env.items()})
        prepare()
        status = run(*flags)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def wait(self) -> int:
        """The exit status."""
        self._process.join(100)
        assert self._process.exitcode is not None, 'hangs'
        return self._process.exitcode


def fork_ranks(folder: Path, *flags: object, prepare: Callable[[], None] = lambda: None, number: int = 2,
               status: int = 0) -> list[Fork]:
    """Forks that are the ranks of one run, each with its `folder`/<rank>; waits until all ended with `status`."""
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = probe.getsockname()[1]
    ranks = [Fork(folder / str(rank), *flags, prepare=prepare, RANK=rank, LOCAL_RANK=rank,
                  WORLD_SIZE=number, MASTER_ADDR='localhost', MASTER_PORT=port) for rank in range(number)]
    statuses = [rank.wait() for rank in ranks]
    assert statuses == [status] * number, ''.join(rank.stderr.read_text() for rank in ranks)
    return ranks


def run_and_keep(folder: Path, *flags: object) -> None:
    """An uninterrupted run into `folder`, with every checkpoint.pth that it had on the way as <epoch>-<step>.pth."""
    def write_and_keep(contents: dict[str, Any], path: Path) -> None:
        write_checkpoint(contents, path)
        if path.name == 'checkpoint.pth':
            shutil.copy(path, folder / f'{contents["epoch"]}-{contents["step"]}.pth')

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, 'write_checkpoint', write_and_keep)
        assert run(*flags, '--output_dir', folder) == 0


def resume_after_an_epoch(tmp_path: Path, *flags: object) -> tuple[Path, Path]:
    """The folders of a run that went on from its first epoch's checkpoint, and of one that was not interrupted."""
    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    run_and_keep(whole, *flags)
    resumed.mkdir()
    shutil.copy(whole / '0-0.pth', resumed / 'checkpoint.pth')
    assert run(*flags, '--output_dir', resumed, '--resume', 'auto') == 0
    return resumed, whole


def assert_same(a: Any, b: Any, where: str = '') -> None:
    """Equal bit for bit, tensors and all, in the same order."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f'{where}.{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f'{where}[{i}]')
    else:
        assert a == b, where
