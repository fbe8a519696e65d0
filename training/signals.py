"""Stopping a run by SIGTERM or Ctrl-C: all ranks after the same update, their data-loading workers after them."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from utils import speaks_for_run

__all__ = ['Agreement', 'StopRequest', 'outlive_signals']

ASK_EVERY = 5.    # seconds between the questions of the ranks to one another whether to stop
SAME_SIGNAL = 1.  # seconds within which a launcher may send a signal again


class Agreement:
    """Lets the ranks of a run agree on a stop about every ASK_EVERY seconds, however long an update takes.

    They have to ask one another after the same updates, and no two of them have the same time. So whenever they do,
    they also agree on how many updates, at the pace of the slowest, the time until the next question has room for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._asked, self._updates, self._next = device, time.monotonic(), 0, 1

    def after_update(self, stop: bool) -> bool:
        """Whether all ranks stop after this update, because `stop` is set on one of them. Mostly no collective."""
        if not dist.is_initialized():
            return stop
        self._updates += 1
        if self._updates < self._next:
            return False
        seconds = (time.monotonic() - self._asked) / self._updates
        agreed = torch.tensor([stop, seconds], dtype=torch.float32, device=self._device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        stopping, slowest = agreed.tolist()
        self._asked, self._updates, self._next = time.monotonic(), 0, max(1, int(ASK_EVERY / max(slowest, 1e-6)))
        return bool(stopping)


class StopRequest:
    """Within `with`, SIGTERM and SIGINT set `requested` instead of ending the process; a second one ends it at once.

    A thread hears of them, because Python calls no handler while the main thread waits for the other ranks. A launcher
    passes signals on that its processes may have had already: within a second they count as the same.
    """

    def __init__(self) -> None:
        self.requested = False
        self._number = signal.SIGTERM  # what a rank has had that stops because another one was asked to

    @property
    def exit_status(self) -> int:
        """What a shell reports of a process that this signal ended: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self._number

    def _request(self, number: int, *_: Any) -> None:
        self.requested, self._number = True, number

    def _listen(self, signals: int) -> None:
        first = None
        while number := os.read(signals, 1)[0]:
            if number not in self._previous:
                continue
            self._request(number)
            now = time.monotonic()
            first = first or now
            if now - first > SAME_SIGNAL:
                if speaks_for_run():
                    print('error: ended at once by a second signal', file=sys.stderr, flush=True)
                os._exit(128 + number)

    def __enter__(self) -> 'StopRequest':
        signals, self._pipe = os.pipe()
        if hasattr(os, 'set_blocking'):  # older Pythons on Windows have it not
            os.set_blocking(self._pipe, False)
        self._previous = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        self._wakeup = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(signals,), daemon=True)
        self._thread.start()
        self._signals = signals
        return self

    def __exit__(self, *_: Any) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.write(self._pipe, bytes(1))
        self._thread.join()
        os.close(self._pipe)
        os.close(self._signals)


def outlive_signals(_worker: int) -> None:
    """Keeps a data-loading worker alive through a signal to the whole process group: the parent ends it.

    SIGINT is left to the parent. SIGTERM is taken from the parent alone, who sends it at its exit to the workers that
    are left; one that lost its parent ends by itself (PyTorch looks for that).
    """
    signal.set_wakeup_fd(-1)  # a fork has the parent's
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, 'alarm'):  # Windows ends processes without signals
        return
    if not hasattr(signal, 'sigwaitinfo'):  # macOS does not tell who sent a signal
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_parents_signal, args=(multiprocessing.parent_process().pid,), daemon=True).start()


def _wait_for_parents_signal(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        continue
    os._exit(128 + signal.SIGTERM)
