"""Networks with one head, of all forms, in integers: plain torch, the kernels, ONNX, and files of packed codes."""
import shutil

import pytest
import timm
import torch
from helpers import FORMS, require
from torch import nn

import quant_vision_transformer  # noqa: F401  registers the variants
from calibration.first_batch import calibrate
from checkpoints.networks import ModelInfo, open_network
from checkpoints.packed import write_packed
from deployment import native
from deployment.integer import IntegerViT
from deployment.onnx_export import export_onnx

NAME = 'fourbits_vit_tiny_patch16_224'
SHAPE = {'img_size': 32, 'patch_size': 8, 'embed_dim': 128, 'depth': 2, 'num_heads': 2, 'num_classes': 10}
EVERY_FORM = pytest.mark.parametrize('form', FORMS)
pytestmark = pytest.mark.usefixtures('one_thread')


def uneven(x, qn, qp):
    """Another scale and zero point for every channel."""
    return 2 * x.abs().mean(1) / qp ** 0.5, 0.5 * (x.amin(1) - qn)


def made(form: str, count: int = 8, **options) -> tuple[nn.Module, torch.Tensor]:
    """A calibrated network in float64, no parameter of which is what it starts from, and images."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, **SHAPE | FORMS[form] | options).double().eval()
    for name, parameter in model.named_parameters():
        if 'norm' in name or name.endswith('gamma'):
            nn.init.uniform_(parameter, -0.5 if name.endswith('gamma') else 0.5, 1.5)
        elif name.endswith(('bias', '_token', 'pos_embed')):
            nn.init.normal_(parameter, std=0.3)
    images = torch.randn(count, 3, *model.patch_embed.img_size).double()
    calibrate(model, images, uneven)
    return model, images


@EVERY_FORM
@pytest.mark.parametrize('terms', [1, 2])
def test_integers_are_exact_with_one_step_per_tensor(form, terms):
    model, images = made(form, act_granularity='tensor')
    network = IntegerViT(model, terms, torch.float64)
    assert network.exact
    with torch.no_grad():
        torch.testing.assert_close(network(images), model(images), rtol=1e-9, atol=1e-9)


@EVERY_FORM
def test_integers_are_close_with_steps_per_channel(form):
    model, images = made(form)
    with torch.no_grad():
        wanted, found = model(images), IntegerViT(model, 2, torch.float64)(images)
    error = (found - wanted).abs().amax(1) / wanted.std()  # large where one code is another
    assert 0 < error.median() < 1e-3


@pytest.mark.skipif(shutil.which('g++') is None, reason='no C++ compiler')
@EVERY_FORM
@pytest.mark.parametrize('threads', [1, 5])
def test_the_kernels_compute_the_same(form, threads):
    """As in test_native: most images to float32's precision."""
    model, images = made(form)
    network = IntegerViT(model.float())
    wanted, found = network(images.float()), native.NativeViT(network, threads)(images.float())
    assert ((found - wanted).abs().amax(1) / wanted.std()).median() < 1e-4


@pytest.mark.slow
@EVERY_FORM
@pytest.mark.parametrize('weights', ['int8', 'int4'])
def test_onnx_computes_the_same(tmp_path, form, weights):
    require('onnx')
    runtime = require('onnxruntime')
    model, images = made(form, act_granularity='tensor')
    network = IntegerViT(model.float())
    export_onnx(network, tmp_path / 'model.onnx', weights=weights, quantized=model)
    session = runtime.InferenceSession(str(tmp_path / 'model.onnx'), providers=['CPUExecutionProvider'])
    found, wanted = torch.from_numpy(session.run(None, {'images': images.float().numpy()})[0]), network(images.float())
    assert ((found - wanted).abs().amax(1) / wanted.std()).median() < 1e-4


@pytest.mark.slow
def test_int4_weights_keep_layer_scale_with_steps_per_channel(tmp_path):
    require('onnx')
    runtime = require('onnxruntime')
    model, images = made('layer scale')
    export_onnx(IntegerViT(model.float()), tmp_path / 'model.onnx', weights='int4', quantized=model)
    session = runtime.InferenceSession(str(tmp_path / 'model.onnx'), providers=['CPUExecutionProvider'])
    found = torch.from_numpy(session.run(None, {'images': images.float().numpy()})[0])
    with torch.no_grad():
        wanted = model(images.float())
    assert ((found - wanted).abs().amax(1) / wanted.std()).median() < 1e-4


@EVERY_FORM
def test_a_packed_file_gives_the_network_back(tmp_path, form):
    model, images = made(form)
    model, size = model.float(), model.patch_embed.img_size[0]
    options = {key: value for key, value in (SHAPE | FORMS[form]).items() if key not in ('img_size', 'num_classes')}
    write_packed(model, ModelInfo(NAME, options, 10, size), tmp_path / 'net.safetensors')
    opened = open_network(tmp_path / 'net.safetensors')
    assert opened.info.kwargs == options
    with torch.no_grad():
        assert torch.equal(opened.model(images.float()), model(images.float()))
