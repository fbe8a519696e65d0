"""A small part of every campaign; `python -m tests.fuzz` runs as much as one likes."""

import mmap
import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]  # `tests` itself is no package that pytest would find

pytest.importorskip('matplotlib')  # one of requirements-dev.txt, which the oldest versions are tested without
from tests.fuzz import networks, pictures, texts  # noqa: E402
from tests.fuzz.harness import ACCEPTED, HANG, MEMORY, REFUSED, TRACEBACK, run_campaign  # noqa: E402
from utils import UserError  # noqa: E402

CAMPAIGNS = networks.CAMPAIGNS | texts.CAMPAIGNS | pictures.CAMPAIGNS
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == 'win32', reason='forks')]


@pytest.fixture(scope='module', autouse=True)
def sound_files():
    networks.warm_up()
    texts.network()


@pytest.mark.parametrize('name', CAMPAIGNS)
def test_every_input_is_accepted_or_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a command writes by its defaults ends here
    counts, failures = run_campaign(name, CAMPAIGNS[name], 12, seed=0)
    assert not failures and sum(counts.values()) == 12


def _ends(how):
    return lambda rng, folder: ('an input', how)


def _raise(error):
    raise error


@pytest.mark.parametrize(('call', 'kind'), [
    (lambda: None, ACCEPTED), (lambda: _raise(UserError('why')), REFUSED), (lambda: _raise(KeyError('why')), TRACEBACK),
    (lambda: print('\x1b[2J'), TRACEBACK), (lambda: os._exit(3), TRACEBACK), (lambda: time.sleep(9), HANG),
    # Fresh pages: what the process has freed and kept would be no growth.
    (lambda: mmap.mmap(-1, 2 ** 28).write(b'x' * 2 ** 28), MEMORY)])
def test_the_harness_tells_them_apart(call, kind, monkeypatch):
    monkeypatch.setattr('tests.fuzz.harness.LIMIT_SECONDS', 0.5)
    monkeypatch.setattr('tests.fuzz.harness.LIMIT_BYTES', 2 ** 26)
    counts, failures = run_campaign('a', _ends(call), 2, seed=0)
    assert counts == Counter({kind: 2}) and len(failures) == (0 if kind in (ACCEPTED, REFUSED) else 2)
