"""The C++ passes against torch's where the two could differ: float32, NaN, threads, memory layouts, compiled graphs."""
import shutil

import pytest
import torch
import torch.nn.functional as F

import ops
from _quan_base import QParams
from ops.grid import Grid
from ops.torch_kernels import TorchKernels
from utils import UserError

pytestmark = pytest.mark.skipif(shutil.which('g++') is None, reason='no C++ compiler')
# With a scale of 2^-20 and codes up to 2^24, codes show the values themselves.
FINE = Grid.of(torch.tensor([2. ** -20]), torch.zeros(1), -2 ** 24, 2 ** 24)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def both_ways(function, tensors: list) -> list[tuple]:
    """Output and gradients of `function(products, *tensors)`, by torch and by the C++ kernels."""
    found = []
    for name in ('torch', 'cpu'):
        out = function(ops.get(name), *(tensor.requires_grad_() for tensor in tensors))
        generator = torch.Generator().manual_seed(0)
        grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
        found.append((out, *torch.autograd.grad(out, tensors, grad)))
    return found


@pytest.mark.parametrize(('x_shape', 'scale_shape', 'has_zero'), [
    ((500, 96), (96,), True), ((2, 3, 40, 50), (3, 1, 1), True), ((500, 96), (1,), False), ((96, 500), (96, 1), False)],
    ids=str)
def test_codes_on_borders_and_of_nan_are_those_of_torch(x_shape, scale_shape, has_zero):
    q = QParams(torch.rand(scale_shape) + 0.1, torch.randn(scale_shape) * 3 if has_zero else None, -8, 7)
    zero = 0. if q.zero_point is None else q.zero_point.round()
    x = (torch.randint(-9, 9, x_shape) + 0.5 - zero) * q.scale
    x.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    expected, found = (ops.get(name).fake_quantize(x, q).nan_to_num(-1e3) for name in ('torch', 'cpu'))
    assert torch.equal(found, expected)
    ops.get('cpu').fake_quantize(x.requires_grad_(), q).sum().backward()
    assert x.grad.view(-1)[:3].tolist() == [0., 0., 0.]


def test_scales_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match='5 scales on cpu do not fit x of shape'):
        ops.get('cpu').fake_quantize(torch.randn(4, 7), QParams(torch.ones(5), None, -8, 7))


def test_inputs_of_more_precision_than_the_scale_keep_it():
    q = QParams(torch.rand(7) + .1, torch.randn(7), -8, 7)
    assert ops.get('cpu').fake_quantize(torch.randn(4, 7, dtype=torch.float64), q).dtype == torch.float64


@pytest.mark.parametrize(('x_shape', 'scale_shape'), [((4000, 60), (60,)), ((5, 3, 90, 90), (3, 1, 1)),
                                                      ((60, 4000), (60, 1)), ((4000, 60), (1,))], ids=str)
def test_quantizers_on_three_threads(x_shape, scale_shape):
    x = torch.randn(*x_shape, dtype=torch.float64)
    scale, zero = torch.rand(scale_shape, dtype=torch.float64) + 0.5, torch.randn(scale_shape, dtype=torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        plain, native = both_ways(lambda products, x, scale, zero: products.fake_quantize(
            x, QParams(scale, zero, -8, 7)), [x, scale, zero])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(native, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('granularity', ['channel', 'tensor'])
@pytest.mark.parametrize(('heads', 'width'), [(1, 8), (3, 1), (3, 8), (2, 33)])
def test_heads_are_quantized_as_they_lie(heads, width, granularity):
    shape = (heads, 1, 1) if granularity == 'channel' else (1, 1, 1)
    scale, zero = torch.rand(shape, dtype=torch.float64) * .3 + .1, torch.randn(shape, dtype=torch.float64)
    whole = torch.randn(2, 5, 3 * heads * width, dtype=torch.float64)

    def quantized_heads(products, whole, scale, zero):
        q, _, v = whole.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4)  # (B, H, N, d) each
        qparams = QParams(scale, zero, -8, 7)
        return torch.cat([products.fake_quantize(q, qparams), products.fake_quantize(v.mT, qparams).mT])

    plain, native = both_ways(quantized_heads, [whole, scale, zero])
    torch.testing.assert_close(native, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('piece_bytes', [1, 1 << 20])
def test_what_is_left_to_torch(monkeypatch, piece_bytes):
    for kernels in TorchKernels.__subclasses__() + [TorchKernels]:
        monkeypatch.setattr(kernels, 'piece_bytes', piece_bytes)
    x, weight = torch.randn(6, 5, dtype=torch.float64), torch.randn(4, 5)  # x: more precision than the scales have
    x_scale, zero, w_scale = torch.rand(5) + .1, torch.randn(5), torch.rand(1) + .1  # one scale for all of the weight
    plain, native = both_ways(lambda products, x, weight, x_scale, zero, w_scale: products.linear(
        x, weight, None, QParams(x_scale, zero, -8, 7), QParams(w_scale, None, -8, 7)),
        [x, weight, x_scale, zero, w_scale])
    torch.testing.assert_close(native, plain)


def test_half_precision_under_autocast_is_that_of_torch():
    x, weight = torch.randn(6, 5), torch.randn(4, 5)
    scale, zero, w_scale = torch.rand(5) + .1, torch.randn(5), torch.rand(4, 1) + .1

    def product(products, x, weight, scale, zero, w_scale):
        with torch.autocast('cpu', torch.bfloat16):
            return products.linear(x, weight, None, QParams(scale, zero, -8, 7), QParams(w_scale, None, -8, 7),
                                   gelu=True)

    plain, native = both_ways(product, [x, weight, scale, zero, w_scale])
    assert native[0].dtype == torch.bfloat16
    torch.testing.assert_close(native, plain, rtol=2e-2, atol=2e-2)


def test_the_gradient_of_a_gelu_of_nan_is_zero():
    kernels = ops.get('cpu').kernels
    x = torch.tensor([[torch.nan, -3e38, 1., torch.inf]])
    codes, saved = kernels.centered_codes_and_saved(x, Grid.of(torch.ones(1), torch.zeros(1), -8, 7), gelu=True)
    grad, _ = kernels.backward_(torch.ones(1, 4), codes, saved, Grid.of(torch.ones(1), torch.zeros(1), -8, 7), x)
    assert grad[0, [0, 1, 3]].tolist() == [0., 0., 0.] and grad[0, 2] > 1


def test_gelu_and_its_slope_are_accurate():
    kernels = ops.get('cpu').kernels
    x = torch.cat([torch.linspace(-15, 12, 100001), torch.tensor([0., -0., 10., 9.9999])])[None]
    codes, saved = kernels.centered_codes_and_saved(x, FINE, gelu=True)
    expected = F.gelu(x.double()).clamp(-10, 10)
    # Half a step of the grid, and 12 units of float32's last place at 1.
    assert ((codes * FINE.scale).double() - expected).abs().max() < 1.5e-6
    grad, _ = kernels.backward_(torch.ones_like(x), codes, saved, FINE, x)
    slope = torch.ops.aten.gelu_backward(torch.ones_like(expected), x.double()) * (x <= 10)
    assert (grad.double() - slope).abs().max() < 1e-6


def test_softmax_is_accurate_and_nan_stays_in_its_row():
    kernels, fresh = ops.get('cpu').kernels, lambda *_: None
    scores = torch.randn(2, 3, 33, 33) * torch.tensor([0.1, 3., 40.]).view(3, 1, 1)
    codes, (softmax,), _ = kernels.softmax_codes_and_saved(scores.clone(), FINE, None, torch.float32, fresh)
    torch.testing.assert_close(softmax.double(), scores.double().softmax(-1), rtol=5e-6, atol=1e-30)
    assert (codes * FINE.scale - softmax).abs().max() <= 2. ** -21
    scores[0, 0, 0, 0] = torch.nan
    _, (softmax,), _ = kernels.softmax_codes_and_saved(scores, FINE, None, torch.float32, fresh)
    assert softmax[0, 0, 0].isnan().all() and softmax.isnan().sum() == 33


@pytest.mark.slow
def test_compiled_products_are_those_of_the_kernels():
    quantizers = [QParams(torch.rand(size) * .2 + .1, torch.randn(size), -8, 7) for size in [(6,)] + [(3, 1, 1)] * 4]
    weight, of_weight = torch.randn(4, 6), QParams(torch.rand(4, 1) + .1, None, -8, 7)

    def linear(x, weight):
        return ops.get('cpu').linear(x.transpose(0, 1), weight, None, quantizers[0], of_weight, gelu=True)

    def attention(x):
        q, k, v = x.unflatten(-1, (3, 3, 2)).permute(2, 0, 3, 1, 4)
        return ops.get('cpu').attention(q, k, v, tuple(quantizers[1:]), 2 ** -.5)

    for function, tensors in ((linear, [torch.randn(3, 2, 6), weight]), (attention, [torch.randn(2, 5, 18)])):
        for tensor in tensors:
            tensor.requires_grad_()
        out = function(*tensors)
        grad = torch.randn_like(out)
        compiled = torch.compile(function, fullgraph=True, backend='aot_eager')(*tensors)
        torch.testing.assert_close(compiled, out)
        theirs = torch.autograd.grad(out, tensors, grad)
        torch.testing.assert_close(torch.autograd.grad(compiled, tensors, grad), theirs)


def test_without_a_compiler(monkeypatch, capsys):
    monkeypatch.setattr(ops.registry, '_made', {})
    monkeypatch.setenv('CXX', 'no-such-compiler')
    assert ops.choose(None, torch.device('cpu')) == 'torch'
    assert 'without C++ kernels: no C++ compiler (no-such-compiler)' in capsys.readouterr().out
    with pytest.raises(UserError, match=r'--native-kernels: no C\+\+ compiler \(no-such-compiler\)'):
        ops.choose(True, torch.device('cpu'))
    assert ops.choose(False, torch.device('cpu')) == ops.choose(None, torch.device('cuda')) == 'torch'
