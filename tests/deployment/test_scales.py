"""Deployed networks take their scales from the quantizers' `scale`, whatever parameter that is computed from."""
import copy

import pytest
import timm
import torch
from helpers import require

import quant_vision_transformer  # noqa: F401  registers the variants
from _quan_base import QParams, named_quantizers
from calibration.first_batch import calibrate
from deployment.integer import IntegerViT


def with_doubled_scales(model):
    """The same network in another parametrisation: alpha holds half of each scale, and the classes double it."""
    model = copy.deepcopy(model)
    for _, quantizer in list(named_quantizers(model)):
        class Doubled(type(quantizer)):
            @property
            def scale(self):
                return 2 * super().scale

            def qparams(self, x):
                scale, *rest = super().qparams(x)
                return QParams(2 * scale, *rest)

            def weight_qparams(self):
                scale, *rest = super().weight_qparams()
                return QParams(2 * scale, *rest)

        quantizer.__class__ = Doubled
        with torch.no_grad():
            quantizer.alpha.mul_(0.5)  # exact, so that nothing may differ
    return model


def uneven(x, qn, qp):
    """A scale and a zero point of its own for every channel."""
    scale = 2 * x.abs().mean(1) / qp ** 0.5
    return scale, 0.3 * (x.amin(1) - scale * qn)


def network(**kwargs):
    torch.manual_seed(0)
    shape = {'num_classes': 10, 'img_size': 32, 'patch_size': 8, 'embed_dim': 48, 'depth': 2, 'num_heads': 3}
    model = timm.create_model('fourbits_deit_tiny_patch16_224', **shape, **kwargs).double()
    calibrate(model, torch.randn(4, 3, 32, 32, dtype=torch.float64), uneven)
    return model.eval()


@pytest.mark.parametrize('granularity', ['channel', 'tensor'])
@pytest.mark.parametrize('terms', [1, 2])
@torch.no_grad()
def test_integer_network(granularity, terms):
    model = network(act_granularity=granularity)
    other = with_doubled_scales(model)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(other(images), model(images))  # the doubled network is the same, simulated
    integer = IntegerViT(model, terms, torch.float64)
    logits = integer(images)
    assert integer.exact == (granularity == 'tensor')
    assert torch.equal(IntegerViT(other, terms, torch.float64)(images), logits)
    if granularity == 'tensor':
        torch.testing.assert_close(logits, model(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('granularity', ['channel', 'tensor'])
@pytest.mark.parametrize('weights', ['int8', 'int4'])
def test_onnx_file(tmp_path, granularity, weights):
    require('onnx')
    from deployment.onnx_export import export_onnx

    files = []
    for model in (network(act_granularity=granularity), with_doubled_scales(network(act_granularity=granularity))):
        files.append(tmp_path / f'{len(files)}.onnx')
        export_onnx(IntegerViT(model), files[-1], weights=weights, quantized=model)
    assert files[0].read_bytes() == files[1].read_bytes()
