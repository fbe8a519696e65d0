"""How a training run goes on from a checkpoint, and what it says of the parts that it cannot take."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from checkpoints.entries import check_entries, check_moments
from checkpoints.files import local_file
from checkpoints.networks import load_quantized
from files.paths import checksum
from training.methods.registry import METHODS
from training.optimizer import OptimizerConfig
from training.schedule import ScheduleConfig
from training.state import Training
from utils import Ranks, UserError, set_rng_state

__all__ = ['SOURCES', 'Position', 'check_sources', 'resume', 'resume_and_say', 'sources_of']

FOREIGN = ['not written by this code']
SOURCES = ('finetune', 'teacher_path', 'soft_labels', 'class_map')  # what a run is made of, by flag


@dataclass(frozen=True)
class Position:
    """Everything that the batches of an epoch follow from, so that a place among them means the same."""
    batch_size: int
    world_size: int
    grad_accum_steps: int
    repeated_aug: bool
    seed: int
    data_set: str


def sources_of(flags: Mapping[str, Any]) -> dict[str, str]:
    """The checksums of the files that the flags name as a run's sources, by flag."""
    return {name: checksum(local_file(flags[name])) for name in SOURCES if flags.get(name)}


def check_sources(path: str, checkpoint: dict[str, Any], flags: Mapping[str, Any], is_asked_for: bool,
                  ) -> dict[str, str]:
    """Looks whether the files that the flags name are still those that the run of the checkpoint is made of.

    Args:
        path: of the checkpoint.
        is_asked_for: the user named it, and so is warned only; `--resume auto` would continue unseen what a repeated
            command line is no longer about.

    Returns:
        The checksums of the run's sources; where the flags name none, those that the checkpoint says.

    Raises:
        UserError: one of them has other contents than when the run began.
    """
    before = getattr(checkpoint.get('args'), '__dict__', {}).get('sources')
    before = before if isinstance(before, dict) else {}
    sources = sources_of(flags)
    for name in sources:
        if name in before and before[name] != sources[name]:
            changed = f'--{name.replace("_", "-")} {flags[name]} is another file than the one that {path} was made of'
            if not is_asked_for:
                raise UserError(f'--resume auto: {changed}: name another --output_dir to start anew, or '
                                f'--resume {path} to go on with it all the same')
            print(f'warning: {changed}')
    return before | sources


def resume(training: Training, checkpoint: dict[str, Any], position: Position, optimizer: OptimizerConfig,
           schedule: ScheduleConfig, ranks: Ranks, batches: int, native_kernels: bool | None = None,
           is_stream: bool = False) -> list[str]:
    """Continues from a checkpoint, whose network must have been loaded: takes what it says of the rest of the state.

    Args:
        position, optimizer, schedule: those of this run, to be compared with what the checkpoint says of its own.
        batches: how many an epoch of this run has.
        native_kernels: whether its quantizers run in C++; None for either.
        is_stream: its images can only be read from the first of an epoch on.

    Returns:
        What could not be taken, a line each.

    Raises:
        UserError: it was written within an epoch whose batches would be others now, or an entry of it is damaged.
    """
    check_entries(checkpoint, 'the checkpoint')
    # A Namespace, where the file is of this project or of DeiT.
    saved = getattr(checkpoint.get('args'), '__dict__', {})
    is_own = 'qvit' in checkpoint
    other_optimizer = _changed({'opt': optimizer.opt}, saved) if is_own else FOREIGN
    other_schedule = _changed(asdict(schedule), saved) if is_own else FOREIGN
    notes = _resume_position(training, checkpoint, _changed(asdict(position), saved), ranks, batches, is_stream)
    training.updates = (training.epoch * math.ceil(batches / position.grad_accum_steps)
                        + math.ceil(training.batches_done / position.grad_accum_steps))
    return [*notes,
            *_resume_kernels(native_kernels, saved),
            *_resume_optimizer(training, checkpoint.get('optimizer'), other_optimizer),
            *_resume_schedule(training, other_schedule, batches),
            *_resume_scaler(training, checkpoint.get('scaler')),
            *_resume_average(training, checkpoint.get('model_ema')),
            *_resume_methods(training, checkpoint),
            *_resume_randomness(training, checkpoint.get('rng', ()), ranks)]


def resume_and_say(path: str, training: Training, checkpoint: dict[str, Any], position: Position,
                   optimizer: OptimizerConfig, schedule: ScheduleConfig, ranks: Ranks, batches: int,
                   native_kernels: bool | None = None, is_stream: bool = False) -> None:
    """`resume` from the checkpoint of that path; says what could not be taken, and where the run goes on."""
    for note in resume(training, checkpoint, position, optimizer, schedule, ranks, batches, native_kernels,
                       is_stream):
        print(f'{path}: {note}')
    if training.epoch >= schedule.epochs + schedule.cooldown_epochs:
        print(f'{path}: all {training.epoch} epochs are done, a larger --epochs would go on')
    else:
        print(f'{path}: continuing at epoch {training.epoch}, batch {training.batches_done}')


def _changed(flags: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """The flags whose values differ from those in the checkpoint; one that it does not know was off."""
    return [f'--{name.replace("_", "-")}' for name, value in flags.items()
            if saved.get(name) != value and not (name not in saved and value is False)]


def _resume_position(training: Training, checkpoint: dict[str, Any], changed: list[str], ranks: Ranks,
                     batches: int, is_stream: bool) -> list[str]:
    training.batches_done = checkpoint.get('step', 0)
    training.epoch = checkpoint.get('epoch', -1) + (training.batches_done == 0)
    training.max_accuracy = checkpoint.get('max_accuracy', training.max_accuracy)
    within = checkpoint.get('within_epoch')
    if is_stream and 0 < training.batches_done < (within or {}).get('batches', batches):
        done, training.batches_done = training.batches_done, 0
        return [f'step: {done} batches of epoch {training.epoch} were done, which begins anew: its images cannot be '
                'skipped']
    # Where only the evaluation is due, other ranks would take up no batch in the middle.
    if within and training.batches_done == within['batches'] and changed in ([], ['--world-size']):
        training.batches_done = batches
    elif training.batches_done and changed:
        raise UserError(f'the checkpoint lies within epoch {training.epoch}, which continues only with the same '
                        f'{", ".join(changed)}: pass these as before')
    if training.batches_done > batches:
        raise UserError(f'the checkpoint has {training.batches_done} batches of its epoch done, an epoch has '
                        f'{batches}: it is damaged, or of other data')
    if within:
        training.skipped, training.meters = within['skipped'], _meters_of(within['meters'], ranks)
    elif training.batches_done:
        return [f'log: the averages of epoch {training.epoch} are not in the checkpoint, they start anew']
    return [] if 'epoch' in checkpoint else ['epoch: not in the checkpoint, training starts with epoch 0']


def _meters_of(saved: list[dict[str, list[float]]], ranks: Ranks) -> dict[str, tuple[float, int]]:
    """A rank's own sums; where the ranks were others, rank 0 has those of all."""
    if len(saved) == ranks.world_size:
        return {name: (total, count) for name, (total, count) in saved[ranks.rank].items()}
    share = ranks.rank == 0
    return {name: (sum(meters[name][0] for meters in saved) * share, sum(meters[name][1] for meters in saved) * share)
            for name in saved[0]}


def _resume_optimizer(training: Training, state: dict[str, Any] | None, misfits: list[str]) -> list[str]:
    # What the optimizer of this run was built with wins over the file: flags that the user changed, and options of its
    # library. So a run that was made with apex's LAMB goes on with timm's, and the reverse.
    wanted = [{name: value for name, value in group.items() if name != 'params'}
              for group in training.optimizer.param_groups]
    try:
        if state is None or misfits:
            raise ValueError(', '.join(misfits) or 'not in the checkpoint')
        check_moments(training.optimizer, state, 'the checkpoint')
        training.optimizer.load_state_dict(state)
    except UserError:
        raise
    except (KeyError, ValueError) as error:
        return [f'optimizer: not taken ({" ".join(str(error).split())}), its moments start from zero']
    for group, values in zip(training.optimizer.param_groups, wanted, strict=True):
        group.update(values)
    return []


def _resume_schedule(training: Training, misfits: list[str], batches: int) -> list[str]:
    training.schedule.continue_within(training.epoch, training.batches_done / batches)
    if not misfits:
        return []
    return [f'lr_scheduler: not taken ({", ".join(misfits)}), the learning rate follows from the epoch and the flags '
            'of this run']


def _resume_kernels(native: bool | None, saved: dict[str, Any]) -> list[str]:
    before = saved.get('native_kernels')
    if native is None or before is None or bool(before) == native:
        return []
    names = {True: 'C++ kernels', False: 'plain PyTorch'}
    return [f'native_kernels: the run had its quantizers in {names[bool(before)]} and goes on in {names[native]}, not '
            'bit for bit as if never interrupted']


def _resume_scaler(training: Training, state: dict[str, Any] | None) -> list[str]:
    if not training.scaler.is_enabled():
        return []
    if not state:
        return ['scaler: not in the checkpoint, the loss scale starts anew']
    training.scaler.load_state_dict(state)
    return []


def _resume_average(training: Training, state: dict[str, Any] | None) -> list[str]:
    if training.ema is None:
        return ['model_ema: not taken without --model-ema'] if state else []
    if not state:
        training.ema.set(training.model)
        return ['model_ema: not in the checkpoint, the average starts from the model']
    load_quantized(training.ema.module, {'model': state})
    return []


def _resume_methods(training: Training, checkpoint: dict[str, Any]) -> list[str]:
    notes = []
    used = {method.name: method for method in training.methods}
    for kind in METHODS:
        state = checkpoint.get(kind.name)
        if kind.name in used and state:
            used[kind.name].load_state_dict(state)
        elif kind.name in used:
            notes.append(f'{kind.name}: not in the checkpoint, {kind.without_state}')
        elif state:
            notes.append(f'{kind.name}: {kind.left_out}')
    return notes


def _resume_randomness(training: Training, states: list[dict[str, Any]], ranks: Ranks) -> list[str]:
    if len(states) == ranks.world_size:
        set_rng_state(states[ranks.rank], training.device)
        return []
    return [f'rng: no random states of {ranks.world_size} processes in the checkpoint, drop path and mixup differ from '
            'those of an uninterrupted run']
