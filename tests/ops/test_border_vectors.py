"""Values on the borders between codes and of the range, through every implementation: codes, values, gradients by hand.

The scales are powers of two, so that every position is exact in every implementation.
"""
import pytest
import torch

import ops
from _quan_base import QParams

SIGNED = (-2, 1)  # 2 bits
# Position of x on the grid: its code by rounding to even within [-2, 1], and whether the gradient passes.
CASES = [(-3., -2, 0), (-2.5, -2, 0), (-2., -2, 1), (-1.5, -2, 1), (-1., -1, 1), (-.5, 0, 1), (0., 0, 1), (.5, 0, 1),
         (1., 1, 1), (1.5, 1, 0), (2., 1, 0)]


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('zero_point', [0, 1, -3])
@pytest.mark.parametrize('scale', [0.25, 1., 8.])
def test_an_activation(implementation, zero_point, scale):
    positions, codes, passes = (torch.tensor(values, dtype=torch.float64) for values in zip(*CASES, strict=True))
    x = ((positions - zero_point) * scale).view(1, -1, 1).requires_grad_()                       # (1, 11, 1)
    q = QParams(torch.full((1,), scale, requires_grad=True), torch.full((1,), zero_point + .3, requires_grad=True),
                *SIGNED)
    x_hat = ops.get(implementation).fake_quantize(x, q)
    assert torch.equal(ops.get(implementation).codes(x, q).flatten(), codes.int())
    assert torch.equal(x_hat.flatten(), (codes - zero_point) * scale)
    grad_x, grad_scale, grad_zero = torch.autograd.grad(x_hat.sum(), [x, q.scale, q.zero_point])
    assert torch.equal(grad_x.flatten(), passes)
    factor = (len(CASES) * SIGNED[1]) ** -0.5
    # d scale: c - zero_point - (p - zero_point) inside, c - zero_point outside; d zero_point: -scale outside, else 0.
    of_scale = (codes - zero_point - passes * (positions - zero_point)).sum() * factor
    torch.testing.assert_close(grad_scale.squeeze(), of_scale, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_zero.squeeze(), (passes - 1).sum() * scale * factor, rtol=1e-12, atol=1e-12)


def test_a_weight_in_a_product(implementation):
    """One output channel whose weights are the border vector, times inputs that 8 bits hold exactly."""
    positions, codes, passes = (torch.tensor(values, dtype=torch.float64) for values in zip(*CASES, strict=True))
    weight = (positions * .5).view(1, -1).requires_grad_()
    x = torch.arange(1., len(CASES) + 1).view(1, -1)
    qx = QParams(torch.ones(1), torch.zeros(1), 0, 255)
    out = ops.get(implementation).linear(x, weight, None, qx, QParams(torch.full((1, 1), .5), None, *SIGNED))
    assert out.item() == (codes * .5 * x).sum()
    grad, = torch.autograd.grad(out, weight)
    assert torch.equal(grad, passes * x)


def test_zeros_of_an_attention_have_their_gradients(implementation):
    """Unsigned probabilities: a value of exactly qn is inside the range."""
    x = torch.tensor([0., 1., 3., 3.5]).view(1, 1, 2, 2).requires_grad_()
    q = QParams(torch.ones(1, 1, 1), torch.zeros(1, 1, 1), 0, 3)
    grad, = torch.autograd.grad(ops.get(implementation).fake_quantize(x, q).sum(), x)
    assert grad.flatten().tolist() == [1., 1., 1., 0.]


def test_scales_of_zero_and_below_count_as_the_smallest(implementation):
    x = torch.tensor([[1e-9, -1e-9, 5.]]).requires_grad_()
    for scale in (0., -1.):
        q = QParams(torch.full((1,), scale, requires_grad=True), torch.zeros(1), -8, 7)
        x_hat = ops.get(implementation).fake_quantize(x, q)
        torch.testing.assert_close(x_hat, torch.tensor([[0., 0., 7e-8]]), rtol=1e-6, atol=1e-15)
        assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(x_hat.sum(), [x, q.scale]))
