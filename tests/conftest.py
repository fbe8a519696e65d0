"""Fixtures that tests of whole runs share."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import TINY, run

import _quan_base
import ops
from quant_vision_transformer import QAttention


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that needs the trained teacher waits for a whole run, even if its own part is short."""
    for item in items:
        if 'teacher_path' in getattr(item, 'fixturenames', ()):
            item.add_marker(pytest.mark.whole_run)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=ops.names())
def implementation(request, monkeypatch) -> str:
    """Runs a test with each implementation of the quantized products, which all layers of it use."""
    if request.param == 'cpu' and shutil.which('g++') is None:
        pytest.skip('no C++ compiler')
    if request.param == 'triton' and os.environ.get('TRITON_INTERPRET') != '1':
        pytest.skip('on a CPU it is plain torch; tests/ops/test_triton_kernels.py interprets its kernels')
    for kind in (_quan_base._Calibrated, QAttention):
        monkeypatch.setattr(kind, 'implementation', request.param)
    return request.param


@pytest.fixture(scope='session')
def teacher_path(tmp_path_factory) -> Path:
    """A self-describing checkpoint of a full-precision network for the digits, trained by main.py."""
    folder = tmp_path_factory.mktemp('teacher')
    assert run(*TINY, '--model', 'deit_tiny_distilled_patch16_224', '--epochs', 3, '--opt', 'adamw', '--lr', '2e-2',
               '--output_dir', folder) == 0
    return folder / 'best_checkpoint.pth'
