"""Fixtures that tests of whole runs share."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import TINY, run

from ops import cpu as native_training


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def kernels_off():
    """Quantizers and DGD in torch again, whatever a test enables, as `main` does."""
    yield
    native_training.enable(False)


@pytest.fixture(params=['torch', 'C++'])
def kernels(request):
    """Runs a test with quantizers and DGD in torch, and again with them in C++."""
    if request.param == 'C++' and shutil.which('g++') is None:
        pytest.skip('no C++ compiler')
    native_training.enable(request.param == 'C++')


@pytest.fixture(scope='session')
def teacher_path(tmp_path_factory) -> Path:
    """A self-describing checkpoint of a full-precision network for the digits, trained by main.py."""
    folder = tmp_path_factory.mktemp('teacher')
    assert run(*TINY, '--model', 'deit_tiny_distilled_patch16_224', '--epochs', 3, '--opt', 'adamw', '--lr', '2e-2',
               '--output_dir', folder) == 0
    return folder / 'best_checkpoint.pth'
