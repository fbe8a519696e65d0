"""What training says of the quantizers: the numbers, and the warnings."""

import pytest
import timm
import torch
from helpers import TINY, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import quant_vision_transformer  # noqa: F401  registers the variants
from _quan_base import block_weights, calibrate, named_quantizers
from analysis.inspection import code_usage
from training.diagnostics import Diagnostics, quantizer_statistics, warning_lines
from training.methods.oscillation import Oscillations

pytestmark = pytest.mark.usefixtures('one_thread')


def images() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()


def calibrated() -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model('fourbits_deit_tiny_patch16_224', img_size=16, patch_size=8, num_classes=10, embed_dim=24,
                              depth=1, num_heads=2).double()
    calibrate(model, images())
    return model


def test_statistics_of_quantizers_leave_the_model_as_it_was():
    model = calibrated()
    with torch.no_grad():
        model.blocks[0].attn.attn_act.alpha.fill_(1e-4)  # 15 codes reach 0.0015: every probability is clipped
        model.blocks[0].attn.attn_act.zero_point.zero_()
        model.head.act.alpha.fill_(100.)
        model.head.act.zero_point.zero_()
    model.train()
    found = quantizer_statistics(model, images())
    assert found['blocks.0.attn.attn_act'] == {'step': pytest.approx(1e-4), 'zero_point': 0, 'clipped': 1, 'dead': 1,
                                               'entropy': 0}
    assert found['head.act'] == {'step': 100, 'zero_point': 0, 'clipped': 0, 'dead': 1, 'entropy': 0}
    assert 'zero_point' not in found['head'] and len(found) == len(list(named_quantizers(model)))
    assert model.training and not any(module._forward_hooks for module in model.modules())
    assert quantizer_statistics(torch.nn.Linear(2, 2).double(), torch.zeros(1, 2).double()) == {}


def test_entropies_and_clipped_values_are_those_of_the_figures():
    model = calibrated()
    found, expected = quantizer_statistics(model, images()), code_usage(model, images())
    assert found.keys() == expected.keys()
    for name, usage in expected.items():
        assert found[name]['entropy'] == pytest.approx(usage.distribution.entropy), name
        assert found[name]['clipped'] == usage.clipped
    assert 1 < found['blocks.0.attn.q_act']['entropy'] < 4


def test_dead_channels():
    model = calibrated()
    attention, fc1 = model.blocks[0].attn, model.blocks[0].mlp.fc1
    with torch.no_grad():
        fc1.weight[:24] = 0.3  # rows of a constant, a quarter of them
        attention.norm_q.weight[:3] = 0.  # of the 12 dimensions of both heads
        model.blocks[0].norm2.weight[:6] = 0.  # inputs of fc1, of 24
    found = quantizer_statistics(model, images())
    assert {name: found[f'blocks.0.{name}']['dead'] for name in ('mlp.fc1', 'attn.q_act', 'attn.k_act', 'mlp.fc1.act')
            } == {'mlp.fc1': 0.25, 'attn.q_act': 0.25, 'attn.k_act': 0, 'mlp.fc1.act': 0.25}


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

    oscillations = Oscillations(model)
    oscillations.states['blocks.0.mlp.fc2']['frequency'][:12] = 0.1
    oscillations.states['blocks.0.mlp.fc2']['frozen'][:6] = True
    entry = Diagnostics(model, images(), oscillations).measure()['blocks.0.mlp.fc2']
    assert (entry['oscillating'], entry['frozen']) == (0.25, 0.25) and 'changed' not in entry


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
                         ) == ['warning: blocks.0.attn.q_act (and 1 more) uses 1.2 of 4 bits: try --calibration mse or '
                               'a lower --lr']
    line, = warning_lines(model, changed(v_act={'clipped': 0.8}), 1.)
    assert line.startswith('warning: blocks.0.attn.v_act clips 80% of its values: try --calibration mse')
    line, = warning_lines(model, changed(fc2={'dead': 0.3}), 1.)
    assert line.startswith('warning: blocks.0.mlp.fc2 has one code only in 30% of its channels: try ')
    line, = warning_lines(model, changed(fc1={'oscillating': 0.4}), 1.)
    assert line.startswith('warning: blocks.0.mlp.fc1 has 40% of its weights oscillating: try --oscillation-dampening')
    line, = warning_lines(model, changed(fc1={'changed': 0.4}), 0.6)
    assert 'changed 40% of its codes in this epoch' in line


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
