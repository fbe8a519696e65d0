"""The smallest runs of main.py."""

import os
import subprocess
import sys
from pathlib import Path

import main

ROOT = Path(main.__file__).parent
SHAPE = ('--model-kwargs', 'embed_dim=24', 'depth=2', 'num_heads=2', 'patch_size=8')
# 11 batches an epoch.
TINY = (*SHAPE, '--input-size', '16', '--batch-size', '128', '--num_workers', '0', '--device', 'cpu', '--opt',
        'fusedlamb', '--lr', '1e-2', '--warmup-epochs', '0', '--weight-decay', '0', '--no-repeated-aug', '--print-freq',
        '4')


def run(*flags: object) -> int:
    """main.py in this process: its exit status."""
    return main.main([str(flag) for flag in flags])


def environment(**extra: object) -> dict[str, str]:
    """Of other processes: one thread each, as the fixture `one_thread` has it here, so that results are equal."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith('SLURM_')}
    return clean | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)} | {name: str(value) for name, value in extra.items()}


def launch(launcher: str, script: Path, *flags: object, **extra: object) -> subprocess.CompletedProcess:
    """A script in two processes, started by torch.distributed.`launcher`."""
    options = ['--use_env'] if launcher == 'launch' else []
    return subprocess.run(
        [sys.executable, '-W', 'ignore', '-m', f'torch.distributed.{launcher}', '--master_port=0', '--nproc_per_node=2',
         *options, str(script), *map(str, flags)],
        env=environment(**extra), capture_output=True, text=True, timeout=300)
