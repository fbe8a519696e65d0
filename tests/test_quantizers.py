"""LSQ in float64 against formulas written out by hand, and the layers that compose it."""
import copy
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from _quan_base import ActQ, Conv2dQ, LinearQ, UncalibratedError, clamp_steps_, first_batch_rule
from calibration.first_batch import calibrate

pytestmark = pytest.mark.usefixtures('implementation')
SHAPES = {'2-D': (6, 5), '3-D': (2, 3, 5), '4-D': (2, 5, 3, 4)}  # five channels each
LAYER = {'weight_bits': 3, 'act_bits': 4}


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def per_channel(values: torch.Tensor, ndim: int) -> torch.Tensor:
    return values.view(-1, 1, 1) if ndim == 4 else values


def by_hand(x, alpha, z, qn, qp, upstream):
    """Value and gradients of every element by the cases below, within and above the range."""
    x_hat, grad_x = torch.empty_like(x), torch.empty_like(x)
    grad_alpha, grad_z = torch.zeros_like(alpha), torch.zeros_like(z)
    scale = 1 / (x.numel() * qp) ** 0.5
    for index in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        index = tuple(index)
        channel = index[1] if x.ndim == 4 else index[-1]
        a, zero, g = alpha[channel].item(), round(z[channel].item()), upstream[index].item()
        position = x[index].item() / a + zero
        if position < qn:
            x_hat[index], grad_x[index] = (qn - zero) * a, 0
            grad_alpha[channel] += g * (qn - zero) * scale
            grad_z[channel] -= g * a * scale
        elif position > qp:
            x_hat[index], grad_x[index] = (qp - zero) * a, 0
            grad_alpha[channel] += g * (qp - zero) * scale
            grad_z[channel] -= g * a * scale
        else:
            x_hat[index], grad_x[index] = (round(position) - zero) * a, g
            grad_alpha[channel] += g * (round(position) - zero - x[index].item() / a) * scale
    return x_hat, grad_x, grad_alpha, grad_z


@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize('signed', [True, False])
@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_activation_values_and_gradients_by_hand(shape, signed, bits):
    act = ActQ(5, bits)
    calibrate_to(act, torch.rand(5) * 0.5 + 0.1, torch.randn(5) * 2, signed)
    qn, qp = act.code_range
    x = torch.randn(shape) * per_channel(act.alpha.detach(), len(shape)) * (qp - qn) * (0.7 if signed else 1)
    x.view(-1)[:3] = per_channel(act.alpha.detach(), len(shape)).flatten()[0] * 1e3 * torch.tensor([1., -1., 0.])
    x.requires_grad_()
    upstream = torch.randn(shape)
    out = act(x)
    out.backward(upstream)
    alpha, zero_point = act.alpha.detach(), act.zero_point.detach()
    x_hat, grad_x, grad_alpha, grad_z = by_hand(x.detach(), alpha, zero_point, qn, qp, upstream)
    inside = grad_x != 0
    assert inside.any() and not inside.all(), 'the test is to meet both cases'
    torch.testing.assert_close(out.detach(), x_hat, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, grad_x, rtol=1e-12, atol=0)
    torch.testing.assert_close(act.alpha.grad, grad_alpha, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(act.zero_point.grad, grad_z, rtol=1e-10, atol=1e-12)


def calibrate_to(act: ActQ, alpha, zero_point, signed: bool) -> None:
    act.load_state_dict({'alpha': alpha, 'zero_point': zero_point, 'init_state': torch.ones(1),
                         'signed': torch.tensor([float(signed)])})


@pytest.mark.parametrize(('signed', 'x', 'code', 'grad'), [
    (True, -8.0, -8, 1), (True, 7.0, 7, 1), (True, 7.49, 7, 0), (True, -8.1, -8, 0), (True, 0.5, 0, 1),
    (True, 1.5, 2, 1), (True, -0.5, 0, 1), (False, 0.0, 0, 1),
    (False, -1e-9, 0, 0), (False, 15.0, 15, 1), (False, 15.01, 15, 0)])
def test_borders_belong_to_the_range_and_ties_go_to_even(signed, x, code, grad):
    act = ActQ(1, 4)
    calibrate_to(act, torch.ones(1), torch.zeros(1), signed)
    value = torch.full((1, 1), x, requires_grad=True)
    act(value).sum().backward()
    assert act.to_int(value).item() == code
    assert value.grad.item() == grad


@pytest.mark.parametrize('make', [lambda: LinearQ(5, 4, **LAYER), lambda: Conv2dQ(5, 4, 2, 2, **LAYER),
                                  lambda: Conv2dQ(5, 4, 3, 1, padding=1, **LAYER)], ids=['linear', 'patches', 'conv'])
def test_weight_gradients_by_hand(make):
    layer = make()
    x = torch.randn(2, 5, 8, 8) if isinstance(layer, Conv2dQ) else torch.randn(2, 3, 5)
    calibrate(layer, x)
    with torch.no_grad():
        layer.alpha.mul_(0.5)  # so that some weights are clipped
    out = layer.train()(x)
    upstream = torch.randn_like(out)
    out.backward(upstream)

    # The gradient of w_hat, from a full-precision layer of quantized operands.
    w_hat, x_hat = layer.quantized_weight().requires_grad_(), layer.act(x).detach()
    plain = F.linear(x_hat, w_hat, layer.bias) if not isinstance(layer, Conv2dQ) else F.conv2d(
        x_hat, w_hat, layer.bias, layer.stride, layer.padding)
    torch.testing.assert_close(out, plain)
    plain.backward(upstream)
    rows = layer.weight.detach().flatten(1).t()  # channels last, as `by_hand` takes them
    qn, qp = layer.code_range
    _, grad_w, grad_alpha, _ = by_hand(rows, layer.alpha.detach(), torch.zeros_like(layer.alpha), qn, qp,
                                       w_hat.grad.flatten(1).t())
    assert (grad_w == 0).any()
    torch.testing.assert_close(layer.weight.grad.flatten(1), grad_w.t(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.alpha.grad, grad_alpha, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('bits', [2, 3, 4])
@pytest.mark.parametrize('granularity', ['channel', 'tensor'])
def test_codes_are_few_and_times_the_step_are_the_value(bits, granularity):
    x = torch.randn(16, 40, 6)
    act = ActQ(6, bits, granularity)
    calibrate(act, x)
    codes = act.to_int(x)
    assert codes.dtype == torch.int32
    assert all(len(codes[..., channel].unique()) <= 2 ** bits for channel in range(6))
    assert len(codes.unique()) > 2
    torch.testing.assert_close((codes - act.zero_point.round()) * act.alpha, act(x), rtol=0, atol=0)

    layer = LinearQ(6, 8, weight_bits=bits, act_bits=bits)
    calibrate(layer, x)
    codes = layer.to_int()
    assert all(len(row.unique()) <= 2 ** bits for row in codes)
    torch.testing.assert_close(codes * layer.alpha[:, None], layer.quantized_weight(), rtol=0, atol=0)


def test_signedness_is_found_at_calibration():
    act = ActQ(3, 4)
    calibrate(act, torch.linspace(0, 1, 24).view(8, 3))
    assert act.code_range == (0, 15) and act.signed.item() == 0
    calibrate(act, torch.linspace(-1e-6, 1, 24).view(8, 3))
    assert act.code_range == (0, 15)
    calibrate(act, torch.linspace(-1e-3, 1, 24).view(8, 3))
    assert act.code_range == (-8, 7) and act.signed.item() == 1


def test_host_state_follows_loads_copies_and_pickles():
    x = torch.randn(8, 3)
    act = ActQ(3, 4)
    calibrate(act, x)
    for twin in (copy.deepcopy(act), pickle.loads(pickle.dumps(act)), copy.deepcopy(act).float().double()):
        assert twin.calibrated and twin.code_range == (-8, 7)
        torch.testing.assert_close(twin.eval()(x), act(x), rtol=1e-6, atol=1e-6)
    fresh = ActQ(3, 4)
    fresh.load_state_dict(act.state_dict())
    assert fresh.calibrated and fresh.code_range == (-8, 7)
    act.load_state_dict(ActQ(3, 4).state_dict())
    assert not act.calibrated


def test_uncalibrated_evaluation_names_the_call_to_make():
    for module, x in ((ActQ(3, 4), torch.randn(2, 3)), (LinearQ(3, 2, **LAYER), torch.randn(2, 3))):
        with pytest.raises(UncalibratedError, match=r'calibrate\(model, images\)'):
            module.eval()(x)
        assert torch.isfinite(module.train()(x)).all()  # the first batch of training calibrates
        module.eval()(x)


def test_a_calibration_that_misses_a_quantizer_says_which():
    model = nn.ModuleDict({'used': ActQ(3, 4), 'idle': ActQ(3, 4)})
    model.forward = lambda x: model['used'](x)
    with pytest.raises(UncalibratedError, match='idle'):
        calibrate(model, torch.randn(2, 3))


def test_calibration_keeps_the_modes_and_takes_another_rule():
    layer = nn.Sequential(nn.Dropout(0.5), LinearQ(3, 2, **LAYER))
    layer.train()[0].eval()
    calibrate(layer, torch.randn(4, 3), lambda x, qn, qp: (x.abs().amax(1) / qp, torch.tensor(1.)))
    assert layer[1].training and not layer[0].training
    torch.testing.assert_close(layer[1].alpha.detach(), layer[1].weight.detach().abs().amax(1) / 3)
    assert torch.all(layer[1].act.zero_point == 1)


@pytest.mark.parametrize('constant', [0., 1., -1.])
def test_constant_inputs_stay_finite(constant):
    layer = LinearQ(3, 2, **LAYER)
    x = torch.full((4, 3), constant, requires_grad=True)
    with torch.no_grad():
        layer.weight.fill_(constant)
    out = layer.train()(x)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())
    assert all((step > 0).all() for step in (layer.alpha, layer.act.alpha))


def test_nan_is_not_hidden():
    layer = LinearQ(3, 2, **LAYER)
    with pytest.raises(ValueError, match='NaN'):
        calibrate(layer, torch.full((4, 3), torch.nan))
    x = torch.randn(4, 3)
    calibrate(layer, x)
    x[1, 1] = torch.nan
    out = layer.train()(x)
    assert torch.isnan(out[1]).all() and torch.isfinite(out[0]).all()


@pytest.mark.parametrize('step', [0., -1.])
def test_a_step_that_an_optimizer_made_non_positive(step):
    layer, x = LinearQ(3, 2, **LAYER), torch.randn(4, 3, requires_grad=True)
    calibrate(layer, x.detach())
    with torch.no_grad():
        layer.alpha.fill_(step)
        layer.act.alpha.fill_(step)
    out = layer.train()(x)
    out.square().sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())
    clamp_steps_(layer)
    assert (layer.alpha > 0).all() and (layer.act.alpha > 0).all()


def test_steps_are_learned_and_stay_positive():
    layer, x = LinearQ(3, 2, **LAYER), torch.randn(4, 3)
    calibrate(layer, x)
    before = layer.alpha.detach().clone(), layer.act.alpha.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=50.)
    for _ in range(5):
        optimizer.zero_grad()
        layer.train()(x).square().sum().backward()
        optimizer.step()
        clamp_steps_(layer)
        assert (layer.alpha > 0).all() and (layer.act.alpha > 0).all()
    assert (layer.alpha != before[0]).all() and (layer.act.alpha != before[1]).any()


CHANGES = {
    'optimizer step': lambda layer: torch.optim.SGD(layer.parameters(), lr=1.).step(),
    'copy_': lambda layer: layer.weight.copy_(torch.randn_like(layer.weight)),
    'step': lambda layer: layer.alpha.mul_(2),
    'load': lambda layer: layer.load_state_dict({**layer.state_dict(), 'weight': torch.randn_like(layer.weight)}),
    'new parameter': lambda layer: setattr(layer, 'weight', nn.Parameter(torch.randn_like(layer.weight))),
    'data and eval()': lambda layer: (layer.weight.data.mul_(-1), layer.eval()),
}


@pytest.mark.parametrize('make', [lambda: LinearQ(4, 2, **LAYER), lambda: Conv2dQ(4, 2, 2, 2, **LAYER),
                                  lambda: Conv2dQ(4, 2, 3, **LAYER)], ids=['linear', 'patches', 'conv'])
@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_the_quantized_weight_is_computed_once_in_evaluation(monkeypatch, make, change):
    layer = make()
    x = torch.randn(2, 4, 4, 4) if isinstance(layer, Conv2dQ) else torch.randn(2, 4)
    calibrate(layer, x)
    layer(x).sum().backward()
    layer.eval()
    calls = []
    original = type(layer).quantized_weight
    monkeypatch.setattr(type(layer), 'quantized_weight', lambda self: calls.append(1) or original(self))
    with torch.no_grad():
        for _ in range(3):
            before = layer(x)
        assert len(calls) == 1
        change(layer)
        after = layer(x)
        assert len(calls) == 2 and not torch.equal(before, after)
        torch.testing.assert_close(after, copy.deepcopy(layer)(x))


def test_the_quantized_weight_follows_the_dtype_and_gradients_flow_in_evaluation():
    layer, x = LinearQ(3, 2, **LAYER), torch.randn(4, 3)
    calibrate(layer, x)
    layer.eval()(x)
    assert layer.float()(x.float()).dtype == torch.float32
    layer.double()(x).sum().backward()
    in_evaluation = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    layer.train()(x).sum().backward()
    for mine, parameter in zip(in_evaluation, layer.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)


def test_a_linear_layer_of_four_axes_has_its_channels_last():
    layer, x = LinearQ(5, 2, **LAYER), torch.randn(2, 3, 4, 5)
    calibrate(layer, x)
    torch.testing.assert_close(layer(x), layer(x.flatten(0, 2)).view(2, 3, 4, 2))


def test_bits_and_granularity_are_checked():
    with pytest.raises(ValueError, match='9 bits'):
        ActQ(3, 9)
    with pytest.raises(ValueError, match="'row'"):
        ActQ(3, 4, 'row')


def test_extra_repr_says_bits_range_and_state():
    act = ActQ(3, 4)
    assert 'bits=4' in repr(act) and 'not calibrated' in repr(act)
    calibrate(act, torch.rand(2, 3))
    assert '[0, 15]' in repr(act) and 'not calibrated' not in repr(act)


def test_the_first_batch_rule_by_hand():
    x = torch.tensor([[1., -3.], [2., 2.]])
    step, zero = first_batch_rule(x, -8, 7)
    assert step.item() == pytest.approx(2 * 2 / 7 ** 0.5)
    assert zero.item() == pytest.approx(0.1 * (-3 + 8 * step.item()))
