"""The state of a training run: what an update changes, and what a checkpoint holds of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from _quan_base import clamp_steps_
from checkpoints.files import write_checkpoint
from checkpoints.networks import ModelInfo
from training.methods import Method
from training.optimizer import OptimizerConfig, build_optimizer
from training.schedule import Schedule, ScheduleConfig
from utils import DivergedError, from_all_ranks, rng_states

# The loss scale is halved at each skipped update: after so many in a row it is below any that helps.
MOST_SKIPPED = 50

__all__ = ['Averaging', 'CheckpointFolder', 'Training', 'build_training']


@dataclass(frozen=True)
class Averaging:
    """Whether and how the weights are averaged over time, and where the average lies.

    With `model_ema_warmup` the decay rises to its value by the number of updates, as timm's `ModelEmaV3` has it.
    """
    model_ema: bool = False
    model_ema_decay: float = 0.99996
    model_ema_force_cpu: bool = False
    model_ema_warmup: bool = False


@dataclass
class Training:
    """All that training changes.

    Attributes:
        model: the network outside any wrapper.
        ema: its average; None without.
        methods: what takes part in training besides.
        epoch: the epoch in progress, or the next one.
        batches_done: of that epoch. If it is all of them, the evaluation is still due.
        max_accuracy: best top-1 so far, in percent; below 0 before the first evaluation.
        progress: share of the run that is done, in [0, 1], for what changes by the update.
        skipped: updates of this epoch that were skipped because gradients overflowed in half precision.
        updates: since the run began, skipped ones included.
        meters: what the log says of this epoch's batches so far, as sums over those of this rank.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    device: torch.device
    methods: Sequence[Method] = ()
    epoch: int = 0
    batches_done: int = 0
    max_accuracy: float = -1.
    progress: float = field(default=0., init=False)
    skipped: int = field(default=0, init=False)
    updates: int = field(default=0, init=False)
    meters: dict[str, tuple[float, int]] = field(default_factory=dict, init=False)
    _skipped_in_a_row: int = field(default=0, init=False)

    @property
    def n_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def add_methods_parts(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parts of a loss with those of the methods, which are added to 'loss' as well."""
        for method in self.methods:
            for name, part in method.loss_parts(self.progress).items():
                parts = parts | {'loss': parts['loss'] + part, name: part.detach()}
        return parts

    def update(self, clip_grad: float | None, share_of_epoch: float) -> None:
        """Moves the parameters by the gradients of the model, which are then cleared.

        Args:
            clip_grad: largest norm of the gradient; None for any.
            share_of_epoch: that is done with this update, in (0, 1].

        Raises:
            DivergedError: nothing can be learned, because every update is skipped.
        """
        self.scaler.unscale_(self.optimizer)
        if clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip_grad)
        for method in self.methods:
            method.before_update()
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._count_skipped(self.scaler.get_scale() < scale)
        self.optimizer.zero_grad()  # some optimizers take no argument here
        clamp_steps_(self.model)
        for method in self.methods:
            method.after_update(self.progress)
        self.updates += 1
        if self.ema is not None:
            self.ema.update(self.model, self.updates if self.ema.use_warmup else None)
        self.schedule.after_update(self.epoch + share_of_epoch)

    def _count_skipped(self, is_skipped: bool) -> None:
        self.skipped += is_skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if is_skipped else 0
        if self._skipped_in_a_row == MOST_SKIPPED:
            raise DivergedError(f'{MOST_SKIPPED} updates in a row were skipped by batch {self.batches_done} of epoch '
                                f'{self.epoch}, because gradients overflow in half precision: pass --amp bf16 or none, '
                                'or lower --lr')

    def take_accuracy(self, accuracy: float) -> bool:
        """Notes an epoch's top-1, in percent, and says whether it is the best so far."""
        is_best = accuracy > self.max_accuracy
        self.max_accuracy = max(self.max_accuracy, accuracy)
        return is_best

    def end_epoch(self) -> None:
        self.epoch, self.batches_done, self.skipped, self.meters = self.epoch + 1, 0, 0, {}
        self.schedule.begin_epoch(self.epoch)

    def checkpoint(self, saved_args: object, info: ModelInfo, batches: int | None = None) -> dict[str, Any]:
        """The file's contents. A collective.

        Args:
            saved_args: what the file is to say of the flags.
            info: the description of the network.
            batches: how many an epoch has.

        Raises:
            DivergedError: a parameter is not finite; the checkpoint before is worth more than this one.
        """
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.model.parameters()]))
        if not torch.isfinite(norms).all():
            raise DivergedError(f'parameters are not finite in epoch {self.epoch}: lower --lr, or pass --clip-grad; '
                                'checkpoint.pth is from before')
        # 'epoch' counts as in released files: it is the last complete epoch, or the one of whose batches some are done.
        state = {'model': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
                 'lr_scheduler': self.schedule.state_dict(),
                 'epoch': self.epoch if self.batches_done else self.epoch - 1,
                 'scaler': self.scaler.state_dict(), 'args': saved_args, 'qvit': info.to_dict(),
                 'step': self.batches_done, 'max_accuracy': self.max_accuracy, 'rng': rng_states(self.device)}
        if self.batches_done:
            meters = from_all_ranks({name: list(seen) for name, seen in self.meters.items()})
            state['within_epoch'] = {'batches': batches, 'skipped': self.skipped, 'meters': meters}
        if self.ema is not None:
            state['model_ema'] = self.ema.module.state_dict()
        return state | {method.name: method.state_dict() for method in self.methods}


def build_training(model: nn.Module, device: torch.device, optimizer: OptimizerConfig, schedule: ScheduleConfig,
                   averaging: Averaging | None = None, methods: Sequence[Method] = (), *, amp: str = 'none',
                   seed: int = 0, start_epoch: int = 0) -> Training:
    """The state at the start of an epoch, for a calibrated model on its device, not wrapped yet.

    Args:
        averaging: None for no average of the weights.
        amp: with 'fp16' the loss is scaled.
        seed: of the learning rate's noise.
    """
    built = build_optimizer(optimizer, model)
    ema = None
    if averaging is not None and averaging.model_ema:
        ema = ModelEmaV3(model, averaging.model_ema_decay, use_warmup=averaging.model_ema_warmup,
                         device='cpu' if averaging.model_ema_force_cpu else None)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == 'fp16')
    training = Training(model, built, Schedule(schedule, built, seed), scaler, ema, device, methods, start_epoch)
    training.schedule.begin_epoch(start_epoch)
    return training


@dataclass(frozen=True)
class CheckpointFolder:
    """Where the checkpoints of a run go, and what each says of the run besides its state.

    Attributes:
        is_writer: whether this rank writes them; the others take part in gathering the state.
        saved_args, info, batches: see `Training.checkpoint`.
    """
    path: Path
    is_writer: bool
    saved_args: object
    info: ModelInfo
    batches: int | None = None

    def save(self, training: Training, *names: str) -> None:
        """Writes the state of now under each of the names. A collective."""
        state = training.checkpoint(self.saved_args, self.info, self.batches)
        for name in names if self.is_writer else ():
            write_checkpoint(state, self.path / name)
