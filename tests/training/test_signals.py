"""Signals: the ranks of a run agree on a stop by time, a second signal ends a stalled one, and workers live on."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from training import signals
from training.signals import Agreement, StopRequest, outlive_signals

CPU = torch.device('cpu')


@pytest.mark.parametrize(('seconds', 'expected'), [(60., [1, 2, 3, 4, 5, 6, 7]), (2., [1, 3, 5, 7]), (0.001, [1])])
def test_ranks_ask_one_another_by_time(monkeypatch, seconds, expected):
    """After the first update, and from then on as often as the pace of the slowest rank says."""
    clock, asked = [0.], []
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'all_reduce', lambda values, op: (asked.append(update), values[1].clamp_(min=seconds)))
    monkeypatch.setattr(signals.time, 'monotonic', lambda: clock[0])
    agreement = Agreement(CPU)
    for update in range(1, 8):  # noqa: B007
        clock[0] += min(seconds, 1.)
        assert not agreement.after_update(False)
    assert asked == expected


def test_a_stop_on_another_rank_is_heard_of(monkeypatch):
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'all_reduce', lambda values, op: values[0].fill_(1.))
    assert Agreement(CPU).after_update(False) is True


def test_a_single_process_stops_after_any_update():
    agreement = Agreement(CPU)
    assert [agreement.after_update(stop) for stop in (False, False, True)] == [False, False, True]


def started(body: Callable[..., None]) -> tuple[multiprocessing.Process, Callable[[], None]]:
    """A fork that runs body(ready), once it has called `ready`."""
    context = multiprocessing.get_context('fork')
    ready = context.Event()
    process = context.Process(target=body, args=(ready.set,), daemon=True)
    process.start()
    assert ready.wait(20)
    return process


@pytest.mark.processes
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_what_python_cannot_interrupt(number, capfd):
    def stall(ready: Callable[[], None]) -> None:
        signals.SAME_SIGNAL = 0.3
        lock = ctypes.CDLL(None).pthread_mutex_lock
        with StopRequest():
            mutex = ctypes.create_string_buffer(256)
            lock(mutex)
            ready()
            lock(mutex)  # for ever, outside of Python

    process = started(stall)
    for _ in range(2):  # the launcher passes it on
        os.kill(process.pid, number)
        process.join(0.05)
    process.join(0.5)
    assert process.is_alive()
    os.kill(process.pid, number)
    process.join(10)
    assert process.exitcode == 128 + number
    assert capfd.readouterr().err == 'error: ended at once by a second signal\n'


def test_after_a_run_signals_are_as_before():
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    files = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else None
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # by a launcher
    assert stop.requested and signal.set_wakeup_fd(-1) == -1
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert files is None or len(os.listdir('/proc/self/fd')) == files


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(signal, 'sigwaitinfo'), reason='the sender of a signal is not known here')
def test_workers_end_with_their_parent_and_nobody_else():
    def work(ready: Callable[[], None]) -> None:
        outlive_signals(0)
        ready()
        time.sleep(60)

    process = started(work)
    for name in ('-TERM', '-INT', '-TERM'):  # as a batch system signals all processes of a job
        subprocess.run(['kill', name, str(process.pid)], check=True)
    process.join(0.5)
    assert process.is_alive()
    process.terminate()
    process.join(10)
    assert process.exitcode == 128 + signal.SIGTERM
