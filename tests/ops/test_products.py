"""Every implementation of the products against the reference, in float64: values, gradients, and what is kept."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import ops
from _quan_base import LinearQ, QParams, code_range
from calibration.first_batch import calibrate
from ops.torch_kernels import TorchKernels
from quant_vision_transformer import QMlp, QuantConfig

REFERENCE = ops.get('reference')
LAYER = {'weight_bits': 3, 'act_bits': 4}


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=['whole', 'pieces'])
def pieces(request, monkeypatch):
    """The products compute the batch at once, or item by item."""
    if request.param == 'pieces':
        for kernels in TorchKernels.__subclasses__() + [TorchKernels]:
            monkeypatch.setattr(kernels, 'piece_bytes', 1)


def random_qparams(*shape: int, bits: int, signed: bool, weight: bool = False) -> QParams:
    scale = (torch.rand(shape) * 0.2 + 0.1).requires_grad_()
    return QParams(scale, None if weight else torch.randn(shape).requires_grad_(), *code_range(bits, signed))


def gelu_at_most_10(x: torch.Tensor) -> torch.Tensor:
    """The GELU, clipped; 10 itself is inside, which versions of torch.clamp see differently."""
    y = F.gelu(x)
    return torch.where(y > 10, 10., y)


def assert_equal_in_value_and_gradients(ours, theirs, tensors: list, shape: tuple) -> list:
    """Returns the reference's gradients."""
    upstream = torch.randn(shape)
    mine, other = ours(), theirs()
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(other, tensors, upstream)
    for got, wanted in zip(torch.autograd.grad(mine, tensors, upstream), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    return expected


@pytest.mark.parametrize('shape', [(6, 5), (2, 3, 5), (2, 5, 3, 4)], ids=str)
@pytest.mark.parametrize('signed', [True, False])
@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_fake_quantization(implementation, shape, signed, bits):
    q = random_qparams(*(5, 1, 1)[:max(1, len(shape) - 1) if len(shape) == 4 else 1], bits=bits, signed=signed)
    x = (torch.randn(shape) * 2 ** bits * 0.2).requires_grad_()
    assert_equal_in_value_and_gradients(lambda: ops.get(implementation).fake_quantize(x, q),
                                        lambda: REFERENCE.fake_quantize(x, q), [x, q.scale, q.zero_point], shape)
    codes = ops.get(implementation).codes(x, q)
    assert codes.dtype == torch.int32 and torch.equal(codes, q.codes(x))


@pytest.mark.usefixtures('pieces')
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('per_tensor', [False, True])
@pytest.mark.parametrize('gelu', [False, True])
def test_linear(implementation, bias, per_tensor, gelu):
    x, weight = torch.randn(4, 6, 7) * 3, torch.randn(3, 7, requires_grad=True)
    x[0, 0] = torch.tensor([9.9, 10.1, 25., -10.1, -25., 0., 10.])  # where the GELU is clipped, and where it is not
    x.requires_grad_()
    qx = random_qparams(1 if per_tensor else 7, bits=8, signed=True)
    qw = random_qparams(3, 1, bits=3, signed=True, weight=True)
    b = torch.randn(3, requires_grad=True) if bias else None
    tensors = [x, weight, qx.scale, qx.zero_point, qw.scale] + [b] * bias
    grad_x, *_ = assert_equal_in_value_and_gradients(
        lambda: ops.get(implementation).linear(x, weight, b, qx, qw, gelu=gelu),
        lambda: F.linear(REFERENCE.fake_quantize(gelu_at_most_10(x) if gelu else x, qx),
                         REFERENCE.fake_quantize(weight, qw), b), tensors, (4, 6, 3))
    assert (grad_x[0, 0, 2] == 0) or not gelu


@pytest.mark.parametrize(('stride', 'padding', 'groups'), [(2, 0, 1), (1, 1, 1), (2, 0, 2)])
def test_convolution(implementation, stride, padding, groups):
    x, weight = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(6, 4 // groups, 2, 2, requires_grad=True)
    qx, qw = random_qparams(4, 1, 1, bits=8, signed=True), random_qparams(6, 1, 1, 1, bits=3, signed=True, weight=True)
    at = (stride, stride), (padding, padding), (1, 1), groups
    side = (6 + 2 * padding - 2) // stride + 1
    assert_equal_in_value_and_gradients(
        lambda: ops.get(implementation).conv2d(x, weight, None, qx, qw, *at),
        lambda: F.conv2d(REFERENCE.fake_quantize(x, qx), REFERENCE.fake_quantize(weight, qw), None, *at),
        [x, weight, qx.scale, qx.zero_point, qw.scale], (2, 6, side, side))


@pytest.mark.usefixtures('pieces')
@pytest.mark.parametrize('with_dropout', [False, True])
@pytest.mark.parametrize('per_tensor', [False, True])
def test_attention(implementation, with_dropout, per_tensor):
    q, k, v = (torch.randn(5, 5, 3, 4).transpose(1, 2).requires_grad_() for _ in range(3))  # (B, H, N, d), strided
    quantizers = tuple(random_qparams(1 if per_tensor else 3, 1, 1, bits=4, signed=signed)
                       for signed in (True, True, True, False))
    dropout = F.dropout(torch.ones(5, 3, 5, 5), 0.3) if with_dropout else None

    def composed():
        of_q, of_k, of_v, of_attn = (lambda x, q=q: REFERENCE.fake_quantize(x, q) for q in quantizers)
        attn = (of_q(q) @ of_k(k).mT * 0.5).softmax(-1)
        return of_attn(attn if dropout is None else attn * dropout) @ of_v(v)

    tensors = [q, k, v] + [tensor for each in quantizers for tensor in (each.scale, each.zero_point)]
    assert_equal_in_value_and_gradients(lambda: ops.get(implementation).attention(q, k, v, quantizers, 0.5, dropout),
                                        composed, tensors, (5, 3, 5, 4))


def test_gram_distance(implementation):
    a, b = torch.randn(1, 3, 2, 9, 4, requires_grad=True), torch.randn(1, 3, 2, 9, 6)
    assert_equal_in_value_and_gradients(lambda: ops.get(implementation).gram_distance(a, b),
                                        lambda: REFERENCE.gram_distance(a, b), [a], (1, 3, 2))


def test_a_weight_that_is_given_stands_in_for_the_quantized_one(implementation):
    x, weight, given = torch.randn(4, 7), torch.randn(3, 7), torch.randn(3, 7)
    qx, qw = random_qparams(7, bits=4, signed=True), random_qparams(3, 1, bits=3, signed=True, weight=True)
    with torch.no_grad():
        out = ops.get(implementation).linear(x, weight, None, qx, qw, w_hat=given)
        torch.testing.assert_close(out, REFERENCE.fake_quantize(x, qx) @ given.mT)


def test_an_unknown_implementation_is_refused_and_the_known_ones_named():
    with pytest.raises(ValueError, match="'cuda'.*reference, torch, cpu"):
        ops.use(nn.Linear(2, 2), 'cuda')


def test_a_network_computes_by_the_implementation_that_it_is_told():
    mlp, x = QMlp(8, 16, QuantConfig(4, 4)), torch.randn(2, 3, 8)
    calibrate(mlp, x)
    ops.use(mlp, 'reference')
    assert {module.implementation for module in mlp.modules() if hasattr(module, 'implementation')} == {'reference'}
    expected = mlp(x)
    ops.use(mlp, 'torch')
    torch.testing.assert_close(mlp(x), expected)


def kept_bytes(forward) -> int:
    """Bytes of all storages that autograd keeps for the backward."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep = forward()
    return sum(storages.values()) if keep is not None else 0


def test_training_keeps_what_full_precision_keeps(implementation):
    if implementation == 'reference':
        pytest.skip('the reference keeps quantized copies')
    x, plain, layer = torch.randn(64, 50, 32, requires_grad=True), nn.Linear(32, 64), LinearQ(32, 64, **LAYER)
    calibrate(layer, x)
    qparams = sum(tensor.nbytes for tensor in (layer.alpha, layer.act.alpha, layer.act.zero_point))
    assert kept_bytes(lambda: layer.train()(x)) <= kept_bytes(lambda: plain(x)) + qparams

    mlp, fc1, fc2 = QMlp(32, 128, QuantConfig(4, 4)), nn.Linear(32, 128), nn.Linear(128, 32)
    calibrate(mlp, x)
    hidden = x.nbytes // 32 * 128  # GELU's output, which the quantized one does not keep
    assert kept_bytes(lambda: mlp.train()(x)) < kept_bytes(lambda: fc2(F.gelu(fc1(x)))) - 0.9 * hidden

    q = torch.randn(2, 3, 200, 8, requires_grad=True)
    quantizers = tuple(random_qparams(3, 1, 1, bits=4, signed=True) for _ in range(4))
    kept = kept_bytes(lambda: ops.get(implementation).attention(q, q, q, quantizers, 1.))
    assert kept < 2 * q.nbytes  # and no 200 x 200 map
