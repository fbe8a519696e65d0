"""ONNX files against the networks they were made of, in onnxruntime."""
import copy
import json
import platform
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import SHARED, require
from timm.data import ImageNetInfo
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.datasets import ImageFolder

import quant_vision_transformer  # noqa: F401  registers the variants
from calibration.first_batch import calibrate
from checkpoints.files import read_checkpoint
from checkpoints.full_precision import load_full_precision
from checkpoints.networks import ModelInfo
from datasets import build_transform
from deployment import onnx_export
from deployment.integer import IntegerViT, IntLinear, Quantizer, UnsignedCodes
from deployment.onnx_export import export_onnx
from utils import UserError

pytestmark = pytest.mark.slow

onnx = require('onnx')
ort = require('onnxruntime')

DATA = SHARED / 'data'
DEIT, IMAGES = DATA / 'deit_tiny_patch16_224-fp16.pth', DATA / 'imagenet-mini' / 'val'
PLAIN, ALL = ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL
MARGIN = 2e-4  # in codes: further than this from a rounding border, float32 and float64 give the same code
TOLERANCE = 1e-5  # of the largest logit: float32's; no code may differ
CLASSES, DEPTH, SIDE = 5, 2, 16
SHAPE = {'embed_dim': 24, 'depth': DEPTH, 'num_heads': 3, 'patch_size': 8, 'img_size': SIDE, 'num_classes': CLASSES}


def session(path: Path, level=ALL, optimized: Path | None = None):
    options = ort.SessionOptions()
    options.graph_optimization_level, options.intra_op_num_threads = level, 1
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


def logits(path: Path, images: torch.Tensor, level=ALL) -> np.ndarray:
    return session(path, level).run(None, {'images': images.float().numpy()})[0]


def network(bits: str = 'four', seed: int = 0, **kwargs):
    """A small network whose scales and zero points differ between channels and heads, as after training."""
    torch.manual_seed(seed)
    model = timm.create_model(f'{bits}bits_deit_tiny_patch16_224', **SHAPE | kwargs)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.mul_(6)  # for attention that depends on the image
    calibrate(model, torch.randn(16, 3, SIDE, SIDE))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith('act.alpha'):
                value.mul_(0.8 + 0.4 * torch.rand_like(value))
            elif name.endswith('zero_point'):
                value.add_(1.5 * torch.randn_like(value))
            elif '.norm' in name or name.endswith('bias'):
                value.add_(0.2 * torch.randn_like(value))
    return model.eval()


def integer(model, terms: int = 1, dtype=torch.float64) -> IntegerViT:
    return IntegerViT(copy.deepcopy(model), terms, dtype)


def with_original_weights(net: IntegerViT, model) -> IntegerViT:
    """The integer network with the fake-quantized network's weights, multiplied in float64."""
    def forward(layer):
        weight = (layer.to_int().double() * layer.scale.double().view(-1, *[1] * (layer.weight.ndim - 1))).flatten(1)
        scale, zero = (value.repeat_interleave(weight.shape[1] // len(value))
                       for value in UnsignedCodes.of(layer.act, layer.weight.shape[1])[:2])
        return lambda codes: F.linear((codes - zero) * scale, weight, layer.bias.double())

    heads = {'heads.0': 'head', 'heads.1': 'head_dist'}
    names = {'patch': 'patch_embed.proj', 'fc1': 'mlp.fc1', 'fc2': 'mlp.fc2'}
    for name, layer in net.named_modules():
        if isinstance(layer, IntLinear):
            parent, _, leaf = heads.get(name, name).rpartition('.')
            layer.forward = forward(model.get_submodule(f'{parent}.{names.get(leaf, leaf)}'.lstrip('.')))
    return net


def clear_images(net: IntegerViT, count: int = 4) -> torch.Tensor:
    """At most `count` random images, no value of which comes near a rounding border in the float64 network."""
    images = torch.randn(400, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    margin = torch.full((400,), torch.inf, dtype=torch.float64)

    def measure(quant: Quantizer, inputs: tuple) -> None:
        position = quant.shift + inputs[0] * quant.scale
        off = (position - position.floor() - 0.5).abs()
        off[(position < 0) | (position > quant.levels)] = 1.
        margin.copy_(torch.minimum(margin, off.flatten(1).amin(1)))

    hooks = [part.register_forward_pre_hook(measure) for part in net.modules() if isinstance(part, Quantizer)]
    net(images.double())
    for hook in hooks:
        hook.remove()
    return images[margin > MARGIN][:count]


KINDS = [{}, {'act_granularity': 'tensor'}, {'irm': False}, {'quantize_attn': False},
         {'irm': False, 'quantize_attn': False}, {'act_granularity': 'tensor', 'irm': False},
         {'act_bits': 8, 'depth': 1}, {'act_bits': 8, 'depth': 1, 'act_granularity': 'tensor'}]
CASES = [('two', {}), ('three', {}), ('two', KINDS[1]), ('three', KINDS[1]), *(('four', kind) for kind in KINDS)]


@pytest.mark.parametrize(('bits', 'kwargs'), CASES, ids=lambda value: str(value))
@pytest.mark.parametrize('form', ['int8', 'int8 in 2 terms', 'int4'])
def test_logits(tmp_path, bits, kwargs, form):
    for seed in range(9):  # values of the class token that do not depend on the image may lie on a border
        model = network(bits, seed, **kwargs)
        net = integer(model, terms=2 if '2' in form else 1)
        export_onnx(net, tmp_path / 'a.onnx', weights=form[:4], quantized=model)
        reference = with_original_weights(net, model.double()) if form == 'int4' else net
        images = clear_images(reference)
        if len(images) == 4:
            break
    expected = reference(images.double()).numpy()
    if form == 'int4':
        with torch.no_grad():
            np.testing.assert_allclose(expected, model(images.double()).numpy(), rtol=1e-9, atol=1e-12)
    for level in (PLAIN, ALL):
        actual = np.concatenate([logits(tmp_path / 'a.onnx', part, level) for part in (images[:1], images[1:])])
        assert actual.shape == (4, CLASSES) and actual.dtype == np.float32
        assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max(), level


def test_zero_points_that_do_not_fit_in_8_bits(tmp_path):
    """Codes of 8 bits with zero points that differ between heads stay in floating point."""
    model = network(act_bits=8, depth=1)
    with torch.no_grad():
        for name in ('q_act', 'v_act', 'attn_act'):
            getattr(model.blocks[0].attn, name).zero_point += torch.tensor([-40., 0., 30.])
    net = integer(model)
    images = clear_images(net)
    assert len(images) == 4
    expected = net(images.double()).numpy()
    export_onnx(net, tmp_path / 'a.onnx')
    assert kinds(onnx.load(tmp_path / 'a.onnx'))['Round'] == 3
    assert np.abs(logits(tmp_path / 'a.onnx', images) - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize(('scale', 'clips'), [(0.5, 0), (5., 1)])
def test_gelu_is_clipped_at_10_where_codes_reach_further(tmp_path, scale, clips):
    model = network(depth=1, act_granularity='tensor')
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[:12] += 30
        model.blocks[0].mlp.fc2.act.alpha.fill_(scale)
        model.blocks[0].mlp.fc2.act.zero_point.zero_()
    net = integer(model)
    images = clear_images(net)
    assert len(images) == 4
    export_onnx(net, tmp_path / 'a.onnx')
    file = onnx.load(tmp_path / 'a.onnx')
    tens = {tensor.name for tensor in file.graph.initializer if tensor.name.startswith('blocks')
            and not tensor.dims and onnx.numpy_helper.to_array(tensor) == 10}
    assert sum(node.op_type == 'Clip' and node.input[2] in tens for node in file.graph.node) == clips
    expected = net(images.double()).numpy()
    assert np.abs(logits(tmp_path / 'a.onnx', images) - expected).max() <= TOLERANCE * np.abs(expected).max()


# --- what is executed -------------------------------------------------------------------------------------------------


def kinds(model) -> Counter:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.skipif(platform.machine() not in ('x86_64', 'AMD64'), reason='what onnxruntime fuses depends on the CPU')
@pytest.mark.parametrize(('granularity', 'weights', 'integers', 'floats'), [
    ('channel', 'int8', 2 + 4 + DEPTH * 6, 0),  # patches and two heads in two terms; 4 layers and 2 products a block
    ('tensor', 'int8', 1 + 2 + DEPTH * 6, 0),
    ('tensor', 'int4', 1 + 2 + DEPTH * 6, 0),
    ('channel', 'int4', DEPTH * 2, 1 + 2 + DEPTH * 4)])
def test_products_that_onnxruntime_executes_in_integers(tmp_path, granularity, weights, integers, floats):
    model = network(act_granularity=granularity)
    export_onnx(integer(model), tmp_path / 'a.onnx', weights=weights, quantized=model)
    session(tmp_path / 'a.onnx', optimized=tmp_path / 'optimized.onnx')
    found = kinds(onnx.load(tmp_path / 'optimized.onnx'))
    assert found['MatMulIntegerToFloat'] == integers
    assert sum(found[kind] for kind in ('MatMul', 'Gemm', 'FusedMatMul', 'MatMulNBits')) == floats


def test_the_graph(tmp_path):
    model = network()
    export_onnx(integer(model), tmp_path / 'a.onnx')
    file = onnx.load(tmp_path / 'a.onnx')
    onnx.checker.check_model(file, full_check=True)
    assert {entry.domain: entry.version for entry in file.opset_import} == {'': 17}
    assert kinds(file)['LayerNormalization'] == DEPTH * 4 + 2   # norm1, norm2, q, k; the two heads' of the last
    batch, *shape = file.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param == 'batch' and [dim.dim_value for dim in shape] == [3, SIDE, SIDE]
    assert file.graph.output[0].type.tensor_type.shape.dim[1].dim_value == CLASSES


@pytest.mark.parametrize('granularity', ['tensor', 'channel'])
def test_int4_holds_the_original_codes(tmp_path, granularity):
    model = network('three', act_granularity=granularity)
    export_onnx(integer(model), tmp_path / 'a.onnx', weights='int4', quantized=model)
    stored = [tensor for tensor in onnx.load(tmp_path / 'a.onnx').graph.initializer
              if tensor.data_type == onnx.TensorProto.INT4]
    layers = [layer for block in model.blocks for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1,
                                                            block.mlp.fc2)]
    assert len(stored) == len(layers)
    for tensor, layer in zip(stored, layers, strict=True):
        assert len(tensor.raw_data) == layer.weight.numel() // 2
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int32), layer.to_int().mT.numpy())


def test_metadata(tmp_path):
    model = network('three')
    info = ModelInfo('threebits_deit_tiny_patch16_224', num_classes=5, classes=['ä', 'b', 'c', 'd', 'e'],
                     data_set='IMNET')
    export_onnx(integer(model), tmp_path / 'a.onnx', quantized=model, info=info)
    file = onnx.load(tmp_path / 'a.onnx')
    properties = {entry.key: entry.value for entry in file.metadata_props}
    assert json.loads(properties.pop('classes')) == info.classes
    assert json.loads(properties.pop('preprocessing')) == {
        'colors': 'RGB, from 0 to 1', 'resize': 256, 'interpolation': 'bicubic', 'center_crop': [224, 224],
        'mean': list(IMAGENET_DEFAULT_MEAN), 'std': list(IMAGENET_DEFAULT_STD)}
    assert file.producer_name == 'q-vit' and properties == {
        'format_version': '1', 'model': info.model, 'weights': 'int8', 'weight_bits': '3', 'activation_bits': '3',
        'exact': 'false'}


# --- full precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('opset', [17, 20, 21])
@pytest.mark.parametrize('name', ['deit_tiny_patch16_224', 'deit_tiny_distilled_patch16_224'])
def test_full_precision(tmp_path, name, opset):
    torch.manual_seed(0)
    model = timm.create_model(name, **SHAPE).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    images = torch.randn(3, 3, SIDE, SIDE)
    export_onnx(model, tmp_path / 'a.onnx', opset=opset)
    with torch.no_grad():
        expected = model.double()(images.double()).numpy()
    for level in (PLAIN, ALL):
        assert np.abs(logits(tmp_path / 'a.onnx', images, level) - expected).max() <= TOLERANCE * np.abs(expected).max()
    assert kinds(onnx.load(tmp_path / 'a.onnx'))['LayerNormalization'] == DEPTH * 2 + (2 if 'distilled' in name else 1)


@pytest.mark.parametrize('options', [{'qk_norm': True}, {'init_values': 0.1}, {'reg_tokens': 2}, {'num_classes': 0},
                                     {'global_pool': 'avg'}, {'act_layer': 'silu'}], ids=str)
def test_what_is_not_a_deit_is_refused(tmp_path, options):
    with pytest.raises(UserError, match='only a DeiT'):
        export_onnx(timm.create_model('vit_tiny_patch16_224', **SHAPE | options), tmp_path / 'a.onnx')


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('flags', 'message'), [
    ({'weights': 'int2'}, "'int2': choose int8 or int4"), ({'weights': 'int4'}, 'need the fake-quantized network'),
    ({'opset': 16}, 'opset 16: choose 17 to 21'), ({'opset': 99}, 'opset 99: choose 17 to 21')])
def test_wrong_options(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        export_onnx(integer(network(depth=1)), tmp_path / 'a.onnx', **flags)
    assert not list(tmp_path.iterdir())


def test_the_fake_quantized_network_itself_is_refused(tmp_path):
    with pytest.raises(UserError, match='IntegerViT'):
        export_onnx(network(depth=1), tmp_path / 'a.onnx')


def test_without_onnx(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, 'onnx', None)
    with pytest.raises(UserError, match='pip install onnx onnxruntime'):
        export_onnx(integer(network(depth=1)), tmp_path / 'a.onnx')


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    net = integer(network(depth=1))
    with pytest.raises(UserError, match='cannot be written'):
        export_onnx(net, tmp_path / 'no folder' / 'a.onnx')
    (tmp_path / 'taken').mkdir()
    with pytest.raises(UserError, match='cannot be written'):
        export_onnx(net, tmp_path / 'taken')
    assert [path.name for path in tmp_path.iterdir()] == ['taken']


# --- real data --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def deit() -> dict[str, torch.Tensor]:
    if not (DEIT.is_file() and IMAGES.is_dir()):
        pytest.skip('the DeiT-Tiny weights or images are not here')
    return {name: value.float() for name, value in read_checkpoint(DEIT)['model'].items()}


@pytest.fixture(scope='module')
def photographs(deit) -> tuple[torch.Tensor, torch.Tensor]:
    """12 images of as many classes, and their labels among the 1000."""
    folder, names = ImageFolder(IMAGES, build_transform(False, 224)), ImageNetInfo().label_names()
    images, labels = zip(*(folder[i] for i in range(0, 12 * 50, 50)), strict=True)
    return torch.stack(images), torch.tensor([names.index(folder.classes[label]) for label in labels])


def test_full_precision_on_photographs(tmp_path, deit, photographs, one_thread):
    images, labels = photographs
    model = timm.create_model('deit_tiny_patch16_224').eval()
    model.load_state_dict(deit)
    export_onnx(model, tmp_path / 'a.onnx')
    actual, expected = logits(tmp_path / 'a.onnx', images), model(images).detach().numpy()
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()
    assert (actual.argmax(1) == labels.numpy()).sum() >= 8


@pytest.mark.parametrize('granularity', ['tensor', 'channel'])
@pytest.mark.parametrize('weights', ['int8', 'int4'])
def test_two_blocks_of_deit_on_photographs(tmp_path, deit, photographs, one_thread, granularity, weights):
    """Deeper, one code that float32 rounds otherwise would be enough for other logits."""
    images = photographs[0][:4]
    model = timm.create_model('fourbits_deit_tiny_patch16_224', depth=2, act_granularity=granularity)
    load_full_precision(model, {name: value for name, value in deit.items()
                                if not name.startswith('blocks.') or name.startswith(('blocks.0.', 'blocks.1.'))})
    calibrate(model, images)
    net = integer(model.eval(), terms=2)
    export_onnx(net, tmp_path / 'a.onnx', weights=weights, quantized=model)
    actual, expected = logits(tmp_path / 'a.onnx', images), net(images.double()).numpy()
    assert (actual.argmax(1) == expected.argmax(1)).sum() >= 3
    assert np.median(np.abs(actual - expected)) <= 1e-3 * np.abs(expected).max()
