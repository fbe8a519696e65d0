"""Parts of ONNX graphs of quantized networks: nodes and constants, codes of activations, linear layers of codes.

A product of codes is written as DequantizeLinear -> MatMul <- DequantizeLinear. Runtimes fuse these nodes into a
product of integers: of uint8 codes with int8 ones, or with weight codes that have one scale per output channel.
"""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
import torch.nn as nn
from onnx import TensorProto, helper
from torch import Tensor

from _quan_base import Conv2dQ, LinearQ
from deployment.integer import IntLinear, Quantizer, UnsignedCodes

__all__ = ['ONE', 'ZERO', 'Affine', 'Codes', 'Graph', 'Linear', 'collapsed', 'normalized_codes', 'to_codes']

GELU_OPSET = 20
UINT8, INT8 = np.dtype(np.uint8), np.dtype(np.int8)
ONE, ZERO = torch.ones(1).double(), torch.zeros(1).double()


class Graph:
    """The nodes and constants of a graph under construction. Values are names, which begin with `scope`."""

    def __init__(self, opset: int) -> None:
        self.opset, self.nodes, self.constants, self.scope, self._counts = opset, [], {}, '', Counter()

    def const(self, value: Any, dtype: Any = np.float32, bits: int | None = None) -> str:
        """Adds a constant, as INT4 with `bits=4`; small constants of equal value are stored once."""
        array = value.detach().double().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        array = np.ascontiguousarray(array.astype(dtype)).reshape(array.shape)
        name = self._name('constant')
        key = (array.tobytes(), array.shape, array.dtype) if array.size < 10 else name
        if key not in self.constants:
            if bits == 4:
                flat = np.pad(array.ravel(), (0, array.size % 2)).view(np.uint8) & 15
                tensor = helper.make_tensor(name, TensorProto.INT4, array.shape,
                                            (flat[::2] | flat[1::2] << 4).tobytes(), raw=True)
            else:
                tensor = onnx.numpy_helper.from_array(array, name)
            self.constants[key] = tensor
        return self.constants[key].name

    def op(self, kind: str, *inputs: str, outputs: int = 1, name: str | None = None, **attributes: Any) -> Any:
        """Adds a node, and returns the name of its output, or a list of them where there are several."""
        node = self._name(kind)
        names = [name or node] if outputs == 1 else [f'{node}_{i}' for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=node, **attributes))
        return names[0] if outputs == 1 else names

    def _name(self, kind: str) -> str:
        name = f'{self.scope}/{kind}' if self.scope else kind
        self._counts[name] += 1
        return f'{name}_{self._counts[name]}'

    def times(self, x: str, scale: Tensor) -> str:
        return x if bool((scale == 1).all()) else self.op('Mul', x, self.const(scale))

    def plus(self, x: str, shift: Tensor) -> str:
        return x if bool((shift == 0).all()) else self.op('Add', x, self.const(shift))

    def layer_norm(self, x: str, width: int, eps: float, scale: Tensor = ONE, shift: Tensor = ZERO) -> str:
        return self.op('LayerNormalization', x, self.const(scale.expand(width)), self.const(shift.expand(width)),
                       axis=-1, epsilon=eps)

    def clip(self, x: str, low: Tensor, high: Tensor) -> str:
        """Clips x to bounds that broadcast against it."""
        if low.numel() == high.numel() == 1:
            return self.op('Clip', x, self.const(low.reshape(())), self.const(high.reshape(())))
        return self.op('Min', self.op('Max', x, self.const(low)), self.const(high))

    def gelu(self, x: str) -> str:
        if self.opset >= GELU_OPSET:
            return self.op('Gelu', x)
        error = self.op('Erf', self.op('Div', x, self.const(math.sqrt(2))))
        return self.op('Mul', self.op('Mul', x, self.op('Add', error, self.const(1.))), self.const(.5))

    def reshape(self, x: str, *shape: int) -> str:
        return self.op('Reshape', x, self.const(shape, np.int64))

    def transpose(self, x: str, *axes: int) -> str:
        return self.op('Transpose', x, perm=list(axes))


class Affine(NamedTuple):
    """How x becomes codes c = round(clamp(scale x + shift, 0, levels)) - zero.

    The tensors broadcast against x; `zero` holds whole numbers.
    """
    scale: Tensor
    shift: Tensor
    levels: int
    zero: Tensor = ZERO

    @classmethod
    def of(cls, quant: Quantizer, zero: Tensor = ZERO, gain: Tensor = ONE) -> Affine:
        """The codes that `quant` gives to `gain` x, less `zero`."""
        return cls(quant.scale.double().cpu() * gain, quant.shift.double().cpu(), quant.levels, zero)

    def of_heads_last(self) -> Affine:
        """For x of (B, N, H, d), where the tensors were (H, 1, d) for x of (B, H, N, d)."""
        return self._replace(scale=self.scale.squeeze(1), shift=self.shift.squeeze(1), zero=self.zero.squeeze(1))

    def applied(self) -> Affine:
        """What is left to do for an x that was multiplied by `scale` and shifted by `shift - zero` already."""
        return self._replace(scale=ONE, shift=self.zero)


class Codes(NamedTuple):
    """The codes c of an activation: the value that holds c + zero in `dtype`.

    Codes that do not fit in 8 bits stay in floating point: then `dtype` is None, and zero 0.
    """
    value: str
    zero: int
    dtype: np.dtype | None

    def transposed(self, g: Graph, *axes: int) -> Codes:
        return self._replace(value=g.transpose(self.value, *axes))

    def in_float(self, g: Graph, scale: float = 1., less: int = 0) -> str:
        """(c - less) scale, computed by the DequantizeLinear that runtimes fuse with a product."""
        if self.dtype is None:
            return g.times(self.value, torch.tensor(scale))
        return g.op('DequantizeLinear', self.value, g.const(scale), g.const(self.zero + less, self.dtype))


def collapsed(value: Tensor) -> Tensor:
    """Drops repetitions: axes along which all entries are equal get size 1, and leading axes of size 1 go."""
    for axis in range(value.ndim):
        first = value.narrow(axis, 0, 1)
        value = first if bool((value == first).all()) else value
    while value.ndim > 1 and len(value) == 1:
        value = value[0]
    return value


def to_codes(g: Graph, x: str, affine: Affine, right: bool = False) -> Codes:
    """Adds the nodes that quantize a float x.

    A value exactly between two codes may get the other one than in `IntegerViT`: ONNX rounds to the nearest even before
    it adds a zero point, which makes a difference where that is odd.

    Args:
        right: whether the codes are the right operand of a product, which is fastest in int8.
    """
    factor, shift, zero = map(collapsed, (affine.scale, affine.shift - affine.zero, affine.zero))
    low, high = -zero, affine.levels - zero
    int8 = right and affine.levels <= 127 and low.min() >= -128 and high.max() <= 127
    dtype, bottom, top, offset = (INT8, -128, 127, 0) if int8 else (UINT8, 0, 255, max(0, -int(low.min())))
    fits = high.max() + offset <= top
    scale, position = ONE, ZERO  # the codes are round(x / scale + position)
    if fits and factor.numel() == shift.numel() == 1 and shift == shift.round() and bottom <= offset + shift <= top:
        scale, position = 1 / factor, shift  # these go into QuantizeLinear's own scale and zero point
    else:
        x = g.plus(g.times(x, factor), shift)
    saturates = low.numel() == 1 and low + offset == bottom and high + offset == top
    if not saturates:  # QuantizeLinear does not clip where the range of codes ends
        x = g.clip(x, (low - position) * scale, (high - position) * scale)
    if not fits:
        return Codes(g.op('Round', x), 0, None)
    return Codes(g.op('QuantizeLinear', x, g.const(scale.squeeze()), g.const((position + offset).squeeze(), dtype)),
                 offset, dtype)


def normalized_codes(g: Graph, x: str, width: int, eps: float, affine: Affine, right: bool = False) -> Codes:
    """Adds the nodes that normalize and quantize x, where `affine` includes the affine part of the LayerNorm.

    That part goes into the node of the LayerNorm where all heads have the same.
    """
    scale, shift = collapsed(affine.scale), collapsed(affine.shift - affine.zero)
    if scale.ndim == shift.ndim == 1:
        return to_codes(g, g.layer_norm(x, width, eps, scale, shift), affine.applied(), right)
    return to_codes(g, g.layer_norm(x, width, eps), affine, right)


# --- linear layers ----------------------------------------------------------------------------------------------------


class Linear(NamedTuple):
    """A linear layer: sum_t scale_t ((codes - less) weight_t^T) + bias, or in full precision x weight^T + bias.

    Attributes:
        weights: (N, K) each: codes, or floating point where `scales` is None.
        scales: (N,) each.
        bias: (N,).
        bits: 4 or 8, in which the weight codes are stored.
        wide: whether the input has codes above 127.
        less: the integer that is subtracted from the input codes first.
        input_scale: (K,), the input's scales, which the weights are multiplied with in floating point; None where the
            product is one of integers.
    """
    weights: Sequence[Tensor]
    scales: Sequence[Tensor] | None
    bias: Tensor
    bits: int = 8
    wide: bool = False
    less: int = 0
    input_scale: Tensor | None = None

    @classmethod
    def of(cls, layer: IntLinear | nn.Linear | nn.Conv2d, original: LinearQ | Conv2dQ | None = None) -> Linear:
        """Describes an integer layer, or one of full precision.

        Args:
            original: the fake-quantized layer that `layer` was made of, where its own weight codes are to be kept.
        """
        if not isinstance(layer, IntLinear):
            return cls([layer.weight.detach().flatten(1).double().cpu()], None, _bias(layer))
        bits = 4 if original is not None and original.weight_bits <= 4 else 8
        if original is None or layer.exact:
            weight, scale, bias = layer.weight.cpu(), layer.scale.double().cpu(), layer.folded_bias.cpu()
            return cls(weight.unbind(), scale.unbind(), bias, bits, layer.levels > 127)._less_cancellation(layer)
        codes, out_scale = original.to_int().flatten(1).cpu(), original.scale.double().cpu()
        channels = original.weight.shape[1]
        in_scale, zero = (value.cpu().repeat_interleave(codes.shape[1] // channels)
                          for value in UnsignedCodes.of(original.act, channels)[:2])
        gain = 1. if layer.gain is None else layer.gain
        out_scale, bias = out_scale * gain, _bias(original) * gain
        bias = bias - out_scale * (codes.double() @ (in_scale * zero))
        return cls([codes], [out_scale], bias, bits, input_scale=in_scale)._less_cancellation(layer)

    def _less_cancellation(self, layer: IntLinear) -> Linear:
        """The same layer, with part of its bias turned into a zero point of the codes.

        An integer can be taken from all codes in exchange for bias. The one chosen here leaves the smallest bias, by
        least squares. It is the codes' common zero point where they have one, and leaves float32 the most digits of
        the sum.
        """
        ones = torch.ones(layer.weight.shape[-1]).double() if self.input_scale is None else self.input_scale
        sums = sum((weight.double() @ ones * scale for weight, scale in zip(self.weights, self.scales, strict=True)))
        less = round((-(self.bias @ sums) / (sums @ sums).clamp_min(1e-300)).clamp(0, layer.levels).item())
        return self._replace(bias=self.bias + less * sums, less=less)

    def affine(self, gain: Tensor, shift: Tensor | float = 0.) -> Linear:
        """The layer whose output is that of this one times `gain` plus `shift`, per output channel."""
        if self.scales is None:
            weights, scales = [weight * gain.view(-1, 1) for weight in self.weights], None
        else:
            weights, scales = self.weights, [scale * gain for scale in self.scales]
        return self._replace(weights=weights, scales=scales, bias=self.bias * gain + shift)

    def add(self, g: Graph, x: Codes | str) -> str:
        """Adds the layer to the graph: codes (..., K), or floats in full precision -> float (..., N)."""
        x = x.in_float(g, less=self.less) if isinstance(x, Codes) else x
        products = [g.op('MatMul', x, self._matrix(g, t)) for t in range(len(self.weights))]
        out = products[0] if len(products) == 1 else g.op('Add', *products)
        return g.plus(out, self.bias)

    def _matrix(self, g: Graph, term: int) -> str:
        """Adds the weight of a term as a matrix of floats (K, N)."""
        weight = self.weights[term].mT
        if self.scales is None:
            return g.const(weight)
        scale = g.const(self.scales[term])
        if self.wide and self.input_scale is None:  # x86 may add pairs of uint8 x int8 in 16 bits, which overflow
            codes, zero = g.const(weight.int() + 128, UINT8), g.const(np.full(weight.shape[1], 128), UINT8)
            return g.op('DequantizeLinear', codes, scale, zero, axis=1)
        codes = g.const(weight, np.int8, self.bits)
        if self.bits == 4 and self.input_scale is None:  # runtimes multiply int8, and fold this Cast when loading
            codes = g.op('Cast', codes, to=TensorProto.INT8)
        matrix = g.op('DequantizeLinear', codes, scale, axis=1)
        # The weight is multiplied by the input's scales, and not the activation: onnxruntime turns a MatMul with
        # dequantized weights into a MatMulNBits, which by default quantizes the activation once more.
        return matrix if self.input_scale is None else g.op('Mul', matrix, g.const(self.input_scale[:, None]))


def _bias(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """The layer's bias, (N,), float64."""
    return torch.zeros(len(layer.weight)).double() if layer.bias is None else layer.bias.detach().double().cpu()
