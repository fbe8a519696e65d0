"""The quantizer of Q-ViT: its equations, its layers, and the start of their scales.

Learned step size quantization (LSQ: Esser et al., ICLR 2020, arXiv 1902.08153) as Q-ViT uses it (Li et al., NeurIPS
2022, Section 3.1); the zero point of the activations is that of LSQ+ (Bhalgat et al., 2020, arXiv 2004.09576). With
integer codes in [qn, qp] of b bits:

    weights       w_hat = round(clamp(w / alpha, qn, qp)) alpha                 one alpha for each output channel
    activations   x_hat = (round(clamp(x / alpha + z, qn, qp)) - z) alpha       one alpha and z for each input channel

z is rounded to a whole number, and rounding is to the nearest even one. `QParams.fake_quantize` is these equations with
LSQ's gradients. The layers call their products in `ops`, which computes the same with less memory and time. Whether a
quantizer is calibrated and signed are Python values: a forward branches on them without reading a tensor. The buffers
`init_state` and `signed` mirror them in checkpoints.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import ops
from ops import clipped_gelu, min_scale
from utils import mean_over_ranks

__all__ = ['ActQ', 'Conv2dQ', 'GeluLinearQ', 'LinearQ', 'QParams', 'Rule', 'UncalibratedError', 'alpha_of',
           'clamp_steps_', 'code_range', 'first_batch_rule', 'is_calibrated', 'learned_scale', 'min_scale',
           'named_quantizers']

SIGNED_THRESHOLD = -1e-5  # an activation with a value below it needs negative codes


# --- the equations ----------------------------------------------------------------------------------------------------


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """(qn, qp), the smallest and the largest code."""
    return (-2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2 ** bits - 1)


def round_ste(x: Tensor) -> Tensor:
    """Rounds to the nearest even whole number; the gradient passes straight through."""
    return x + (x.round() - x).detach()


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, with its gradient multiplied by `factor`."""
    return x * factor + (x - x * factor).detach()


class QParams(NamedTuple):
    """The parameters that a tensor is quantized with.

    Attributes:
        scale: alpha, LSQ's step size; broadcasts against the tensor.
        zero_point: z, of the scale's shape; None for weights.
        qn, qp: the smallest and the largest code.
    """
    scale: Tensor
    zero_point: Tensor | None
    qn: int
    qp: int

    def codes(self, x: Tensor) -> Tensor:
        """The integer codes of x, int32, in [qn, qp]."""
        alpha = self.scale.detach().clamp_min(min_scale(self.scale.dtype))
        z = 0 if self.zero_point is None else self.zero_point.detach().round()
        return (x / alpha + z).clamp(self.qn, self.qp).round().to(torch.int32)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """x_hat, with LSQ's gradients: straight through to x inside the range, borders included, and 0 outside.

        The gradients of scale and zero point are multiplied by g = 1 / sqrt(numel qp), by which they learn about as
        fast as weights do (Esser et al., Section 2.2). A scale below `min_scale` counts as that.
        """
        g = (x.numel() * self.qp) ** -0.5
        positive = self.scale + (self.scale.clamp_min(min_scale(self.scale.dtype)) - self.scale).detach()
        alpha = scale_gradient(positive, g)
        z = 0 if self.zero_point is None else round_ste(scale_gradient(self.zero_point, g))
        position = x / alpha + z
        inside = torch.where(position < self.qn, self.qn, torch.where(position > self.qp, self.qp, position))
        return (round_ste(inside) - z) * alpha


# --- the step rule: what is learned, and the scale that it stands for -------------------------------------------------


def learned_scale(alpha: Tensor) -> Tensor:
    """The scale of a learned parameter, differentiable: the parameter itself, as published.

    Everything asks here: training, the kernels, packed files, integers and ONNX. Another rule changes this function,
    and `alpha_of` with it where it does not leave its own values as they are.
    """
    return alpha


def alpha_of(scale: Tensor) -> Tensor:
    """The parameter that stands for a scale, which comes from calibration or a packed file."""
    return scale


# --- calibration: how a quantizer gets its first scale ----------------------------------------------------------------

# x as (channels, values of that channel), qn, qp -> scale and zero point, each a number or of shape (channels,)
Rule = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]


def first_batch_rule(x: Tensor, qn: int, qp: int) -> tuple[Tensor, Tensor]:
    """The published initialisation: one scale 2 mean|x| / sqrt(qp) for all channels (Esser et al., Section 2.1), and a
    tenth of the way from 0 to the zero point that maps min(x) to qn."""
    scale = 2 * x.abs().mean() / qp ** 0.5
    return scale, 0.1 * (x.min() - scale * qn)


class UncalibratedError(RuntimeError):
    """A quantizer was used in evaluation before it had a scale."""


class _Calibrated(nn.Module):
    """A module with a scale, and the state of its calibration."""
    alpha: nn.Parameter
    init_state: Tensor
    implementation = 'torch'  # of `ops`, which computes this module's products: set by `ops.use`
    calibrated: bool = False
    _rule: Rule | None = None

    @property
    def scale(self) -> Tensor:
        """The scale in use, (channels,) or (1,): at least `min_scale`, without a gradient."""
        return learned_scale(self.alpha).detach().clamp_min(min_scale(self.alpha.dtype))

    @property
    def pending(self) -> bool:
        """Whether the next input, in training or where it is awaited, is to initialise this quantizer."""
        return not self.calibrated or self._rule is not None

    def await_input(self, rule: Rule | None) -> None:
        """Lets the next input initialise this quantizer by `rule`; with None, what is still awaited is no more."""
        self.calibrated, self._rule = self.calibrated and rule is None, rule

    def _due_rule(self) -> Rule | None:
        """The rule that is to give this quantizer its scale now; None where it has one.

        Raises:
            UncalibratedError: it has none, and this is no time to give it one.
        """
        if not self.pending:
            return None
        if torch.compiler.is_compiling() or not (self.training or self._rule):
            raise UncalibratedError(f'{type(self).__name__}({self.extra_repr()}) has no scale yet: before evaluation '
                                    'or torch.compile call calibrate(model, images), or load a quantized checkpoint')
        return self._rule or first_batch_rule

    @torch.no_grad()
    def _take_scale(self, scale: Tensor, *zero_point: Tensor) -> None:
        if not all(torch.isfinite(value).all() for value in (scale, *zero_point)):
            raise ValueError(f'calibration met NaN or infinite values in {type(self).__name__}({self.extra_repr()}): '
                             f'check the images and the weights')
        self.alpha.copy_(alpha_of(scale.to(self.alpha.dtype).clamp_min(min_scale(self.alpha.dtype))))
        self.init_state.fill_(1)
        self.calibrated, self._rule = True, None

    def _by_rule(self, rows: Tensor, qn: int, qp: int, rule: Rule) -> list[Tensor]:
        """Scale and zero point by `rule`, alike on all ranks. rows: (channels, values)."""
        return [mean_over_ranks(value.to(self.alpha.dtype).expand(self.alpha.shape)) for value in rule(rows, qn, qp)]

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.read_host_state()

    def read_host_state(self) -> None:
        """Takes the Python values from the buffers, after something wrote into these."""
        if not self.init_state.is_meta:
            self.calibrated = bool(self.init_state.item())


# --- the layers -------------------------------------------------------------------------------------------------------


class ActQ(_Calibrated):
    """Quantizer of an activation: one scale and one zero point per channel (or one of each per tensor).

    Channels are the last axis of (N, C) and (B, N, C) inputs, and axis 1 of 4-D ones (images: colours; q, k, v and
    attention: heads). Whether codes are signed is found at calibration.

    Args:
        channels: number of channels.
        bits: bits of a code, 2 to 8.
        granularity: 'channel' (published) or 'tensor', which integer products can factor out.
    """

    def __init__(self, channels: int, bits: int, granularity: str = 'channel', device=None, dtype=None) -> None:
        super().__init__()
        if granularity not in ('channel', 'tensor'):
            raise ValueError(f"act_granularity '{granularity}' is unknown: use 'channel' or 'tensor'")
        self.bits, self.granularity, self.signed_codes = _checked_bits(bits), granularity, False
        scales, dd = channels if granularity == 'channel' else 1, {'device': device, 'dtype': dtype}
        self.alpha = nn.Parameter(torch.ones(scales, **dd))
        self.zero_point = nn.Parameter(torch.zeros(scales, **dd))
        self.register_buffer('init_state', torch.zeros(1, **dd))
        self.register_buffer('signed', torch.zeros(1, **dd))

    @property
    def code_range(self) -> tuple[int, int]:
        """(qn, qp) of the calibrated quantizer."""
        return code_range(self.bits, self.signed_codes)

    @property
    def whole_zero_point(self) -> Tensor:
        """The zero point in use, (channels,) or (1,): rounded, without a gradient."""
        return self.zero_point.detach().round()

    def qparams(self, x: Tensor) -> QParams:
        """What to quantize x with. A quantizer that is due is initialised by x first; else only x's axes count."""
        if (rule := self._due_rule()) is not None:
            self._calibrate(x.detach(), rule)
        shape = (-1, 1, 1) if x.ndim == 4 else (-1,)
        return QParams(learned_scale(self.alpha).view(shape), self.zero_point.view(shape), *self.code_range)

    def _calibrate(self, x: Tensor, rule: Rule) -> None:
        channels = x.movedim(1 if x.ndim == 4 else -1, 0).flatten(1)
        if self.granularity == 'tensor':
            channels = channels.reshape(1, -1)
        signed = bool(mean_over_ranks((channels.amin() < SIGNED_THRESHOLD).to(self.alpha.dtype)) > 0)
        self.set_qparams(*self._by_rule(channels.to(self.alpha.dtype), *code_range(self.bits, signed), rule), signed)

    @torch.no_grad()
    def set_qparams(self, scale: Tensor, zero_point: Tensor, signed: bool) -> None:
        """Calibrates by given values, broadcastable to the channels; ValueError: NaN or infinite."""
        self._take_scale(scale, zero_point)
        self.zero_point.copy_(zero_point)
        self.signed_codes = signed
        self.signed.fill_(signed)

    def forward(self, x: Tensor) -> Tensor:
        return ops.get(self.implementation).fake_quantize(x, self.qparams(x))

    @torch.no_grad()
    def to_int(self, x: Tensor) -> Tensor:
        """The integer codes of x, int32, in [qn, qp]; (code - round(zero_point)) * alpha is `forward`'s value."""
        return ops.get(self.implementation).codes(x, self.qparams(x))

    def read_host_state(self) -> None:
        super().read_host_state()
        if not self.signed.is_meta:
            self.signed_codes = bool(self.signed.item())

    def extra_repr(self) -> str:
        codes = f'range={list(self.code_range)}' if self.calibrated else 'not calibrated'
        return f'bits={self.bits}, granularity={self.granularity!r}, scales={self.alpha.numel()}, {codes}'


class _WeightQuantized(_Calibrated):
    """What `LinearQ` and `Conv2dQ` share: the weight's quantizer, one scale per output channel, always signed.

    In evaluation the quantized weight is computed once and kept until the weight or its scales change. Only a write
    through `.data` in evaluation mode goes unnoticed; `eval()` after it suffices. Compiled graphs compute it anew.
    """
    weight: nn.Parameter
    act: ActQ
    _evaluated: tuple[tuple, Tensor] | None = None

    def _add_quantizers(self, channels: int, weight_bits: int, act_bits: int, act_granularity: str) -> None:
        dd = {'device': self.weight.device, 'dtype': self.weight.dtype}
        self.weight_bits = _checked_bits(weight_bits)
        self.alpha = nn.Parameter(torch.ones(self.weight.shape[0], **dd))
        self.register_buffer('init_state', torch.zeros(1, **dd))
        self.act = ActQ(channels, act_bits, act_granularity, **dd)

    @property
    def code_range(self) -> tuple[int, int]:
        return code_range(self.weight_bits, signed=True)

    def weight_qparams(self) -> QParams:
        """What to quantize the weight with; a quantizer that is due is initialised first."""
        if (rule := self._due_rule()) is not None:
            self.set_qparams(self._by_rule(self.weight.detach().flatten(1), *self.code_range, rule)[0])
        return QParams(learned_scale(self.alpha).view(-1, *[1] * (self.weight.ndim - 1)), None, *self.code_range)

    @torch.no_grad()
    def set_qparams(self, scale: Tensor) -> None:
        """Calibrates the weight by given scales, broadcastable to the output channels; ValueError: NaN or infinite."""
        self._take_scale(scale)

    @torch.no_grad()
    def quantized_weight(self) -> Tensor:
        """w_hat, of the weight's shape, without a gradient."""
        return ops.get(self.implementation).fake_quantize(self.weight, self.weight_qparams())

    def _weight_in_evaluation(self) -> Tensor | None:
        """w_hat as computed before, None where it is to be computed with the product."""
        if self.training or torch.compiler.is_compiling():
            return None
        source = tuple((t.data_ptr(), t._version, t.dtype, t.device) for t in (self.weight, self.alpha))
        if self._evaluated is None or self._evaluated[0] != source:
            self._evaluated = source, self.quantized_weight()
        return self._evaluated[1]

    @torch.no_grad()
    def to_int(self) -> Tensor:
        """The weight's integer codes, int32, of its shape; code * scale is the quantized value."""
        return ops.get(self.implementation).codes(self.weight, self.weight_qparams())

    def quantizer_input(self, x: Tensor) -> Tensor:
        """What `act` quantizes when the layer is called with x."""
        return x

    def train(self, mode: bool = True):
        self._evaluated = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_evaluated': None}

    def extra_repr(self) -> str:
        state = '' if self.calibrated else ', not calibrated'
        return f'{super().extra_repr()}, weight_bits={self.weight_bits}, range={list(self.code_range)}{state}'


class LinearQ(_WeightQuantized, nn.Linear):
    """`nn.Linear` with quantized weight and input: (..., in_features) -> (..., out_features)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None, *,
                 weight_bits: int, act_bits: int, act_granularity: str = 'channel') -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._add_quantizers(in_features, weight_bits, act_bits, act_granularity)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def linear(self, x: Tensor, gelu: bool = False) -> Tensor:
        """The product with the quantized x, or with `gelu` with the quantized clipped_gelu(x)."""
        if x.ndim > 3:  # the channels of a linear layer are its last axis, also where ActQ would take axis 1
            return self.linear(x.flatten(0, -2), gelu).unflatten(0, x.shape[:-1])
        q = self.act.qparams(clipped_gelu(x.detach()) if gelu and self.act.pending else x)
        return ops.get(self.implementation).linear(x, self.weight, self.bias, q, self.weight_qparams(),
                                                   w_hat=self._weight_in_evaluation(), gelu=gelu)


class GeluLinearQ(LinearQ):
    """The second layer of Q-MLP, with the activation before it: LinearQ(dropout(clip(GELU(x), -10, 10))).

    So the GELU's output need not be kept for the backward. Hooks on this layer see x, before the GELU.
    """

    def __init__(self, in_features: int, out_features: int, *args, drop: float = 0., **kwargs) -> None:
        super().__init__(in_features, out_features, *args, **kwargs)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.drop:
            return self.linear(F.dropout(clipped_gelu(x), self.drop))
        return self.linear(x, gelu=True)

    def quantizer_input(self, x: Tensor) -> Tensor:
        return clipped_gelu(x)


class Conv2dQ(_WeightQuantized, nn.Conv2d):
    """`nn.Conv2d` with quantized weight and input: (B, in_channels, H, W) -> (B, out_channels, H', W')."""

    def __init__(self, *args, weight_bits: int, act_bits: int, act_granularity: str = 'channel', **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.padding_mode != 'zeros' or isinstance(self.padding, str):
            raise ValueError(f'padding {self.padding!r} ({self.padding_mode}) is not supported: give a number of zeros')
        self._add_quantizers(self.in_channels, weight_bits, act_bits, act_granularity)

    def forward(self, x: Tensor) -> Tensor:
        return ops.get(self.implementation).conv2d(
            x, self.weight, self.bias, self.act.qparams(x), self.weight_qparams(), self.stride, self.padding,
            self.dilation, self.groups, w_hat=self._weight_in_evaluation())


def _checked_bits(bits: int) -> int:
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ValueError(f'{bits} bits are not supported: use a whole number from 2 to 8')
    return bits


# --- whole models -----------------------------------------------------------------------------------------------------


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, ActQ | LinearQ | Conv2dQ]]:
    """(name, module) of every module that holds a scale, in the order of registration."""
    return (item for item in model.named_modules() if isinstance(item[1], _Calibrated))


def is_calibrated(model: nn.Module) -> bool:
    return all(module.calibrated for _, module in named_quantizers(model))


@torch.no_grad()
def clamp_steps_(model: nn.Module) -> None:
    """Brings step sizes that an optimizer made zero or negative back to the smallest that a forward uses."""
    if alphas := [quantizer.alpha for _, quantizer in named_quantizers(model)]:
        least = torch.tensor(min_scale(alphas[0].dtype), dtype=alphas[0].dtype)
        torch._foreach_clamp_min_(alphas, alpha_of(least).item())
