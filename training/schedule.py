"""The learning rate of a training run as a function of its epochs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler import create_scheduler_v2

__all__ = ['Schedule', 'ScheduleConfig']


@dataclass(frozen=True)
class ScheduleConfig:
    """Everything that the learning rate of an epoch follows from, in timm's values.

    Attributes:
        sched_on_updates: the rate changes at every update, not at every epoch.
        scaled_lr: the rate that the optimizer starts with. A run that goes on with another one has another schedule.
    """
    sched: str = 'cosine'
    epochs: int = 300
    cooldown_epochs: int = 0
    warmup_epochs: int = 5
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    decay_epochs: float = 30
    decay_rate: float = 0.1
    sched_on_updates: bool = False
    lr_noise: Sequence[float] | None = None
    lr_noise_pct: float = 0.67
    lr_noise_std: float = 1.
    scaled_lr: float = 5e-4


class Schedule:
    """Sets the learning rate of every group of an optimizer, at every epoch or at every update.

    The rate is a function of the flags, the epoch and the update. So it is computed, also by a run that is resumed, and
    never read from a checkpoint.

    Args:
        seed: of the noise.
    """

    def __init__(self, config: ScheduleConfig, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
        self.on_updates = config.sched_on_updates
        self._schedule, _ = create_scheduler_v2(
            optimizer, sched=config.sched, num_epochs=config.epochs, decay_epochs=config.decay_epochs,
            decay_rate=config.decay_rate, min_lr=config.min_lr, warmup_lr=config.warmup_lr,
            warmup_epochs=config.warmup_epochs, noise=config.lr_noise, noise_pct=config.lr_noise_pct,
            noise_std=config.lr_noise_std, noise_seed=seed)
        self._optimizer, self._first = optimizer, [group['lr'] for group in optimizer.param_groups]

    def begin_epoch(self, epoch: int) -> None:
        """Sets the learning rate with which the epoch begins."""
        # By epochs, the schedule is asked for the epoch that ended, not for the next one: DeiT does so, and with it the
        # published runs. The first two epochs share one learning rate.
        if epoch:
            self._schedule.step(epoch if self.on_updates else epoch - 1)
            return
        for group, rate in zip(self._optimizer.param_groups, self._first, strict=True):
            group['lr'] = rate

    def after_update(self, epochs_done: float) -> None:
        """Sets the learning rate of the next update, of which it is known how many epochs are done before it."""
        if self.on_updates:
            self._schedule.step(epochs_done)  # timm's schedules are functions of any number of epochs

    def continue_within(self, epoch: int, share_of_epoch: float) -> None:
        """Sets the learning rate of an epoch of which a share is done, in [0, 1]."""
        self.begin_epoch(epoch)
        if share_of_epoch:
            self.after_update(epoch + share_of_epoch)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint's `lr_scheduler`, which other programs may read."""
        return self._schedule.state_dict()
