"""At the end of a run only weights near a border move."""

import pytest
import torch
from helpers import TINY, assert_same, resume_after_an_epoch, run
from torch import nn

from _quan_base import LinearQ, block_weights
from checkpoints import create_from_checkpoint, read_checkpoint
from confidence import ConfidenceAnnealing, border_distance
from utils import UserError

pytestmark = pytest.mark.usefixtures('one_thread')


def layer_of(*positions: float) -> LinearQ:
    """One output of 2 bits, codes -2 to 1, with weights at the given positions in steps, in float64."""
    layer = LinearQ(len(positions), 1, weight_bits=2, act_bits=2, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([positions]) * 0.5)
    layer.set_steps(torch.tensor(0.5))
    return layer


def test_distance_to_the_nearest_border():
    layer = layer_of(0., 0.4, 0.6, -0.75, -1.5, 1., 3., -2.4, -9.)
    torch.testing.assert_close(border_distance(layer, layer.weight.detach())[0].tolist(),
                               [0.5, 0.1, 0.1, 0.25, 0., 0.5, 2.5, 0.9, 7.5])  # borders at -1.5, -0.5, 0.5


def test_confident_weights_stay_and_others_move_until_they_are():
    layer = layer_of(0., 0.45, -0.3)
    annealing = ConfidenceAnnealing(layer, 0.1, share=0.2)

    def move(progress: float) -> list[float]:
        with torch.no_grad():
            layer.weight += 0.5 * 0.08
        annealing.update(progress)
        return (layer.weight[0] / 0.5).tolist()

    assert move(0.5) == pytest.approx([0.08, 0.53, -0.22])
    assert move(0.79) == pytest.approx([0.16, 0.61, -0.14])
    assert move(0.8) == pytest.approx([0.16, 0.61, -0.14])
    layer = layer_of(0., 0.45, -0.3)
    annealing = ConfidenceAnnealing(layer, 0.1, share=0.2)
    assert move(1.) == pytest.approx([0., 0.53, -0.3])
    assert move(1.) == pytest.approx([0., 0.61, -0.3])
    assert move(1.) == pytest.approx([0., 0.61, -0.3])
    with pytest.raises(UserError, match='leave out --confidence-annealing'):
        ConfidenceAnnealing(nn.Linear(2, 2), 0.1)


def test_a_run_anneals_and_is_resumed_bit_for_bit(tmp_path):
    flags = (*TINY, '--epochs', 2, '--confidence-annealing', '0.05', '0.75', '--oscillation-freezing', '0.02')
    resumed, whole = resume_after_an_epoch(tmp_path, *flags)
    half = create_from_checkpoint(read_checkpoint(whole / '0-0.pth'))
    ours, expected = (read_checkpoint(folder / 'checkpoint.pth') for folder in (resumed, whole))
    for key in ('model', 'optimizer', 'oscillations'):
        assert_same(ours[key], expected[key], key)
    done = block_weights(create_from_checkpoint(expected))
    stayed = torch.cat([(done[name].weight == layer.weight).flatten() for name, layer in block_weights(half).items()])
    assert 0.5 < stayed.float().mean() < 1


@pytest.mark.parametrize('values', [('0',), ('0.5',), ('0.1', '1.5'), ('0.1', '0.1', '0.1')])
def test_refused_in_one_line(values, capsys):
    assert run(*TINY, '--confidence-annealing', *values) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'choose a range between 0 and 0.5, and a share of the run up to 1' in err
