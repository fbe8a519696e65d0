"""What training says of the quantizers: the numbers, and the warnings."""

import pytest
import timm
import torch
from helpers import TINY, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import quant_vision_transformer  # noqa: F401  registers the variants
from _quan_base import named_quantizers
from analysis.codes import code_statistics
from calibration.first_batch import calibrate
from training.diagnostics import Diagnostics, warning_lines
from training.methods import Method
from training.methods.oscillation import OscillationConfig, Oscillations, block_weights

pytestmark = pytest.mark.usefixtures('one_thread')


def images() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()


def calibrated() -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model('fourbits_deit_tiny_patch16_224', img_size=16, patch_size=8, num_classes=10, embed_dim=24,
                              depth=1, num_heads=2).double()
    calibrate(model, images())
    return model


def test_the_numbers_are_those_of_the_figures():
    model = calibrated().train()
    found, expected = Diagnostics(model, images()).measure(), code_statistics(model, images())
    assert list(found) == list(expected) == [name for name, _ in named_quantizers(model)]
    for name, item in expected.items():
        numbers = {'step': item.scale, 'clipped': item.clipped, 'dead': item.dead, 'entropy': item.distribution.entropy}
        numbers |= {} if item.zero_point is None else {'zero_point': item.zero_point}
        assert {key: value for key, value in found[name].items() if key != 'changed'} == numbers, name
    assert 'zero_point' in found['head.act'] and 'zero_point' not in found['head'] and model.training
    assert 1 < found['blocks.0.attn.q_act']['entropy'] < 4
    assert found['head.act']['step'] == pytest.approx(model.head.act.alpha.mean().item())


def test_a_network_without_quantizers_has_no_numbers():
    diagnostics = Diagnostics(torch.nn.Linear(2, 2).double(), torch.zeros(1, 2).double())
    assert diagnostics.measure() == {} and warning_lines(diagnostics.model, {}, 1.) == []


def test_codes_that_changed_since_the_last_epoch():
    model = calibrated()
    diagnostics = Diagnostics(model, images())
    layer = block_weights(model)['blocks.0.mlp.fc2']
    with torch.no_grad():
        layer.weight[:6] += 2 * layer.alpha[:6, None] * torch.where(layer.to_int()[:6] > 0, -1, 1)
    found = diagnostics.measure()
    assert found['blocks.0.mlp.fc2']['changed'] == 0.25 and found['blocks.0.mlp.fc1']['changed'] == 0
    assert 'changed' not in found['head'] and 'oscillating' not in found['blocks.0.mlp.fc2']
    assert diagnostics.measure()['blocks.0.mlp.fc2']['changed'] == 0

    oscillations = Oscillations(model, OscillationConfig())
    oscillations.states['blocks.0.mlp.fc2']['frequency'][:12] = 0.1
    oscillations.states['blocks.0.mlp.fc2']['frozen'][:6] = True
    entry = Diagnostics(model, images(), [Method(), oscillations]).measure()['blocks.0.mlp.fc2']
    assert (entry['oscillating'], entry['frozen']) == (0.25, 0.25) and 'changed' not in entry
    assert 'changed' in Diagnostics(model, images(), [Method()]).measure()['blocks.0.mlp.fc2']


def test_a_warning_names_the_worst_place_and_what_to_try():
    model = calibrated()
    found = Diagnostics(model, images()).measure()
    quiet = {name: entry | {'entropy': 3., 'clipped': 0.1, 'dead': 0.05, 'changed': 0.9} for name, entry in
             found.items()}
    assert warning_lines(model, quiet, 0.5) == []  # codes may change in the first half
    quiet = {name: entry | {'changed': 0.1} for name, entry in quiet.items()}
    assert warning_lines(model, quiet, 1.) == []

    def changed(**entries: dict[str, float]) -> dict:
        return {name: entry | entries.get(name.split('.')[-1], {}) for name, entry in quiet.items()}

    assert warning_lines(model, changed(q_act={'entropy': 1.2}, k_act={'entropy': 1.9}, attn_act={'entropy': 0.}), 1.
                         ) == ['warning: blocks.0.attn.q_act (and 1 more) uses 1.2 of 4 bits: try a start by '
                               '--finetune and --calibration mse, or a lower --lr']
    line, = warning_lines(model, changed(q_act={'entropy': 1.2}), 1., is_fitted=True)
    assert line.endswith('uses 1.2 of 4 bits: try a lower --lr')
    line, = warning_lines(model, changed(v_act={'clipped': 0.8}), 1.)
    assert line.startswith('warning: blocks.0.attn.v_act clips 80% of its values: try a start by --finetune and ')
    line, = warning_lines(model, changed(fc2={'dead': 0.3}), 1.)
    assert line.startswith('warning: blocks.0.mlp.fc2 has one code only in 30% of its channels: try ')
    line, = warning_lines(model, changed(fc1={'oscillating': 0.4}), 1.)
    assert line.startswith('warning: blocks.0.mlp.fc1 has 40% of its weights oscillating: try --oscillation-dampening')
    line, = warning_lines(model, changed(fc1={'changed': 0.4}), 0.6)
    assert 'changed 40% of its codes in this epoch' in line


@pytest.mark.whole_run
def test_a_run_writes_and_warns(tmp_path, capsys):
    """At a learning rate that ruins a network, without a teacher."""
    assert run(*TINY, '--epochs', 1, '--lr', '3', '--output_dir', tmp_path) == 0
    said = capsys.readouterr().out
    assert 'warning: blocks.' in said and ': try ' in said and said.count('warning: ') <= 4
    events = EventAccumulator(str(tmp_path / 'tensorboard'))
    events.Reload()
    tags = set(events.Tags()['scalars'])
    assert {'entropy/blocks.1.attn.q_act', 'entropy/blocks.0.attn.k_act', 'dead/blocks.0.mlp.fc1.act',
            'changed/blocks.0.mlp.fc1', 'clipped/head'} <= tags
    assert len(events.Scalars('changed/blocks.0.mlp.fc1')) == 1

    assert run(*TINY, '--epochs', 1, '--oscillation-freezing', '0.02', '--output_dir', tmp_path / 'tracked') == 0
    events = EventAccumulator(str(tmp_path / 'tracked/tensorboard'))
    events.Reload()
    assert {'oscillating/blocks.0.mlp.fc1', 'frozen/blocks.0.mlp.fc1'} <= set(events.Tags()['scalars'])
