"""Steps that follow from the weights."""

import pytest
import timm
import torch
from helpers import TINY, assert_same, resume_after_an_epoch, run

import quant_vision_transformer  # noqa: F401  registers the variants
from _quan_base import block_weights, calibrate, named_quantizers
from checkpoints import read_checkpoint
from statistical_steps import StatisticalSteps

pytestmark = pytest.mark.usefixtures('one_thread')


def calibrated() -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model('threebits_deit_tiny_patch16_224', img_size=32, num_classes=5, embed_dim=24, depth=1,
                              num_heads=2).double()
    calibrate(model, torch.randn(4, 3, 32, 32).double())
    return model


def test_the_statistic_and_the_layers_it_is_for():
    model = calibrated()
    learned = {name: layer.alpha.detach().clone() for name, layer in named_quantizers(model)}
    steps = StatisticalSteps(model, 'statistics')
    torch.testing.assert_close(model.blocks[0].mlp.fc1.alpha, learned['blocks.0.mlp.fc1'])  # not before set_
    steps.set_()
    blocks = block_weights(model)
    assert sorted(blocks) == [f'blocks.0.{name}' for name in ('attn.proj', 'attn.qkv', 'mlp.fc1', 'mlp.fc2')]
    for name, layer in named_quantizers(model):
        if name in blocks:
            torch.testing.assert_close(layer.alpha.detach(), layer.weight.abs().mean(1) / 2)  # 3 bits: 2 / 4
            assert not layer.alpha.requires_grad
        else:
            assert torch.equal(layer.alpha, learned[name]) and layer.alpha.requires_grad, name


def test_proportional_keeps_what_calibration_found():
    model = calibrated()
    before = {name: layer.to_int() for name, layer in block_weights(model).items()}
    steps = StatisticalSteps(model, 'proportional')
    with torch.no_grad():
        for layer in block_weights(model).values():
            layer.weight.mul_(1.7)
            layer.weight[0] = 0.  # a channel without weights has a step all the same
    steps.set_()
    for name, layer in block_weights(model).items():
        assert torch.equal(layer.to_int()[1:], before[name][1:]), name
        assert layer.alpha[0] > 0


@pytest.mark.parametrize('kind', ['statistics', 'proportional'])
def test_a_run_is_resumed_bit_for_bit(kind, tmp_path):
    flags = (*TINY, '--epochs', 2, '--weight-step', kind, '--oscillation-freezing', '0.02')
    resumed, whole = resume_after_an_epoch(tmp_path, *flags)
    ours, expected = (read_checkpoint(folder / 'checkpoint.pth') for folder in (resumed, whole))
    for key in ('model', 'optimizer', 'statistical_steps'):
        assert_same(ours[key], expected[key], key)
    assert run('--eval', '--resume', whole / 'checkpoint.pth', '--num_workers', 0, '--device', 'cpu') == 0
