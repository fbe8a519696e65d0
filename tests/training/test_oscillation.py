"""Oscillations of weights: what is counted, what is pulled, what is held; and that a run goes on with them."""

import math

import pytest
import torch
from helpers import TINY, assert_same, resume_after_an_epoch, run
from torch import nn

from _quan_base import LinearQ, clamp_steps_
from checkpoints.files import read_checkpoint
from training.methods.oscillation import OscillationConfig, Oscillations
from training.state import Training
from utils import UserError

pytestmark = pytest.mark.usefixtures('one_thread')


def layer_of(*weights: float, scale: float = 0.5, bits: int = 3) -> LinearQ:
    """A layer of one output with the given weights, in float64."""
    layer = LinearQ(len(weights), 1, weight_bits=bits, act_bits=bits, dtype=torch.float64)
    set_weights(layer, *weights)
    layer.set_qparams(torch.tensor(scale))
    return layer


def oscillations_of(model: nn.Module, dampening: float = 0., freezing: list[float] | None = None,
                    momentum: float = 0.01) -> Oscillations:
    return Oscillations(model, OscillationConfig(dampening, freezing), momentum)


def set_weights(layer: LinearQ, *weights: float) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weights]))


def follow(oscillations: Oscillations, layer: LinearQ, rows: list[list[float]], progress: float = 0.) -> None:
    """One update after another, each leading to the next row of weights, in units of the scale."""
    for row in rows:
        set_weights(layer, *(value * 0.5 for value in row))
        oscillations.after_update(progress)


def test_frequency_counts_changes_against_the_change_before():
    layer = layer_of(0., 0., 0., 0.)
    oscillations = oscillations_of(layer, momentum=0.25)
    # there and back at once; there and back with a rest between; on and on; never, though the weight moves
    follow(oscillations, layer, [[1, 1, 1, .1], [0, 1, 2, .4], [1, 0, 3, -.4]])
    state, = oscillations.states.values()
    after_two = 0.75 * 0.25 + 0.25  # at the second and the third update
    torch.testing.assert_close(state['frequency'], torch.tensor([[after_two, 0.25, 0., 0.]]))
    assert state['direction'].tolist() == [[1, -1, 1, 0]] and state['codes'].tolist() == [[1, 0, 3, 0]]
    mean = 0.
    for code in (1, 0, 1):
        mean = 0.75 * mean + 0.25 * code
    assert state['mean'][0, 0].item() == pytest.approx(mean)
    assert oscillations.shares()['']['oscillating'].item() == 0.5
    torch.testing.assert_close(layer.weight[0].tolist(), [0.5, 0., 1.5, -0.2])  # tracking alone changes nothing


def test_a_changed_scale_changes_codes_too():
    layer = layer_of(0.5)
    oscillations = oscillations_of(layer)
    for scale in (0.25, 0.5):
        layer.set_qparams(torch.tensor(scale))
        oscillations.after_update(0.)
    assert oscillations.states['']['frequency'].item() == pytest.approx(0.01)


def test_dampening_pulls_to_the_centre_of_the_code():
    layer = layer_of(0.6, -0.2, 1.5, 1.7, -2.4)  # codes 1, 0, 3 (its centre), 3 and -4 (outside: the range ends there)
    term = oscillations_of(layer, dampening=2.).dampening(1.)
    assert term.item() == pytest.approx(2 * (0.1 ** 2 + 0.2 ** 2))
    term.backward()
    torch.testing.assert_close(layer.weight.grad, 2 * 2 * torch.tensor([[0.1, -0.2, 0, 0, 0]]).double())
    assert layer.alpha.grad is None
    weights = [oscillations_of(layer, dampening=2.).dampening(share).item() for share in (0., 0.25, 0.5)]
    torch.testing.assert_close(weights, [term.item() * (1 - math.cos(math.pi * x)) / 2 for x in (0., 0.25, 0.5)])
    assert oscillations_of(layer, dampening=2.).loss_parts(1.)['loss_dampening'].item() == pytest.approx(term.item())
    assert oscillations_of(layer).loss_parts(1.) == {}


def test_the_parts_of_methods_are_added_to_the_loss_and_logged():
    layer = layer_of(0.6)
    training = Training(layer, None, None, None, None, torch.device('cpu'), [oscillations_of(layer, dampening=2.)])
    training.progress = 1.
    parts = training.add_methods_parts({'loss': torch.tensor(3.)})
    assert parts['loss'].item() == pytest.approx(3 + 2 * 0.1 ** 2) and parts['loss'].requires_grad
    assert parts['loss_dampening'].item() == pytest.approx(2 * 0.1 ** 2) and not parts['loss_dampening'].requires_grad


def test_a_weight_that_oscillates_too_often_is_held_at_its_mean_code():
    layer = layer_of(0., 0.)
    oscillations = oscillations_of(layer, freezing=[0.3], momentum=0.25)
    follow(oscillations, layer, [[1, 1], [0, 1]])  # frequency 0.25: not yet
    assert not oscillations.states['']['frozen'].any() and layer.weight[0, 0] == 0
    follow(oscillations, layer, [[1, 1]])
    state = oscillations.states['']
    assert state['frozen'].tolist() == [[True, False]] and state['mean'][0, 0] == 0  # mean 0.39, held at code 0
    assert layer.weight.tolist() == [[0., 0.5]]
    follow(oscillations, layer, [[3, 3]])
    assert layer.weight.tolist() == [[0., 1.5]]
    assert {key: value.item() for key, value in oscillations.shares()[''].items()} == {'oscillating': 0, 'frozen': 0.5}


def test_a_frozen_weight_follows_its_scale():
    layer = layer_of(1.0)
    oscillations = oscillations_of(layer, freezing=[0.3], momentum=0.25)
    follow(oscillations, layer, [[3], [2], [3]])
    assert oscillations.states['']['frozen'].item() and layer.weight.item() == 1.0  # code 2 at scale 0.5
    layer.set_qparams(torch.tensor(0.7, dtype=torch.float64))
    oscillations.after_update(0.)
    assert layer.weight.item() == pytest.approx(1.4, rel=1e-12) and layer.to_int().item() == 2


def test_the_threshold_may_fall():
    for progress, is_frozen in ((0., False), (0.5, False), (1., True)):
        layer = layer_of(0.)
        oscillations = oscillations_of(layer, freezing=[0.9, 0.3], momentum=0.25)
        follow(oscillations, layer, [[1], [0], [1]], progress)  # frequency 0.44
        assert oscillations.states['']['frozen'].item() is is_frozen


def test_edges_are_left_alone():
    model = nn.ModuleDict({'block': layer_of(0.), 'head': layer_of(0., bits=8)})
    assert list(oscillations_of(model).layers) == ['block']
    with pytest.raises(UserError, match='no weights of fewer than 8 bits'):
        oscillations_of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match='another network'):
        oscillations_of(model).load_state_dict(oscillations_of(layer_of(0., 0.)).state_dict())


def final_frequency(**options: object) -> float:
    """Mean frequency at the end of a regression whose best weights lie between two codes."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(1, 16, generator=generator, dtype=torch.float64)
    layer = layer_of(*[0.] * 16, scale=0.7)
    layer.act.set_qparams(torch.tensor(1e-3), torch.tensor(0.), signed=True)
    oscillations = oscillations_of(layer, **options)
    optimizer = torch.optim.SGD([layer.weight], lr=0.05)
    for update in range(300):
        loss = (layer.quantized_weight() + layer.weight - layer.weight.detach() - target).square().sum()
        optimizer.zero_grad()
        sum(oscillations.loss_parts(update / 300).values(), start=loss).backward()
        optimizer.step()
        clamp_steps_(layer)
        oscillations.after_update(update / 300)
    return oscillations.states['']['frequency'].mean().item()


def test_both_methods_calm_a_regression():
    free = final_frequency()
    assert free > 0.05
    assert final_frequency(dampening=5.) < 0.5 * free
    assert final_frequency(freezing=[0.02]) < 0.1 * free


# --- whole runs -------------------------------------------------------------------------------------------------------

FLAGS = (*TINY, '--epochs', 2, '--oscillation-dampening', '0.1', '--oscillation-freezing', '0.05', '0.01')


@pytest.mark.whole_run
def test_a_resumed_run_ends_bit_for_bit_alike(tmp_path, capsys):
    resumed, whole = resume_after_an_epoch(tmp_path, *FLAGS)
    assert 'loss_dampening: ' in capsys.readouterr().out
    assert all('train_loss_dampening' in line for line in (whole / 'log.txt').read_text().splitlines())
    ours, expected = (read_checkpoint(folder / 'checkpoint.pth') for folder in (resumed, whole))
    for key in ('model', 'optimizer', 'oscillations'):
        assert_same(ours[key], expected[key], key)
    states = expected['oscillations'].values()
    assert any(state['frozen'].any() for state in states) and not any(state['frozen'].all() for state in states)
    assert not any('frozen' in name or 'frequency' in name for name in expected['model'])

    capsys.readouterr()
    assert run(*TINY, '--epochs', 2, '--resume', whole / '0-0.pth', '--output_dir', tmp_path / 'free') == 0
    assert 'oscillations: not taken without' in capsys.readouterr().out
    assert run(*FLAGS, '--epochs', 3, '--resume', tmp_path / 'free' / 'checkpoint.pth') == 0
    assert 'oscillations: not in the checkpoint' in capsys.readouterr().out


@pytest.mark.parametrize(('flags', 'line'), [
    ('--oscillation-freezing 0', '--oscillation-freezing 0.0: choose one value between 0 and 1, or two'),
    ('--oscillation-freezing 0.3 0.2 0.1', 'choose one value between 0 and 1, or two'),
    ('--oscillation-dampening=-1', '--oscillation-dampening -1.0: choose a value of at least 0'),
    ('--oscillation-dampening 1 --model deit_tiny_distilled_patch16_224', 'leave out the --oscillation flags'),
])
def test_refused_in_one_line(flags, line, capsys):
    assert run(*TINY, *flags.split()) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and line in err
