"""The state of a training run: what an update changes, what a checkpoint holds, and how a run goes on from it."""

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from _quan_base import clamp_steps_
from checkpoints.networks import load_quantized
from training.methods.oscillation import Oscillations
from training.optimizer import build_optimizer
from utils import DivergedError, UserError, plain_args, rng_states, set_rng_state

# Flags that the learning rate of an epoch follows from.
SCHEDULE_FLAGS = ('sched', 'epochs', 'cooldown_epochs', 'warmup_epochs', 'warmup_lr', 'min_lr', 'decay_epochs',
                  'decay_rate', 'sched_on_updates', 'lr_noise', 'lr_noise_pct', 'lr_noise_std', 'scaled_lr')
# Flags that a position within an epoch depends on.
POSITION_FLAGS = ('batch_size', 'world_size', 'grad_accum_steps', 'repeated_aug', 'seed', 'data_set')


def build_scheduler(args: Namespace, optimizer: torch.optim.Optimizer) -> Scheduler:
    """The learning rate as a function of epochs."""
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=args.sched, num_epochs=args.epochs, decay_epochs=args.decay_epochs,
        decay_rate=args.decay_rate, min_lr=args.min_lr, warmup_lr=args.warmup_lr, warmup_epochs=args.warmup_epochs,
        noise=args.lr_noise, noise_pct=args.lr_noise_pct, noise_std=args.lr_noise_std, noise_seed=args.seed)
    return scheduler


@dataclass
class Training:
    """All that training changes.

    Attributes:
        model: the network outside any wrapper.
        epoch: the epoch in progress, or the next one.
        step: batches done of it. All of them: its evaluation is still due.
        max_accuracy: best top-1 so far, in percent; below 0 before the first evaluation.
        oscillations: of the weights; None where they are left to themselves.
        progress: share of the run that is done, in [0, 1], for what changes by the update.
        sched_on_updates: whether the learning rate does.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    device: torch.device
    epoch: int = 0
    step: int = 0
    max_accuracy: float = -1.
    oscillations: Oscillations | None = None
    progress: float = 0.
    sched_on_updates: bool = False

    def update(self, clip_grad: float | None, done: float) -> None:
        """One step of the optimizer by the gradients of the model, which are cleared. `done` of the epoch with it."""
        self.scaler.unscale_(self.optimizer)
        if clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        clamp_steps_(self.model)
        if self.oscillations is not None:
            self.oscillations.update(self.progress)
        if self.ema is not None:
            self.ema.update(self.model)
        if self.sched_on_updates:
            self.scheduler.step(self.epoch + done)  # timm's schedules are functions of any number of epochs

    def end_epoch(self) -> None:
        self.epoch, self.step = self.epoch + 1, 0
        self.schedule_epoch()

    def schedule_epoch(self) -> None:
        """Sets the learning rate with which `epoch` begins."""
        # By epochs, the schedule is asked for the epoch that ended, not for the next one: DeiT does so, and with it the
        # published runs. The first two epochs share one learning rate.
        if self.epoch:
            self.scheduler.step(self.epoch if self.sched_on_updates else self.epoch - 1)

    def checkpoint(self, args: Namespace, about: dict[str, Any]) -> dict[str, Any]:
        """The file's contents. A collective.

        Args:
            about: `checkpoints.description` of the network.

        Raises:
            DivergedError: a parameter is not finite; the checkpoint before is worth more than this one.
        """
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.model.parameters()]))
        if not torch.isfinite(norms).all():
            raise DivergedError(f'parameters are not finite in epoch {self.epoch}: lower --lr, or pass --clip-grad; '
                                'checkpoint.pth is from before')
        # 'epoch' counts as in released files: the last complete epoch, or the one that `step` batches of are done.
        state = {'model': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
                 'lr_scheduler': self.scheduler.state_dict(), 'epoch': self.epoch if self.step else self.epoch - 1,
                 'scaler': self.scaler.state_dict(), 'args': plain_args(args), 'qvit': about, 'step': self.step,
                 'max_accuracy': self.max_accuracy, 'rng': rng_states(self.device)}
        if self.ema is not None:
            state['model_ema'] = self.ema.module.state_dict()
        if self.oscillations is not None:
            state['oscillations'] = self.oscillations.state_dict()
        return state

    def resume(self, checkpoint: dict[str, Any], args: Namespace) -> list[str]:
        """Continues from a checkpoint, whose network must have been loaded: what it says of the rest of the state.

        Returns:
            What could not be taken, a line each.

        Raises:
            UserError: it was written within an epoch whose batches would be others now.
        """
        saved = vars(checkpoint['args']) if isinstance(checkpoint.get('args'), Namespace) else {}
        is_own, notes = 'qvit' in checkpoint, []
        self.step = checkpoint.get('step', 0)
        self.epoch = checkpoint.get('epoch', -1) + (self.step == 0)
        self.max_accuracy = checkpoint.get('max_accuracy', self.max_accuracy)
        if 'epoch' not in checkpoint:
            notes.append('epoch: not in the checkpoint, training starts with epoch 0')
        changed = _changed(POSITION_FLAGS, saved, args)
        if self.step and changed:
            raise UserError(f'the checkpoint lies within epoch {self.epoch}, which continues only with the same '
                            f'{", ".join(changed)}: pass these as before')

        other_opt = _changed(('opt',), saved, args) if is_own else ['not written by this code']
        changed = _changed(SCHEDULE_FLAGS, saved, args) if is_own else ['not written by this code']
        notes += self._resume_optimizer(checkpoint.get('optimizer'), other_opt, keep_lr=not changed)
        if not changed:
            self.scheduler.load_state_dict(checkpoint['lr_scheduler'])
        else:
            notes.append(f'lr_scheduler: not taken ({", ".join(changed)}), the learning rate follows from the epoch '
                         'and the flags of this run')
            self.schedule_epoch()

        if self.scaler.is_enabled():
            if checkpoint.get('scaler'):
                self.scaler.load_state_dict(checkpoint['scaler'])
            else:
                notes.append('scaler: not in the checkpoint, the loss scale starts anew')
        if self.ema is not None:
            if checkpoint.get('model_ema'):
                load_quantized(self.ema.module, {'model': checkpoint['model_ema']})
            else:
                self.ema.set(self.model)
                notes.append('model_ema: not in the checkpoint, the average starts from the model')
        elif checkpoint.get('model_ema'):
            notes.append('model_ema: not taken without --model-ema')
        if self.oscillations is not None:
            if checkpoint.get('oscillations'):
                self.oscillations.load_state_dict(checkpoint['oscillations'])
            else:
                notes.append('oscillations: not in the checkpoint, their frequencies start from zero')
        elif checkpoint.get('oscillations'):
            notes.append('oscillations: not taken without --oscillation-dampening or --oscillation-freezing, frozen '
                         'weights are free')
        if len(checkpoint.get('rng', ())) == args.world_size:
            set_rng_state(checkpoint['rng'][args.rank], self.device)
        else:
            notes.append(f'rng: no random states of {args.world_size} processes in the checkpoint, drop path and mixup '
                         'differ from those of an uninterrupted run')
        return notes

    def _resume_optimizer(self, state: dict[str, Any] | None, misfits: list[str], keep_lr: bool) -> list[str]:
        flags = ('weight_decay', 'initial_lr', 'lr_scale', 'betas', 'eps', 'momentum', *(() if keep_lr else ('lr',)))
        wanted = [{name: group[name] for name in flags if name in group} for group in self.optimizer.param_groups]
        try:
            if state is None or misfits:
                raise ValueError(', '.join(misfits) or 'not in the checkpoint')
            self.optimizer.load_state_dict(state)
        except (KeyError, ValueError) as error:
            return [f'optimizer: not taken ({" ".join(str(error).split())}), its moments start from zero']
        for group, values in zip(self.optimizer.param_groups, wanted, strict=True):
            group.update(values)  # flags win over the file, which differs from them only where the user changed them
        return []


def _changed(names: Iterable[str], saved: dict[str, Any], args: Namespace) -> list[str]:
    """The flags whose values differ from those in the checkpoint; one that it does not know was off."""
    now = vars(plain_args(args))
    return [f'--{name.replace("_", "-")}' for name in names
            if saved.get(name) != now[name] and not (name not in saved and now[name] is False)]


def build_training(args: Namespace, model: nn.Module, device: torch.device) -> Training:
    """The state at the start of `--start_epoch`, for a calibrated model on its device, not wrapped yet."""
    optimizer = build_optimizer(Namespace(**vars(args) | {'lr': args.scaled_lr}), model)
    scheduler = build_scheduler(args, optimizer)
    ema_device = 'cpu' if args.model_ema_force_cpu else None
    ema = ModelEmaV3(model, args.model_ema_decay, device=ema_device) if args.model_ema else None
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
    oscillations = None
    if args.oscillation_dampening or args.oscillation_freezing:
        oscillations = Oscillations(model, args.oscillation_dampening, args.oscillation_freezing)
    training = Training(model, optimizer, scheduler, scaler, ema, device, args.start_epoch, oscillations=oscillations,
                        sched_on_updates=args.sched_on_updates)
    training.schedule_epoch()
    return training
