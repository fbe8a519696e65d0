"""Parts of ONNX graphs of quantized networks: nodes and constants, codes of activations, linear layers of codes.

A product of codes is written as DequantizeLinear -> MatMul <- DequantizeLinear, which runtimes fuse into a product of
integers: of uint8 codes with int8 ones, or with weight codes of one scale per output channel.
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
from deployment.integer import IntLinear, Quantizer, effective
from ops.lsq import min_scale

__all__ = ['ONE', 'ZERO', 'Affine', 'Codes', 'Graph', 'Linear', 'collapsed', 'normalized_codes', 'to_codes']

GELU_OPSET = 20
UINT8, INT8 = np.dtype(np.uint8), np.dtype(np.int8)
ONE, ZERO = torch.ones(1).double(), torch.zeros(1).double()


class Graph:
    """Nodes and constants of a graph under construction; values are names, which begin with `scope`."""

    def __init__(self, opset: int) -> None:
        self.opset, self.nodes, self.constants, self.scope, self._counts = opset, [], {}, '', Counter()

    def const(self, value: Any, dtype: Any = np.float32, bits: int | None = None) -> str:
        """A constant, shared where it is small and equal; `bits=4` stores INT4."""
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
        """Adds a node: its output, or the list of its outputs."""
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
        """Between bounds that broadcast against x, or are scalar."""
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
    """Codes c = round(clamp(scale x + shift, 0, levels)) - zero; the tensors broadcast against x, zero is integers."""
    scale: Tensor
    shift: Tensor
    levels: int
    zero: Tensor = ZERO

    @classmethod
    def of(cls, quant: Quantizer, zero: Tensor = ZERO, gain: Tensor = ONE) -> Affine:
        """That of a quantizer of gain x, less `zero`."""
        return cls(quant.scale.double().cpu() * gain, quant.shift.double().cpu(), quant.levels, zero)

    def of_heads_last(self) -> Affine:
        """(H, 1, d) for x of (B, H, N, d) -> (H, d) for x of (B, N, H, d)."""
        return self._replace(scale=self.scale.squeeze(1), shift=self.shift.squeeze(1), zero=self.zero.squeeze(1))

    def applied(self) -> Affine:
        """What is left where scale and shift - zero have been applied to x already."""
        return self._replace(scale=ONE, shift=self.zero)


class Codes(NamedTuple):
    """Codes of an activation, stored as c + zero in `dtype`; in floating point, zero = 0, where they do not fit."""
    value: str
    zero: int
    dtype: np.dtype | None

    def transposed(self, g: Graph, *axes: int) -> Codes:
        return self._replace(value=g.transpose(self.value, *axes))

    def in_float(self, g: Graph, scale: float = 1., less: int = 0) -> str:
        """(c - less) scale, by the DequantizeLinear that a product is fused with."""
        if self.dtype is None:
            return g.times(self.value, torch.tensor(scale))
        return g.op('DequantizeLinear', self.value, g.const(scale), g.const(self.zero + less, self.dtype))


def collapsed(value: Tensor) -> Tensor:
    """Without repetition: size 1 along every axis whose entries are equal, and without leading axes of size 1."""
    for axis in range(value.ndim):
        first = value.narrow(axis, 0, 1)
        value = first if bool((value == first).all()) else value
    while value.ndim > 1 and len(value) == 1:
        value = value[0]
    return value


def to_codes(g: Graph, x: str, affine: Affine, right: bool = False) -> Codes:
    """Codes of a float x. right: whether they are the right operand of a product, which is fastest in int8."""
    scale, shift, zero = map(collapsed, (affine.scale, affine.shift - affine.zero, affine.zero))
    low, high = -zero, affine.levels - zero
    int8 = right and affine.levels <= 127 and low.min() >= -128 and high.max() <= 127
    dtype, bottom, top, offset = (INT8, -128, 127, 0) if int8 else (UINT8, 0, 255, max(0, -int(low.min())))
    fits = high.max() + offset <= top
    step, position = ONE, ZERO
    if fits and scale.numel() == shift.numel() == 1 and shift == shift.round() and bottom <= offset + shift <= top:
        step, position = 1 / scale, shift  # as QuantizeLinear's scale and zero point
    else:
        x = g.plus(g.times(x, scale), shift)
    if not (low.numel() == 1 and low + offset == bottom and high + offset == top):  # else it saturates there
        x = g.clip(x, (low - position) * step, (high - position) * step)
    if not fits:
        return Codes(g.op('Round', x), 0, None)
    return Codes(g.op('QuantizeLinear', x, g.const(step.squeeze()), g.const((position + offset).squeeze(), dtype)),
                  offset, dtype)


def normalized_codes(g: Graph, x: str, width: int, eps: float, affine: Affine, right: bool = False) -> Codes:
    """Codes of the LayerNorm of x, whose affine part is in `affine`; part of the node where it is alike for heads."""
    scale, shift = collapsed(affine.scale), collapsed(affine.shift - affine.zero)
    if scale.ndim == shift.ndim == 1:
        return to_codes(g, g.layer_norm(x, width, eps, scale, shift), affine.applied(), right)
    return to_codes(g, g.layer_norm(x, width, eps), affine, right)


# --- linear layers ----------------------------------------------------------------------------------------------------


class Linear(NamedTuple):
    """sum_t scale_t ((codes - less) weight_t^T) + bias; in full precision x weight^T + bias.

    Attributes:
        weights: (N, K) each, codes or, where scales is None, floating point.
        scales: (N,) each.
        bias: (N,).
        bits: in which weight codes are stored, 4 or 8.
        wide: whether its input has codes above 127.
        less: integer that is subtracted from codes first.
        step: (K,), which the weights are multiplied with, in floating point; None where codes are multiplied.
    """
    weights: Sequence[Tensor]
    scales: Sequence[Tensor] | None
    bias: Tensor
    bits: int = 8
    wide: bool = False
    less: int = 0
    step: Tensor | None = None

    @classmethod
    def of(cls, layer: IntLinear | nn.Linear | nn.Conv2d, original: LinearQ | Conv2dQ | None = None) -> Linear:
        """That of an integer layer, with the weight codes of `original` where given, or of a full-precision one."""
        if not isinstance(layer, IntLinear):
            return cls([layer.weight.detach().flatten(1).double().cpu()], None, _bias(layer))
        if original is None or layer.exact:
            bits = 4 if original is not None and original.weight_bits <= 4 else 8
            weight, scale, bias = layer.weight.cpu(), layer.scale.double().cpu(), layer.folded_bias.cpu()
            return cls(weight.unbind(), scale.unbind(), bias, bits, layer.levels > 127)._less_cancellation(layer)
        codes, alpha = original.to_int().flatten(1).cpu(), original.alpha.detach().double().cpu()
        alpha = alpha.clamp_min(min_scale(original.alpha.dtype))
        channels = original.weight.shape[1]
        step, zero, qn, _ = effective(original.act, channels)
        step, zero = (value.cpu().repeat_interleave(codes.shape[1] // channels) for value in (step, zero))
        bias = _bias(original) - alpha * (codes.double() @ (step * (zero - qn)))
        return cls([codes], [alpha], bias, 4 if original.weight_bits <= 4 else 8, step=step)._less_cancellation(layer)

    def _less_cancellation(self, layer: IntLinear) -> Linear:
        """The same layer, with part of its bias as zero point of the codes.

        An integer can be taken from all codes in exchange for bias. The one that leaves the smallest bias, by least
        squares, is their common zero point where they have one, and leaves float32 the most digits of the sum.
        """
        ones = torch.ones(layer.weight.shape[-1]).double() if self.step is None else self.step
        sums = sum((weight.double() @ ones * scale for weight, scale in zip(self.weights, self.scales, strict=True)))
        less = round((-(self.bias @ sums) / (sums @ sums).clamp_min(1e-300)).clamp(0, layer.levels).item())
        return self._replace(bias=self.bias + less * sums, less=less)

    def affine(self, gain: Tensor, shift: Tensor | float = 0.) -> Linear:
        """Its output times `gain` plus `shift`, per output channel."""
        if self.scales is None:
            weights, scales = [weight * gain.view(-1, 1) for weight in self.weights], None
        else:
            weights, scales = self.weights, [scale * gain for scale in self.scales]
        return self._replace(weights=weights, scales=scales, bias=self.bias * gain + shift)

    def add(self, g: Graph, x: Codes | str) -> str:
        """Adds the layer to the graph, of codes (..., K) or, in full precision, of floats: float (..., N)."""
        x = x.in_float(g, less=self.less) if isinstance(x, Codes) else x
        products = [g.op('MatMul', x, self._matrix(g, t)) for t in range(len(self.weights))]
        out = products[0] if len(products) == 1 else g.op('Add', *products)
        return g.plus(out, self.bias)

    def _matrix(self, g: Graph, term: int) -> str:
        """(K, N)."""
        weight = self.weights[term].mT
        if self.scales is None:
            return g.const(weight)
        scale = g.const(self.scales[term])
        if self.wide and self.step is None:  # pairs of uint8 x int8 overflow where x86 adds them in 16 bits
            codes, zero = g.const(weight.int() + 128, UINT8), g.const(np.full(weight.shape[1], 128), UINT8)
            return g.op('DequantizeLinear', codes, scale, zero, axis=1)
        codes = g.const(weight, np.int8, self.bits)
        if self.bits == 4 and self.step is None:  # runtimes multiply uint8 with int8, and fold this when loading
            codes = g.op('Cast', codes, to=TensorProto.INT8)
        matrix = g.op('DequantizeLinear', codes, scale, axis=1)
        # The weight takes the step, not the activation: onnxruntime makes a MatMul with dequantized weights a
        # MatMulNBits, which by default quantizes the activation once more.
        return matrix if self.step is None else g.op('Mul', matrix, g.const(self.step[:, None]))


def _bias(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """(N,), float64."""
    return torch.zeros(len(layer.weight)).double() if layer.bias is None else layer.bias.detach().double().cpu()
