"""The smallest runs of main.py, for the tests of the whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main

ROOT = Path(main.__file__).parent
SHAPE = ('--model-kwargs', 'embed_dim=24', 'depth=2', 'num_heads=2', 'patch_size=8')
# 10 batches an epoch.
TINY = (*SHAPE, '--input-size', '16', '--batch-size', '128', '--num_workers', '0', '--device', 'cpu', '--opt',
        'fusedlamb', '--lr', '1e-2', '--warmup-epochs', '0', '--weight-decay', '0', '--no-repeated-aug', '--print-freq',
        '4')


def command(*flags: object) -> list[str]:
    """The command line of a run in a process of its own."""
    return [sys.executable, str(ROOT / 'main.py'), *map(str, flags)]


def environment(**extra: str) -> dict[str, str]:
    """For processes: one thread each, as `one_thread` has it here, so that results are equal."""
    return {**os.environ, 'OMP_NUM_THREADS': '1', **extra}


def in_processes(*flags: object, world: int = 2, launcher: str = 'torch.distributed.run') -> subprocess.CompletedProcess:
    """Runs main.py in several processes."""
    options = ['--use_env'] if launcher == 'torch.distributed.launch' else []
    return subprocess.run(
        [sys.executable, '-m', launcher, '--master_port=0', f'--nproc_per_node={world}', *options,
         *command(*flags)[1:]], env=environment(), capture_output=True, text=True, timeout=300)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='session')
def teacher_path(tmp_path_factory) -> Path:
    """A self-describing checkpoint of a full-precision network for DIGITS, trained by main.py."""
    folder = tmp_path_factory.mktemp('teacher')
    assert main.main([*TINY, '--model', 'deit_tiny_distilled_patch16_224', '--epochs', '3', '--opt', 'adamw', '--lr',
                      '2e-2', '--output_dir', str(folder)]) == 0
    return folder / 'best_checkpoint.pth'
