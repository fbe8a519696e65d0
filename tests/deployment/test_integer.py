"""Integer inference against simulated quantization: equal in float64 where it is exact, within bounds where not."""

import pytest
import timm
import torch
from helpers import SHARED
from torchvision.datasets.folder import pil_loader

import quant_vision_transformer  # noqa: F401  registers the variants
from _quan_base import ActQ, Conv2dQ, LinearQ
from calibration.first_batch import calibrate
from checkpoints.files import read_checkpoint
from checkpoints.full_precision import load_full_precision
from datasets import build_transform
from deployment.integer import IntAttention, IntegerViT, IntLinear, Quantizer, fold_weight, int_product
from quant_vision_transformer import QAttention, QuantConfig
from utils import UserError

pytestmark = pytest.mark.usefixtures('one_thread')
RELATIVE = 1e-9
DATA = SHARED / 'data'
DEIT, PHOTOGRAPHS = DATA / 'deit_tiny_patch16_224-fp16.pth', DATA / 'imagenet-mini' / 'val'


def uneven(x, qn, qp):
    """Another scale and zero point for every channel, a random way from the published rule's."""
    scale = 2 * x.abs().mean(1) / qp ** 0.5 * (0.7 + 0.6 * torch.rand(len(x), dtype=x.dtype))
    return scale, 0.5 * (x.amin(1) - scale * qn)


def randomized(module):
    """In float64, with no parameter at the identity that it starts from: a forgotten one shows."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(('bias', '_token', 'pos_embed')):
                parameter.normal_(std=0.3)
            elif 'norm' in name:
                parameter.uniform_(0.5, 1.5)
    return module.double()


def network(**kwargs):
    torch.manual_seed(0)
    shape = {'num_classes': 10, 'img_size': 32, 'patch_size': 8, 'embed_dim': 48, 'depth': 2, 'num_heads': 3}
    model = randomized(timm.create_model('fourbits_deit_tiny_patch16_224', **shape | kwargs))
    calibrate(model, torch.randn(4, 3, 32, 32, dtype=torch.float64), uneven)
    return model.eval()


def linear(bits, weight_bits=4, granularity='channel', kind=LinearQ):
    """A calibrated layer and an input."""
    torch.manual_seed(bits)
    options = {'weight_bits': weight_bits, 'act_bits': bits, 'act_granularity': granularity}
    layer = LinearQ(40, 24, **options) if kind is LinearQ else Conv2dQ(3, 24, 4, 4, **options)
    x = torch.randn(5, 7, 40) if kind is LinearQ else torch.randn(5, 3, 8, 8)
    layer, x = randomized(layer).eval(), x.double()
    calibrate(layer, x, uneven)
    return layer, x


def relative_error(actual, expected):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# --- quantizers and products of integers ------------------------------------------------------------------------------


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_quantizer_has_the_codes_of_the_layer(bits):
    layer, x = linear(bits)
    codes = Quantizer.of(layer.act, 40)(x)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.int(), layer.act.to_int(x) - layer.act.code_range[0])
    assert codes.unique().numel() > 2 ** bits // 6


def test_quantizer_takes_over_the_norm():
    layer, x = linear(4)
    norm = randomized(torch.nn.LayerNorm(40, eps=1e-6))
    codes = Quantizer.of(layer.act, 40, norm).double()(torch.nn.functional.layer_norm(x, (40,), eps=1e-6))
    assert torch.equal(codes.int(), layer.act.to_int(norm(x)) - layer.act.code_range[0])


@pytest.mark.parametrize('levels', [3, 15, 127, 255])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('shape', [(1, 1, 1), (17, 40, 24), (5, 96, 10)])
def test_products_of_integers(levels, dtype, shape):
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(levels)
    codes = torch.randint(0, levels + 1, (rows, inputs), dtype=torch.uint8, generator=generator)
    weight = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    codes[0], weight[0], weight[-1] = levels, -128, 127  # the largest sums; below 2^24, so exact in float32
    product = int_product(codes, weight, levels, dtype)
    expected = codes.long() @ weight.long().T
    assert product.dtype == dtype and torch.equal(product.long(), expected)
    # Less an offset beyond 2^24: taken off in integers, float32 still has every digit of what remains.
    offset = (expected[0] + (1 << 26)).int()
    rest = int_product(codes, weight, levels, dtype, offset)
    assert rest.dtype == dtype and torch.equal(rest[0].long(), torch.full((outputs,), -(1 << 26)))
    assert torch.equal(int_product(codes, weight, levels, torch.float64, offset).long(), expected - offset)


# --- linear layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('terms', [1, 2])
def test_folded_weight_is_within_its_bound(terms):
    weight = torch.randn(6, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight[1], weight[2] = 0., weight[2] * 1e6
    codes, scales = fold_weight(weight, terms)
    assert codes.shape == (terms, 6, 500) and codes.dtype == torch.int8 and codes.min() >= -127
    error = (torch.einsum('tnk,tn->nk', codes.double(), scales) - weight).abs().amax(1)
    largest = weight.abs().amax(1)
    assert (error <= largest / 254 ** terms * (1 + 1e-9)).all()
    assert (error[[0, 2]] > largest[[0, 2]] / 254 ** terms * 0.9).all()  # 500 values come close to the bound


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('kind', [LinearQ, Conv2dQ])
def test_one_scale_per_tensor_is_exact(bits, kind):
    layer, x = linear(bits, weight_bits=bits, granularity='tensor', kind=kind)
    y, integer = layer(x).detach(), IntLinear(layer, 1).double()
    assert integer.exact and torch.equal(integer.weight[0], layer.to_int().flatten(1).to(torch.int8))
    codes = (layer.act.to_int(x) - layer.act.code_range[0]).to(torch.uint8)
    if kind is Conv2dQ:
        codes = torch.nn.functional.unfold(codes.double(), 4, stride=4).mT.to(torch.uint8)  # (B, patches, C h w)
        y = y.flatten(2).mT
    assert relative_error(integer(codes), y) < RELATIVE


def test_channels_that_give_nothing_leave_the_others_exact():
    layer, x = linear(4, weight_bits=4, granularity='tensor')
    one, layer.act = layer.act, ActQ(x.shape[-1], 4).double()
    layer.act.set_qparams(one.scale.expand(x.shape[-1]), one.zero_point.expand(x.shape[-1]), one.signed_codes)
    with torch.no_grad():
        layer.act.alpha[3] = 0
    layer.eval()
    integer = IntLinear(layer, 1).double()
    codes = (layer.act.to_int(x) - layer.act.code_range[0]).to(torch.uint8)
    assert integer.exact and not integer.weight[0, :, 3].any()
    assert relative_error(integer(codes), layer(x).detach()) < 1e-6  # a code of it stands for 1e-8


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('terms', [1, 2])
def test_scales_per_channel_err_within_the_bound(bits, terms):
    layer, x = linear(bits)
    integer = IntLinear(layer, terms).double()
    assert not integer.exact and integer.weight.shape == (terms, 24, 40)
    codes = layer.act.to_int(x) - layer.act.code_range[0]
    error = (integer(codes.to(torch.uint8)) - layer(x).detach()).abs()
    # Every weight errs by at most 1 / 254^terms of the largest of its row, and meets |x_hat / scale| of its input.
    largest = (layer.quantized_weight() * layer.act.scale).abs().amax(1)                     # (24,)
    offsets = (layer.act(x) / layer.act.scale).abs().sum(-1, keepdim=True)                   # (5, 7, 1)
    bound = (offsets * largest / 254 ** terms).detach()
    assert (error <= bound + 1e-12).all()
    assert error.max() > bound.max() / 100


@pytest.mark.parametrize('terms', [1, 2])
def test_an_input_of_zeros_errs_nowhere(terms):
    layer, _ = linear(4)
    with torch.no_grad():  # within the range of codes, so that 0 is one of the values
        layer.act.zero_point.copy_(torch.randint(-8, 8, (40,)))
    codes = (layer.act.to_int(torch.zeros(1, 40, dtype=torch.float64)) - layer.act.code_range[0]).to(torch.uint8)
    assert codes.unique().numel() > 8
    torch.testing.assert_close(IntLinear(layer, terms).double()(codes)[0], layer.bias.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('terms', [1, 2])
def test_folded_bias(terms):
    layer, x = linear(4)
    codes = (layer.act.to_int(x) - layer.act.code_range[0]).to(torch.uint8)
    integer = IntLinear(layer, terms).double()
    product = torch.einsum('bik,tnk,tn->bin', codes.double(), integer.weight.double(), integer.scale)
    torch.testing.assert_close(integer(codes), product + integer.folded_bias, rtol=1e-12, atol=1e-12)


def test_zero_points_beyond_32_bit_sums():
    layer, _ = linear(4)
    with torch.no_grad():
        layer.act.zero_point[3] = 1e9
    with pytest.raises(UserError, match='zero points up to 1000000000 are too large for integer inference'):
        IntLinear(layer, 1)


# --- attention and the network ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('irm', [True, False])
def test_attention_with_scales_per_head(bits, irm):
    torch.manual_seed(bits)
    attention = randomized(QAttention(48, 3, QuantConfig(bits, bits, irm=irm))).eval()
    x = torch.randn(2, 9, 48, dtype=torch.float64)
    calibrate(attention, x, uneven)
    with torch.no_grad():  # those of the two linear layers are alike, so that nothing is approximate
        for act in (attention.qkv.act, attention.proj.act):
            act.alpha.fill_(act.alpha.mean())
        assert all(act.alpha.unique().numel() == 3 for act in (attention.q_act, attention.k_act, attention.v_act))
        expected = attention(x)[0]
    integer = IntAttention(attention, 1).double()
    assert integer.qkv.exact and integer.proj.exact
    assert relative_error(integer(Quantizer.of(attention.qkv.act, 48).double()(x)), expected) < RELATIVE


EXACT = [{'weight_bits': bits, 'act_bits': bits} for bits in (2, 3, 4, 8)] + [
    {'irm': False}, {'quantize_attn': False}, {'quantize_attn': False, 'irm': False}, {'weight_bits': 2, 'act_bits': 8},
    {'depth': 0}]


@pytest.mark.parametrize('kwargs', EXACT, ids=str)
def test_network_with_one_scale_per_tensor_is_exact(kwargs):
    model = network(act_granularity='tensor', **kwargs)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
    integer = IntegerViT(model, dtype=torch.float64)
    assert integer.exact and not integer.training
    assert relative_error(integer(images), expected) < RELATIVE
    assert relative_error(integer(images[:1]), expected[:1]) < RELATIVE


def test_network_with_scales_per_channel_comes_near():
    # 8 bits: few codes flip, so that the error is that of the folded weights.
    model = network(weight_bits=8, act_bits=8)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
    one, two = (relative_error(IntegerViT(model, terms, torch.float64)(images), expected) for terms in (1, 2))
    assert 1e-9 < two < one < 0.1
    integer = IntegerViT(model)
    assert not integer.exact and integer(images).dtype == torch.float32


@pytest.mark.parametrize('kwargs', [{}, {'quantize_attn': False}], ids=str)
def test_the_simulated_network_stays_as_it_was(kwargs):
    model = network(**kwargs)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    IntegerViT(model, dtype=torch.float32)(torch.randn(1, 3, 32, 32))
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name


def test_what_is_refused():
    model = timm.create_model('fourbits_deit_tiny_patch16_224', depth=1, img_size=32)
    with pytest.raises(UserError, match='no steps yet'):
        IntegerViT(model)
    with pytest.raises(UserError, match='3 terms of a folded weight: choose 1 or 2'):
        IntegerViT(network(), 3)
    with pytest.raises(UserError, match='no heads'):
        IntegerViT(network(num_classes=0))


@pytest.mark.slow
@pytest.mark.skipif(not (DEIT.is_file() and PHOTOGRAPHS.is_dir()), reason='the DeiT-Tiny weights or photographs are '
                                                                         'not here')
def test_deit_on_photographs_is_exact():
    transform = build_transform(False, 224)
    paths = sorted(PHOTOGRAPHS.glob('*/*'))[::200]
    images = torch.stack([transform(pil_loader(path)) for path in paths]).double()
    assert len(images) >= 3
    model = timm.create_model('fourbits_deit_tiny_patch16_224', act_granularity='tensor')
    load_full_precision(model, read_checkpoint(DEIT))
    calibrate(model.double(), images)
    with torch.no_grad():
        expected = model.eval()(images)
    assert relative_error(IntegerViT(model, dtype=torch.float64)(images), expected) < RELATIVE
    assert expected.argmax(1).unique().numel() > 1
