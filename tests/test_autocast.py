"""Quantized modules under bfloat16 autocast against the same modules in float64."""
import copy

import pytest
import torch
from torch import Tensor, nn

from _quan_base import ActQ, Conv2dQ, GeluLinearQ, LinearQ
from calibration.first_batch import calibrate
from ops import clipped_gelu
from ops.torch_kernels import TorchKernels
from quant_vision_transformer import QAttention, QBlock, QMlp, QuantConfig

pytestmark = pytest.mark.usefixtures('implementation')
LAYER, QUANT = {'weight_bits': 4, 'act_bits': 4}, QuantConfig(4, 4)
TOKENS, IMAGES = (8, 20, 32), (2, 3, 8, 8)
LAYERS = {  # module, shape of its input
    'ActQ': (lambda: ActQ(32, 4), TOKENS),
    'LinearQ': (lambda: LinearQ(32, 8, **LAYER), TOKENS),
    'Conv2dQ of patches': (lambda: Conv2dQ(3, 8, 4, 4, **LAYER), IMAGES),
    'Conv2dQ': (lambda: Conv2dQ(3, 8, 3, padding=1, **LAYER), IMAGES),
}
CHAINS = {  # of layers that quantize what others computed in bfloat16
    'QMlp': lambda: QMlp(32, 64, QUANT),
    'QAttention': lambda: QAttention(32, 2, QUANT),
    'QBlock': lambda: QBlock(32, 2, QUANT),
}


def output_and_gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = module(x)
    out = out[0] if isinstance(out, tuple) else out
    names, parameters = zip(*module.named_parameters(), strict=True)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(out, [x, *parameters], upstream.to(out.dtype))
    return {'output': out, 'x': gradients[0], **dict(zip(names, gradients[1:], strict=True))}


def errors(module: nn.Module, shape: tuple[int, ...]) -> dict[str, float]:
    """Relative errors of the output and of every gradient, whose dtypes are checked."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    calibrate(module, x)
    x *= 1.5  # some values are clipped: zero points get gradients
    exact = output_and_gradients(copy.deepcopy(module).double(), x.double())
    with torch.autocast('cpu', torch.bfloat16):
        half = output_and_gradients(module, x)
    products = isinstance(module, LinearQ | Conv2dQ | QMlp | QAttention)
    assert half['output'].dtype == (torch.bfloat16 if products else torch.float32)
    assert all(half[name].dtype == torch.float32 for name in half if name != 'output')
    return {name: ((half[name].double() - value).norm() / value.norm()).item() for name, value in exact.items()}


@pytest.mark.parametrize('name', LAYERS)
def test_a_layer_has_the_error_of_bfloat16_products(name):
    make, shape = LAYERS[name]
    found = errors(make(), shape)
    assert all(error <= 0.01 for error in found.values()), found


class Composed(nn.Module):
    """A layer of clipped_gelu(x), as two steps."""

    def __init__(self, layer: LinearQ) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.linear(clipped_gelu(x))


def test_pieces_of_a_gelu_in_half_precision(monkeypatch):
    for kernels in TorchKernels.__subclasses__() + [TorchKernels]:
        monkeypatch.setattr(kernels, 'piece_bytes', 5 * 32 * 4)
    torch.manual_seed(0)
    layer, x = GeluLinearQ(32, 8, **LAYER), torch.randn(TOKENS).bfloat16()
    calibrate(layer, x.float())
    with torch.autocast('cpu', torch.bfloat16):
        fused = output_and_gradients(layer, x)
        composed = output_and_gradients(Composed(layer), x)
    for name, value in fused.items():
        torch.testing.assert_close(value, composed[name if name in ('output', 'x') else f'layer.{name}'])


@pytest.mark.parametrize('name', CHAINS)
def test_a_chain_of_layers_is_near_where_some_codes_differ(name):
    found = {key: error for key, error in errors(CHAINS[name](), TOKENS).items()
             if key in ('output', 'x') or key.endswith('weight')}
    assert all(error <= 0.2 for error in found.values()), found
