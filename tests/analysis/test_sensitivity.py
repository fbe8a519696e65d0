"""What each tensor costs when it alone is quantized."""
import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import require
from toys import TINY

import cost
from analysis.sensitivity import sensitivity
from checkpoints.files import write_checkpoint
from checkpoints.full_precision import load_full_precision
from quant_vision_transformer import QVisionTransformer
from utils import UserError

pytestmark = pytest.mark.usefixtures('one_thread')
SHAPE = {'img_size': 16, 'patch_size': 8, 'embed_dim': 24, 'depth': 2, 'num_heads': 2, 'num_classes': 5}


@pytest.fixture
def full():
    torch.manual_seed(0)
    net = timm.create_model('deit_tiny_distilled_patch16_224', **SHAPE).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def measured(full, images, **options):
    model = timm.create_model(TINY, **SHAPE, **options).double()
    load_full_precision(model, full.state_dict())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = sensitivity(model, images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return found


def test_a_weight_alone(full):
    """fc2 of the last block, quantized by hand to the scale of least squared error among many, in timm's network."""
    images = torch.randn(8, 3, 16, 16).double()
    found = measured(full, images)['mlp.fc2'][1]
    with torch.no_grad():
        before = full(images).log_softmax(-1)
        weight = full.blocks[1].mlp.fc2.weight
        scales = weight.abs().amax(1, keepdim=True) / 7 * torch.linspace(1.1, 0.15, 60)[:, None, None]
        rounded = (weight / scales).clamp(-8, 7).round() * scales
        best = (rounded - weight).square().sum(2).argmin(0)
        weight.copy_(rounded[best, torch.arange(24)])
        wanted = F.kl_div(full(images).log_softmax(-1), before, log_target=True, reduction='batchmean')
    assert found == pytest.approx(wanted.item(), rel=1e-6) and found > 0


def test_more_bits_cost_less(full):
    images = torch.randn(8, 3, 16, 16).double()
    coarse, fine = measured(full, images), measured(full, images, weight_bits=8, act_bits=8)
    assert list(coarse) == list(fine) and len(coarse) == 12
    for name, values in coarse.items():
        assert values.shape == (2,) and (values > 20 * fine[name]).all(), name


def test_attention_in_full_precision_has_no_quantizers(full):
    found = measured(full, torch.randn(2, 3, 16, 16).double(), quantize_attn=False)
    assert set(found) == {f'{layer}{part}' for layer in ('attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2')
                          for part in ('', '.act')}


def test_other_networks_are_refused(full):
    assert not isinstance(full, QVisionTransformer)
    with pytest.raises(UserError, match='no quantized'):
        sensitivity(full, torch.randn(2, 3, 16, 16).double())


def test_command(full, tmp_path, capsys):
    require('matplotlib')
    write_checkpoint({'model': full.float().state_dict()}, tmp_path / 'full.pth')
    shape = [f'{name}={value}' for name, value in SHAPE.items() if name not in ('img_size', 'num_classes')]
    flags = ['--sensitivity', '--checkpoint', str(tmp_path / 'full.pth'), '--model', TINY, '--model-kwargs', *shape,
             '--data-set', 'DIGITS', '--num-images', '4', '--picture', str(tmp_path / 'a.png'), '--format', 'json']
    assert cost.main(flags) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 12 and (tmp_path / 'a.png').stat().st_size > 10 ** 4
    assert all(row['all'] == pytest.approx(row['0'] + row['1'], abs=0.11) for row in rows)
    assert np.isfinite([row['all'] for row in rows]).all()


@pytest.mark.parametrize(('flags', 'line'), [
    (['--sensitivity', '--model', TINY], '--sensitivity is of the full-precision weights of a --checkpoint'),
    (['--model', TINY, '--picture', 'a.png'], '--picture is one of --sensitivity'),
    (['--sensitivity', '--model', TINY, '--checkpoint', 'x.pth', '--picture', 'a.gif'], 'a.gif')])
def test_wrong_use_is_one_line(flags, line, capsys):
    assert cost.main(flags) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and line in error
