"""The output folder: one run at a time, and nothing half written stays."""

import errno
import fcntl
import json
import multiprocessing
import os
import socket

import pytest
from helpers import TINY, run

from training import output
from training.output import output_folder
from training.record import keep_log_before
from utils import UserError


def test_a_second_run_is_refused_in_one_line(tmp_path, capsys):
    with output_folder(tmp_path):
        assert run(*TINY, '--output_dir', tmp_path) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and f'--output_dir {tmp_path} is in use by process {os.getpid()} on ' in err
    assert f' on {socket.gethostname()}, since 20' in err
    assert not (tmp_path / 'args.json').exists()
    with output_folder(tmp_path):  # free again
        pass


def test_a_holder_that_does_not_say_who_it_is(tmp_path):
    with (tmp_path / '.lock').open('w') as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match='is in use by another run'), output_folder(tmp_path):
            pass


@pytest.mark.processes
def test_workers_that_outlive_their_run_do_not_hold_its_folder(tmp_path):
    context = multiprocessing.get_context('fork')
    ready, end = context.Event(), context.Event()
    with output_folder(tmp_path):
        worker = context.Process(target=lambda: (ready.set(), end.wait(30)), daemon=True)
        worker.start()
        assert ready.wait(20)
    with output_folder(tmp_path):
        assert worker.is_alive()
    end.set()
    worker.join()


def test_what_a_killed_run_left_goes(tmp_path):
    left = ('.checkpoint.pth.4711', '.best_checkpoint.pth.0a1b2c3d', '.calibration.pth.ab12', '.log.txt.deadbeef',
            '.args.json.1')
    kept = '.checkpoint.pth.backup', 'checkpoint.pth', '.model.safetensors.12ab', '.lock'
    for name in (*left, *kept[:3]):
        (tmp_path / name).touch()
    with output_folder(tmp_path):
        assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_without_locks_a_run_goes_on_and_removes_nothing(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(output.fcntl, 'flock', refuse)
    (tmp_path / '.checkpoint.pth.4711').touch()
    with output_folder(tmp_path):
        assert (tmp_path / '.checkpoint.pth.4711').exists()
    said = capsys.readouterr().out
    assert said.count('\n') == 1 and f'warning: {tmp_path} cannot be locked (Operation not supported)' in said


def test_a_log_that_was_cut_off_is_mended(tmp_path):
    path = tmp_path / 'log.txt'
    path.write_bytes(b'{"epoch": 0}\n{"epoch": 1}\n[1]\n{"name": "\xc3')
    keep_log_before(path, 1)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{'epoch': 0}]
    assert os.listdir(tmp_path) == ['log.txt']
