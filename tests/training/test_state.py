"""The state of a run: optimizers of the smallest interface, half precision that overflows, and rates after a resume."""
from argparse import Namespace
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from _quan_base import LinearQ
from calibration.first_batch import calibrate
from checkpoints.networks import ModelInfo
from training.optimizer import OptimizerConfig
from training.resumption import Position, resume
from training.schedule import ScheduleConfig
from training.state import MOST_SKIPPED, Training, build_training
from utils import DivergedError, Ranks, UserError

CPU, INFO = torch.device('cpu'), ModelInfo('fourbits_deit_tiny_patch16_224')
POSITION = Position(4, 1, 1, False, 0, 'DIGITS')
BATCHES = 10


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(LinearQ(6, 5, weight_bits=4, act_bits=4), nn.LayerNorm(5))
    calibrate(model, torch.randn(8, 6))
    return model


def started(optimizer: OptimizerConfig, schedule: ScheduleConfig, **options) -> Training:
    return build_training(network(), CPU, optimizer, schedule, **options)


def step(training: Training, share_of_epoch: float = 1.) -> None:
    loss = training.model(torch.randn(4, 6)).square().mean()
    training.scaler.scale(loss).backward()
    training.update(None, share_of_epoch)


class Smallest:
    """An optimizer with no more than apex's documented interface."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.param_groups = [{'params': parameters, 'lr': 0.1}]

    def step(self, closure=None) -> None:
        with torch.no_grad():
            for parameter in self.param_groups[0]['params']:
                parameter -= 0.1 * parameter.grad

    def zero_grad(self) -> None:
        for parameter in self.param_groups[0]['params']:
            parameter.grad = None

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def test_an_optimizer_of_the_smallest_interface_makes_updates():
    training = started(OptimizerConfig('sgd'), ScheduleConfig(epochs=1, warmup_epochs=0))
    training.optimizer = Smallest(list(training.model.parameters()))
    before = training.model[0].weight.detach().clone()
    step(training)
    assert not torch.equal(training.model[0].weight, before)
    assert all(parameter.grad is None for parameter in training.model.parameters())


# --- fp16 -------------------------------------------------------------------------------------------------------------


def overflowing(training: Training) -> None:
    """An update whose gradients are infinite."""
    for parameter in training.model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    training.scaler.scale(torch.zeros(()))  # as for a loss
    training.update(None, 1.)


def test_updates_that_overflow_are_skipped_counted_and_recovered_from():
    training = started(OptimizerConfig('sgd', 0.1), ScheduleConfig(epochs=1, warmup_epochs=0), amp='fp16')
    before = training.model[0].weight.detach().clone()
    for _ in range(3):
        overflowing(training)
    assert training.skipped == 3 and torch.equal(training.model[0].weight, before)
    step(training)
    assert training.skipped == 3 and not torch.equal(training.model[0].weight, before)
    training.end_epoch()
    assert training.skipped == 0


def test_a_run_that_never_updates_ends_in_a_line():
    training = started(OptimizerConfig('sgd', 0.1), ScheduleConfig(epochs=1, warmup_epochs=0), amp='fp16')
    with pytest.raises(DivergedError, match=f'{MOST_SKIPPED} updates in a row were skipped.*--amp bf16') as caught:
        for _ in range(MOST_SKIPPED + 1):
            overflowing(training)
    assert '\n' not in str(caught.value) and training.skipped == MOST_SKIPPED


# --- learning rates after a resume ------------------------------------------------------------------------------------


def rates(training: Training) -> list[float]:
    """The rate of every group, in units of its own scale."""
    return [group['lr'] / group.get('lr_scale', 1.) for group in training.optimizer.param_groups]


@pytest.mark.parametrize('changes', [{}, {'weight_decay': 0.05}, {'step_lr_scale': 0.1}, {'opt': 'sgd'},
                                     {'weight_decay': 0.05, 'step_lr_scale': 0.1}], ids=str)
@pytest.mark.parametrize('on_updates', [False, True])
@pytest.mark.parametrize(('epoch', 'batches_done'), [(0, 3), (2, 0), (2, 4), (4, BATCHES)])
def test_every_group_has_the_rate_of_the_epoch_whatever_the_optimizer_was(changes, on_updates, epoch, batches_done):
    """The rate is that of an uninterrupted run of the present flags, at the same place."""
    schedule = ScheduleConfig(epochs=6, warmup_epochs=0, min_lr=0., sched_on_updates=on_updates, scaled_lr=0.1)
    first = OptimizerConfig('adamw', 0.1, weight_decay=0.)
    interrupted, whole = started(first, schedule), started(OptimizerConfig(**vars(first) | changes), schedule)
    for training in (interrupted, whole):
        for _ in range(epoch):
            step(training)
            training.end_epoch()
        for batch in range(batches_done):
            step(training, (batch + 1) / BATCHES)
            training.batches_done = batch + 1
    saved = type('Flags', (), {})()
    vars(saved).update(vars(schedule) | vars(first) | vars(POSITION))
    checkpoint = interrupted.checkpoint(saved, INFO)

    config = OptimizerConfig(**vars(first) | changes)
    resumed = started(config, schedule)
    resume(resumed, checkpoint, POSITION, config, schedule, Ranks(), BATCHES)
    assert (resumed.epoch, resumed.batches_done) == (epoch, batches_done)
    assert rates(resumed) == rates(whole)
    for training in (resumed, whole):
        step(training)
        training.end_epoch()
    assert rates(resumed) == rates(whole)


def test_options_of_another_library_do_not_come_with_its_state():
    config, schedule = OptimizerConfig('fusedlamb', 0.1, weight_decay=0.), ScheduleConfig(epochs=2, warmup_epochs=0)
    saved = type('Flags', (), {})()
    vars(saved).update(vars(schedule) | vars(config) | vars(POSITION))
    training = started(config, schedule)
    step(training)
    checkpoint = training.checkpoint(saved, INFO)
    for group in checkpoint['optimizer']['param_groups']:  # as apex writes it
        group.pop('trust_clip')
        group |= {'bias_correction': 1, 'adam_w_mode': 1, 'use_nvlamb': False}
    resumed = started(config, schedule)
    assert resume(resumed, checkpoint, POSITION, config, schedule, Ranks(), BATCHES) == []
    assert resumed.optimizer.param_groups[0]['trust_clip'] is False
    assert resumed.optimizer.param_groups[0]['step'] == 1
    step(resumed)


# --- a resume ---------------------------------------------------------------------------------------------------------


def saved(training: Training, done: int, **flags) -> dict:
    """A checkpoint of the run after `done` batches of epoch 1, which has 10."""
    training.epoch, training.batches_done, training.skipped = 1, done, 3
    training.meters = {'loss': (7.5, done), 'lr': (0.5, done)}
    state = training.checkpoint(Namespace(**asdict(POSITION) | flags), INFO, BATCHES)
    return state | {'rng': state['rng'] * flags.get('world_size', 1)}


@pytest.mark.parametrize('world_size', [1, 2])
def test_where_only_the_evaluation_is_due_other_ranks_go_on(world_size):
    config = OptimizerConfig('sgd', 0.1), ScheduleConfig(epochs=3, warmup_epochs=0)
    state = saved(started(*config), BATCHES, world_size=2)
    state['within_epoch']['meters'] *= 2
    training = started(*config)
    position = replace(POSITION, world_size=world_size)
    resume(training, state, position, *config, Ranks(0, world_size), 20)
    assert (training.epoch, training.batches_done, training.skipped) == (1, 20, 3)
    times = 3 - world_size  # a single rank has the sums of both
    assert training.meters == {'loss': (7.5 * times, BATCHES * times), 'lr': (0.5 * times, BATCHES * times)}
    training.end_epoch()
    assert training.meters == {} and 'within_epoch' not in training.checkpoint(None, INFO, 20)


def test_other_ranks_cannot_take_up_an_epoch_in_the_middle():
    config = OptimizerConfig('sgd', 0.1), ScheduleConfig(epochs=3, warmup_epochs=0)
    state = saved(started(*config), BATCHES - 1, world_size=2)
    with pytest.raises(UserError, match='within epoch 1, which continues only with the same --world-size'):
        resume(started(*config), state, POSITION, *config, Ranks(0, 1), BATCHES)


@pytest.mark.parametrize(('before', 'now', 'says'), [
    (True, False, 'C++ kernels and goes on in plain PyTorch'),
    (False, True, 'plain PyTorch and goes on in C++ kernels'), (True, True, None), (None, True, None)])
def test_other_kernels_than_before_are_said(before, now, says):
    config = OptimizerConfig('sgd', 0.1), ScheduleConfig(epochs=3, warmup_epochs=0)
    state = saved(started(*config), 0, **{} if before is None else {'native_kernels': before})
    notes = [note for note in resume(started(*config), state, POSITION, *config, Ranks(), BATCHES, native_kernels=now)
             if note.startswith('native_kernels')]
    assert len(notes) == (says is not None) and all(says in note for note in notes)


@pytest.mark.parametrize('sched', ['cosine', 'tanh', 'step', 'poly'])
def test_a_noisy_learning_rate_goes_on_as_uninterrupted(sched):
    """The noise is drawn from the seed and the epoch, not from what was drawn before."""
    config = OptimizerConfig('sgd', 0.1), ScheduleConfig(sched, 12, warmup_epochs=0, decay_epochs=3, scaled_lr=0.1,
                                                         lr_noise=[0.2, 0.9])
    whole, rates = started(*config, seed=5), []
    for _ in range(12):
        rates.append(whole.optimizer.param_groups[0]['lr'])
        whole.end_epoch()
    plain = started(config[0], replace(config[1], lr_noise=None), seed=5)
    for epoch in range(12):
        resumed = started(*config, seed=5)
        resumed.schedule.continue_within(epoch, 0.5)
        assert resumed.optimizer.param_groups[0]['lr'] == rates[epoch]
        plain.schedule.begin_epoch(epoch)
        assert (plain.optimizer.param_groups[0]['lr'] == rates[epoch]) == (not 4 <= epoch <= 11), epoch
