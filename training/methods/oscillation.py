"""Oscillations of latent weights in training: tracking, dampening and freezing.

Nagel et al., ICML 2022 (arXiv 2203.11086): with the straight-through estimator a latent weight near a border between
two codes is pushed across it and back again, and ends on either side by chance. A weight oscillates in an update whose
change of its code has the opposite sign of the change before (Section 3); with o = 1 then and 0 else

    frequency     f <- (1 - m) f + m o                          and of its codes c, mean <- (1 - m) mean + m c
    dampening     weight * sum |clamp(w, qn alpha, qp alpha) - w_hat|^2, no gradient to w_hat and alpha (Section 4.1)
    freezing      once f exceeds a threshold, w stays at round(mean) alpha, whatever alpha becomes (Section 4.2)

alpha is the scale in use. The weight of dampening rises from 0 by half a cosine, the threshold may fall by one. Weights
of 8 bits, those of patch embedding and heads, are left alone: a code of theirs is too little to matter.

Cost: none in the deployed network. For each weight and update, about 10 elementwise operations of tracking and
freezing, 5 of dampening and as many of its gradient; 11 bytes of state.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from _quan_base import Conv2dQ, LinearQ, named_quantizers
from training.methods import Method
from utils import UserError

__all__ = ['OSCILLATING', 'OscillationConfig', 'Oscillations', 'block_weights']

MOMENTUM = 0.01  # of the averages: they look back over some 100 updates
OSCILLATING = 0.005  # the frequency from which a weight counts as oscillating


@dataclass(frozen=True)
class OscillationConfig:
    """What is done about oscillations.

    Attributes:
        oscillation_dampening: weight of dampening at the end of the run, 0 for none.
        oscillation_freezing: the threshold of freezing, or its values at the start and the end of the run; None or
            empty for no freezing.
    """
    oscillation_dampening: float = 0.
    oscillation_freezing: Sequence[float] | None = None

    @property
    def active(self) -> bool:
        return bool(self.oscillation_dampening or self.oscillation_freezing)


def block_weights(model: nn.Module) -> dict[str, LinearQ | Conv2dQ]:
    """By name, the layers whose weights have fewer than 8 bits: all but patch embedding and heads."""
    return {name: module for name, module in named_quantizers(model)
            if isinstance(module, LinearQ | Conv2dQ) and module.weight_bits < 8}


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _scale(layer: nn.Module) -> Tensor:
    """The scale that the layer's weight is quantized with, broadcastable against it."""
    return layer.scale.view(-1, *[1] * (layer.weight.ndim - 1))


class Oscillations(Method):
    """Tracks, dampens and freezes the weights of a calibrated network's blocks.

    Every code follows from the weights, so that ranks with the same weights agree, and nothing is read to the host.

    Args:
        model: outside any wrapper, on its device.
        config: without dampening and freezing, oscillations are tracked alone.
        momentum: m.

    Raises:
        UserError: the network has no weights of fewer than 8 bits.
    """

    name = 'oscillations'
    without_state = 'their frequencies start from zero'
    left_out = 'not taken without --oscillation-dampening or --oscillation-freezing, frozen weights are free'
    STATE = ('codes', 'direction', 'frequency', 'mean', 'frozen')

    def __init__(self, model: nn.Module, config: OscillationConfig, momentum: float = MOMENTUM) -> None:
        self.layers = block_weights(model)
        if not self.layers:
            raise UserError(f'{type(model).__name__} has no weights of fewer than 8 bits that could oscillate: '
                            'leave out the --oscillation flags')
        self.weight, self.freezing = config.oscillation_dampening, tuple(config.oscillation_freezing or ())
        self.momentum = momentum
        self.states = {name: self._start(layer.to_int()) for name, layer in self.layers.items()}

    @staticmethod
    def _start(codes: Tensor) -> dict[str, Tensor]:
        codes = codes.to(torch.int8)
        return {'codes': codes, 'direction': torch.zeros_like(codes), 'frequency': codes.new_zeros(codes.shape).float(),
                'mean': codes.float(), 'frozen': torch.zeros_like(codes, dtype=torch.bool)}

    def loss_parts(self, progress: float) -> dict[str, Tensor]:
        return {'loss_dampening': self.dampening(progress)} if self.weight else {}

    def dampening(self, progress: float) -> Tensor:
        """The regulariser at its weight of now, 0-dim."""
        terms = []
        for layer in self.layers.values():
            scale, (qn, qp) = _scale(layer), layer.code_range
            # The ends of the range are the centres of its outermost codes, so that a weight beyond an end, clamped to
            # it, is at its code's centre and gets no gradient.
            terms.append((layer.weight.clamp(qn * scale, qp * scale) - layer.quantized_weight()).square().sum())
        return torch.stack(terms).sum() * _cosine(0., self.weight, progress)

    @torch.no_grad()
    def after_update(self, progress: float) -> None:
        """Takes the codes that an update of the weights led to, and freezes weights where that is due."""
        threshold = _cosine(self.freezing[0], self.freezing[-1], progress) if self.freezing else None
        for name, layer in self.layers.items():
            state = self.states[name]
            codes, frozen, mean = layer.to_int().to(torch.int8), state['frozen'], state['mean']
            if threshold is not None:  # the optimizer has moved frozen weights
                codes = torch.where(frozen, mean.to(torch.int8), codes)
            last, direction = state['codes'], state['direction']
            change = (codes > last).to(torch.int8) - (codes < last).to(torch.int8)
            state['frequency'].lerp_((change * direction < 0).to(mean.dtype), self.momentum)
            mean.lerp_(codes.to(mean.dtype), self.momentum)
            direction.copy_(torch.where(change == 0, direction, change))
            last.copy_(codes)
            if threshold is not None:
                now = (state['frequency'] > threshold) & ~frozen
                mean.copy_(torch.where(now, mean.round(), mean))  # for a frozen weight, the code that it is held at
                frozen.logical_or_(now)
                last.copy_(torch.where(now, mean.to(torch.int8), last))
                held = mean.to(layer.weight.dtype) * _scale(layer)
                layer.weight.copy_(torch.where(frozen, held, layer.weight))

    def shares(self) -> dict[str, dict[str, Tensor]]:
        """The shares of 'oscillating' and of 'frozen' weights in every layer; a frozen weight has stopped."""
        return {name: {'oscillating': ((state['frequency'] > OSCILLATING) & ~state['frozen']).float().mean(),
                       'frozen': state['frozen'].float().mean()} for name, state in self.states.items()}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {name: dict(state) for name, state in self.states.items()}

    def load_state_dict(self, states: dict[str, dict[str, Tensor]]) -> None:
        kinds = [{name: {key: (value.shape, value.dtype) for key, value in state.items()}
                  for name, state in each.items()} for each in (states, self.states)]
        if kinds[0] != kinds[1]:
            raise UserError('the oscillations in the checkpoint are those of another network')
        if not all(state[key].isfinite().all() for state in states.values() for key in ('frequency', 'mean')):
            raise UserError('the oscillations in the checkpoint are not finite: take an earlier one')
        for name, state in self.states.items():
            for key in self.STATE:
                state[key].copy_(states[name][key])
