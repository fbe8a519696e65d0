"""The fused kernels against the same integer network in plain torch.

Both compute the same integers; what lies between them in float32 differs in the last bits, and where a value lies on a
rounding boundary a code may differ by one and spread. So most images must agree to float32's precision, and a
kernel that is wrong anywhere fails on all of them.
"""
import json
import platform
import re
import shutil
import subprocess

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import TINY, run

from _quan_base import ActQ, LinearQ, calibrate
from deployment import native
from deployment.integer import IntegerViT
from ops import cpp_library
from ops import cpu as native_training
from ops import lsq as _lsq
from ops.attention import quantized_attention
from ops.lsq import QParams, _grid, fake_quantize, quantized_linear
from quant_vision_transformer import QAttention, QuantConfig

pytestmark = pytest.mark.skipif(shutil.which('g++') is None, reason='no C++ compiler')
IMAGES = 9


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache of compiled libraries, forgotten afterwards."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    native._library.cache_clear()
    yield tmp_path / 'qvit'
    native._library.cache_clear()


def spread_rule(channels, qn, qp):
    """Steps that differ from channel to channel, so that folding has something to do; zero points not at 0."""
    step = 2 * channels.abs().mean() / qp ** .5 * torch.linspace(.8, 1.25, len(channels))
    return step, 0.3 * (channels.amin(1) - step * qn)


def make(size=(32, 48), depth=2, terms=1, name='fourbits_deit_tiny_patch16_224', classes=10, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size, depth=depth, num_classes=classes, **kwargs)
    for block in model.blocks:  # LayerNorms that do something
        for norm in (block.norm1, block.norm2, block.attn.norm_q, block.attn.norm_k):
            for parameter in norm.parameters():
                torch.nn.init.uniform_(parameter, .5, 1.5)
    images = torch.randn(IMAGES, 3, *size)
    calibrate(model, images, spread_rule)
    return IntegerViT(model, terms), images


def assert_agree(network, images, **options):
    expected, got = network(images), native.NativeViT(network, **options)(images)
    assert got.shape == expected.shape
    error = (got - expected).abs().amax(1) / expected.std()
    assert error.median() < 1e-4, error
    return got


@pytest.mark.parametrize('terms', [1, 2])
@pytest.mark.parametrize('kwargs', [{}, {'act_granularity': 'tensor'}, {'irm': False}, {'act_bits': 8},
                                    {'weight_bits': 8, 'act_bits': 8, 'irm': False}, {'classes': 129},
                                    {'name': 'twobits_deit_small_patch16_224'}, {'patch_size': 8}, {'in_chans': 1}],
                         ids=str)
def test_equals_plain_torch(kwargs, terms):
    if 'in_chans' in kwargs:
        torch.manual_seed(0)
        model = timm.create_model('fourbits_deit_tiny_patch16_224', img_size=32, depth=1, in_chans=1, num_classes=5)
        images = torch.randn(IMAGES, 1, 32, 32)
        calibrate(model, images, spread_rule)
        network = IntegerViT(model, terms)
    else:
        network, images = make(terms=terms, **kwargs)
    assert_agree(network, images, threads=1)


@pytest.mark.parametrize('threads', [2, 3, 64])
@pytest.mark.parametrize('batch', [1, 2, 5])
def test_threads_do_not_change_the_result(threads, batch):
    network, images = make(size=(64, 64))
    one = native.NativeViT(network, threads=1)(images[:batch])
    assert torch.equal(native.NativeViT(network, threads=threads)(images[:batch]), one)


def test_result_of_an_image_does_not_depend_on_its_batch():
    network, images = make()
    model = native.NativeViT(network)
    assert torch.equal(model(images), torch.cat([model(image[None]) for image in images]))
    assert model(images[:0]).shape == (0, 10)


def test_whole_depth_and_resolution():
    network, images = make(size=(224, 224), depth=12, act_granularity='tensor')
    predicted = native.NativeViT(network)(images[:3])
    assert torch.isfinite(predicted).all()
    assert (predicted.argmax(1) == network(images[:3]).argmax(1)).any()


@pytest.mark.parametrize(('flags', 'needs', 'instructions'), [
    (['-march=x86-64'], None, 'portable'), (['-march=haswell'], 'avx2', 'AVX2'),
    (['-march=haswell', '-mavxvnni'], 'avx_vnni', 'AVX-VNNI')])
def test_every_instruction_set_gives_the_same(own_cache, monkeypatch, flags, needs, instructions):
    if platform.machine() != 'x86_64' or needs and needs not in cpp_library.processor():
        pytest.skip(f'this processor lacks {needs}')
    network, images = make(size=(32, 32), depth=1, act_bits=8)
    expected = native.NativeViT(network)(images)
    monkeypatch.setattr(cpp_library, 'FLAGS', [flag for flag in cpp_library.FLAGS if flag != '-march=native'] + flags)
    monkeypatch.setattr(cpp_library, 'WIDE', [])
    native._library.cache_clear()
    other = native.NativeViT(network)
    assert other.instructions == instructions
    error = (other(images) - expected).abs().amax(1) / expected.std()
    assert error.median() < 1e-4


def test_compiled_once(own_cache, monkeypatch):
    network, _ = make(depth=1)
    native.NativeViT(network)
    files = sorted(own_cache.iterdir())
    assert [file.suffix for file in files] == ['.so']
    native._library.cache_clear()
    monkeypatch.setattr(subprocess, 'run', None)
    native.NativeViT(network)


@pytest.mark.parametrize(('compiler', 'reason'), [('no-such-compiler', 'no C++ compiler'),
                                                  ('false', 'cannot compile')])
def test_without_a_compiler_plain_torch_runs_and_says_so(own_cache, monkeypatch, capsys, compiler, reason):
    monkeypatch.setenv('CXX', compiler)
    network, images = make(depth=1)
    with pytest.raises(native.NativeUnavailable, match=re.escape(reason)):
        native.NativeViT(network)
    assert native.fastest(network) is network
    said = capsys.readouterr().out
    assert reason in said and said.count('\n') == 1
    assert not own_cache.exists() or not list(own_cache.iterdir())


def test_unsupported_networks_and_images():
    model, images = make(depth=1, quantize_attn=False)
    with pytest.raises(native.NativeUnavailable, match='quantized attention'):
        native.NativeViT(model)
    wide, _ = make(depth=1, num_heads=6)
    with pytest.raises(native.NativeUnavailable, match='64 wide'):
        native.NativeViT(wide)
    network, _ = make(depth=1)
    with pytest.raises(ValueError, match=r'3, 32, 48'):
        native.NativeViT(network)(images[:, :, :16])


def test_long_sequences_of_8_bit_codes():
    """Sums of 8-bit codes over 290 tokens pass 2^24, where float32 stops counting one by one."""
    network, images = make(size=(96, 192), patch_size=8, depth=1, act_bits=8)
    assert_agree(network, images[:3])


def test_damaged_values_do_not_crash():
    network, images = make(depth=1)
    images[0, 0, 0, 0], images[1] = float('nan'), float('inf')
    logits = native.NativeViT(network)(images)
    assert torch.equal(logits[2:], native.NativeViT(network)(images[2:]))


@pytest.mark.parametrize('on', [True, False])
def test_every_quantizer_calls_the_training_kernels_where_they_are_enabled(monkeypatch, on):
    calls = []
    names = 'steps', 'weight', 'backward_', 'softmax_steps_', 'softmax_backward_'
    for name in names:
        kernel = getattr(native_training, name)
        monkeypatch.setattr(native_training, name, lambda x, *args, kernel=kernel, name=name: calls.append(
            (name, x.shape)) or kernel(x, *args))
    native_training.enable(on)
    for module, x, weights, activations, maps in (
            (ActQ(5, 4), torch.randn(2, 5), set(), {(2, 5)}, set()),
            (LinearQ(5, 3, weight_bits=4, act_bits=4), torch.randn(2, 5), {(3, 5)}, {(2, 5)}, set()),
            (QAttention(64, 1, QuantConfig(4, 4)), torch.randn(1, 4, 64), {(192, 64), (64, 64)},
             {(4, 64), (1, 1, 4, 64)}, {(1, 1, 4, 4)})):
        calibrate(module, x)
        calls.clear()
        out = module.train()(x.requires_grad_())
        (out if torch.is_tensor(out) else out[0]).sum().backward()
        for name, shapes in zip(names, (activations, weights, activations | weights, maps, maps), strict=True):
            assert {shape for called, shape in calls if called == name} == (shapes if on else set())


@pytest.mark.parametrize(('x_shape', 'step_shape', 'has_zero'), [
    ((500, 96), (96,), True), ((2, 3, 40, 50), (3, 1, 1), True), ((500, 96), (1,), False), ((96, 500), (96, 1), False)],
    ids=str)
def test_training_kernels_give_the_codes_of_torch_on_borders_and_nan(x_shape, step_shape, has_zero):
    torch.manual_seed(0)
    q = QParams(torch.rand(step_shape) + 0.1, torch.randn(step_shape) * 3 if has_zero else None, -8, 7)
    zero = 0. if q.zero is None else q.zero.round()
    x = (torch.randint(-9, 9, x_shape) + 0.5 - zero) * q.step
    x.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    expected = fake_quantize(x, q)
    native_training.enable()
    assert torch.equal(fake_quantize(x, q).nan_to_num(-1e3), expected.nan_to_num(-1e3))
    fake_quantize(x.requires_grad_(), q).sum().backward()
    assert x.grad.view(-1)[:3].tolist() == [0., 0., 0.]
    with pytest.raises(ValueError, match='do not fit x of shape'):
        fake_quantize(torch.randn(4, 7), QParams(torch.ones(5), None, -8, 7))
    assert fake_quantize(x.double(), q).dtype == torch.float64


@pytest.mark.parametrize(('x_shape', 'step_shape'), [((4000, 60), (60,)), ((5, 3, 90, 90), (3, 1, 1)),
                                                     ((60, 4000), (60, 1)), ((4000, 60), (1,))], ids=str)
def test_quantizers_on_several_threads(x_shape, step_shape):
    torch.manual_seed(0)
    x, grad = torch.randn(2, *x_shape, dtype=torch.float64).unbind()
    step = (torch.rand(step_shape, dtype=torch.float64) + 0.5).requires_grad_()
    zero = torch.randn(step_shape, dtype=torch.float64).requires_grad_()

    def quantized(on: bool) -> tuple:
        native_training.enable(on)
        x_hat = fake_quantize(x.requires_grad_(), QParams(step, zero, -8, 7))
        return x_hat, *torch.autograd.grad(x_hat, [x, step, zero], grad)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert native_training._threads(x) == 3
        torch.testing.assert_close(quantized(True), quantized(False), rtol=1e-10, atol=1e-12)
    finally:
        torch.set_num_threads(before)


def both_ways(function, tensors: list) -> list[tuple]:
    """Output and gradients of `function(*tensors)`, plain and by the kernels."""
    found = []
    for on in (False, True):
        native_training.enable(on)
        out = function(*(tensor.requires_grad_() for tensor in tensors))
        generator = torch.Generator().manual_seed(0)
        grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
        found.append((out, *torch.autograd.grad(out, tensors, grad)))
    return found


@pytest.mark.parametrize('granularity', ['channel', 'tensor'])
@pytest.mark.parametrize(('heads', 'width'), [(1, 8), (3, 1), (3, 8), (2, 33)])
def test_heads_are_quantized_as_they_lie(heads, width, granularity):
    torch.manual_seed(0)
    shape = (heads, 1, 1) if granularity == 'channel' else (1, 1, 1)
    step, zero = torch.rand(shape, dtype=torch.float64) * .3 + .1, torch.randn(shape, dtype=torch.float64)
    whole = torch.randn(2, 5, 3 * heads * width, dtype=torch.float64)

    def quantized_heads(whole, step, zero):
        q, _, v = whole.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4)  # (B, H, N, d) each
        qparams = QParams(step, zero, -8, 7)
        return torch.cat([fake_quantize(q, qparams), fake_quantize(v.mT, qparams).mT])

    plain, native_ones = both_ways(quantized_heads, [whole, step, zero])
    torch.testing.assert_close(native_ones, plain, rtol=1e-10, atol=1e-12)


def test_what_the_training_kernels_leave_to_torch(monkeypatch):
    monkeypatch.setattr(_lsq, 'PIECE_BYTES', 1)
    monkeypatch.setattr(_lsq, 'PIECE_BYTES_OF_KERNELS', 1)
    torch.manual_seed(0)
    x, weight = torch.randn(6, 5, dtype=torch.float64), torch.randn(4, 5)  # more precision than the steps have
    x_step, zero, w_step = torch.rand(5) + .1, torch.randn(5), torch.rand(1) + .1  # one step for all of the weight
    plain, native_ones = both_ways(lambda x, weight, x_step, zero, w_step: quantized_linear(
        x, weight, QParams(x_step, zero, -8, 7), QParams(w_step, None, -8, 7)), [x, weight, x_step, zero, w_step])
    torch.testing.assert_close(native_ones, plain)


def test_the_gradient_of_a_gelu_of_nan_is_zero():
    native_training.enable()
    x, grad = torch.tensor([[torch.nan, -3e38, 1., torch.inf]]), torch.ones(1, 4)
    native_training.backward_(grad, x, _grid(QParams(torch.ones(1), torch.zeros(1), -8, 7), x), gelu=True)
    assert grad[0, [0, 1, 3]].tolist() == [0., 0., 0.] and grad[0, 2] > 1


def test_compiled_products_are_those_of_the_kernels():
    native_training.enable()
    torch.manual_seed(0)
    lsq = [QParams(torch.rand(size) * .2 + .1, torch.randn(size), -8, 7) for size in [(6,)] + [(3, 1, 1)] * 4]
    weight, w_lsq = torch.randn(4, 6), QParams(torch.rand(4, 1) + .1, None, -8, 7)

    def linear(x, weight):
        return quantized_linear(x.transpose(0, 1), weight, lsq[0], w_lsq, gelu=True)

    def attention(x):
        q, k, v = x.unflatten(-1, (3, 3, 2)).permute(2, 0, 3, 1, 4)
        return quantized_attention(q, k, v, lsq[1:], 2 ** -.5)

    for function, tensors in ((linear, [torch.randn(3, 2, 6), weight]), (attention, [torch.randn(2, 5, 18)])):
        for tensor in tensors:
            tensor.requires_grad_()
        out = function(*tensors)
        grad = torch.randn_like(out)
        compiled = torch.compile(function, fullgraph=True, backend='aot_eager')(*tensors)
        torch.testing.assert_close(compiled, out)
        theirs = torch.autograd.grad(out, tensors, grad)
        torch.testing.assert_close(torch.autograd.grad(compiled, tensors, grad), theirs)


def test_gelu_and_softmax_of_the_training_kernels_are_accurate():
    """With a step of 2^-20 and codes up to 2^24, the codes show the values themselves."""
    native_training.enable()
    fine = QParams(torch.tensor([2. ** -20]), torch.zeros(1), -2 ** 24, 2 ** 24)
    x = torch.cat([torch.linspace(-15, 12, 100001), torch.tensor([0., -0., 10., 9.9999])])[None]
    y = native_training.steps(x, _grid(fine, x), gelu=True) * fine.step
    expected = F.gelu(x.double()).clamp(-10, 10)
    assert (y.double() - expected).abs().max() < 1.5e-6  # half a step, and 12 units of float32's last place at 1
    grad = torch.ones_like(x)
    native_training.backward_(grad, x, _grid(fine, x), gelu=True)
    slope = torch.ops.aten.gelu_backward(torch.ones_like(expected), x.double()) * (expected < 10)
    assert (grad.double() - slope).abs().max() < 1e-6

    torch.manual_seed(0)
    scores = torch.randn(2, 3, 33, 33) * torch.tensor([0.1, 3., 40.]).view(3, 1, 1)
    softmax = scores.clone()
    steps = native_training.softmax_steps_(softmax, _grid(fine, softmax))
    torch.testing.assert_close(softmax.double(), scores.double().softmax(-1), rtol=5e-6, atol=1e-30)
    assert (steps * fine.step - softmax).abs().max() <= 2. ** -21
    scores[0, 0, 0, 0] = torch.nan
    native_training.softmax_steps_(scores, _grid(fine, scores))
    assert scores[0, 0, 0].isnan().all() and scores.isnan().sum() == 33


def test_a_training_run_uses_the_kernels_where_it_can(tmp_path, capsys, monkeypatch):
    flags = *TINY, '--epochs', 1
    for given, on in ((), True), (('--no-native-kernels',), False), (('--native-kernels',), True):
        assert run(*flags, *given, '--output_dir', tmp_path) == 0
        said = json.loads((tmp_path / 'args.json').read_text())['args']['native_kernels']
        assert said == native_training.is_on() == on
    monkeypatch.setenv('CXX', 'no-such-compiler')
    capsys.readouterr()
    assert run(*flags) == 0 and not native_training.is_on()
    assert 'without its C++ kernels: no C++ compiler (no-such-compiler)' in capsys.readouterr().out
    assert run(*flags, '--native-kernels') == 2
    assert '--native-kernels: no C++ compiler (no-such-compiler)' in capsys.readouterr().err
