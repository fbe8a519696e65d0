"""Statistics of a network's codes: how the quantizers of weights, of layers' inputs and of attention use them.

This is the one place that watches quantizers. Training's diagnostics, its warnings and the figures are views of what
`code_statistics` returns.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from _quan_base import ActQ, Conv2dQ, LinearQ, named_quantizers
from analysis.attention import attention_inputs, attention_probabilities, attentions, watched

__all__ = ['CodeStatistics', 'Distribution', 'code_distribution', 'code_statistics', 'entropy']

IMAGES_AT_A_TIME = 8  # bounds the memory: queries, keys and values of all blocks are kept until the forward ends


# --- distributions and their entropies --------------------------------------------------------------------------------


def entropy(shares: np.ndarray) -> float:
    """-sum p log2 p, in bits."""
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum()) + 0.  # + 0: not -0 for a single code


class Distribution(NamedTuple):
    """A histogram of real values, or the shares of integer codes.

    Attributes:
        positions: edges of the bins (bins + 1,), or the codes (codes,).
        heights: density per bin (bins,), which integrates to 1, or share of each code (codes,), which sum to 1.
        entropy: in bits. Of codes: that of the shares, at most `bits`. Of real values: the differential entropy of the
            histogram, -sum p log2(p / width), which grows by 1 where all values are doubled.
        bits: of a code; None for real values.
    """
    positions: np.ndarray
    heights: np.ndarray
    entropy: float
    bits: int | None


def code_distribution(counts: np.ndarray, qn: int) -> Distribution:
    """The shares of the codes from qn on, which were met `counts` times, (codes,)."""
    shares = counts / counts.sum()
    return Distribution(np.arange(qn, qn + len(shares)), shares, entropy(shares), int(math.log2(len(shares))))


# --- the collector ----------------------------------------------------------------------------------------------------


class CodeStatistics(NamedTuple):
    """What a quantizer does to the values that it met.

    Attributes:
        scale: mean of its scales.
        zero_point: mean of its zero points, None for a weight, which has none.
        clipped: share of the values outside the range of codes.
        dead: share of the channels that have one code only: output channels of a weight, channels of a layer's input,
            each dimension of each head of q, k and v, the heads of the attention probabilities.
        distribution: of its codes.
    """
    scale: float
    zero_point: float | None
    clipped: float
    dead: float
    distribution: Distribution

    @property
    def relative_entropy(self) -> float:
        """Entropy of the codes divided by their bits, from 0 (one code) to 1 (all alike)."""
        return self.distribution.entropy / self.distribution.bits


@torch.no_grad()
def code_statistics(model: nn.Module, images: Tensor) -> dict[str, CodeStatistics]:
    """The statistics of every quantizer by its name, in the order of registration; none of a full-precision network.

    The names are `<layer>` for a layer's weight, `<layer>.act` for its input, `<attention>.q_act` and so on. The
    images pass forward once, in evaluation mode, a few at a time. Everything is counted on the model's device, and one
    copy brings it to the host.

    Args:
        images: (B, 3, H, W), on the model's device.

    Raises:
        UserError: the network has quantizers, but not the attention of a vision transformer.
    """
    quantizers = dict(named_quantizers(model))
    if not quantizers:
        return {}
    tallies = {quantizer: _Tally(quantizer) for quantizer in quantizers.values()}
    layers = [layer for layer in tallies if not isinstance(layer, ActQ)]
    for layer in layers:
        tallies[layer].add(layer.weight, layer.to_int(), channels=(0,))

    def count(act: ActQ, x: Tensor, *channels: int) -> None:
        tallies[act].add(x, act.to_int(x), channels)

    def count_input(layer: LinearQ | Conv2dQ, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        x = layer.quantizer_input(inputs[0])
        count(layer.act, x, 1 if x.ndim == 4 else x.ndim - 1)

    for piece in images.split(IMAGES_AT_A_TIME):
        with watched(model, layers, count_input):
            found = attention_inputs(model, piece)
        for attention, inputs in zip(attentions(model), found, strict=True):
            if inputs.q.act is not None:
                count(attention.q_act, inputs.q.rectified, 1, 3)
                count(attention.k_act, inputs.k.rectified, 1, 3)
                count(attention.v_act, inputs.v, 1, 3)
                count(attention.attn_act, attention_probabilities(inputs), 1)
    return _on_host({name: tallies[quantizer] for name, quantizer in quantizers.items()})


class _Tally:
    """What is counted of one quantizer, on its device, added up over the pieces of the images."""

    def __init__(self, quantizer: ActQ | LinearQ | Conv2dQ) -> None:
        self.quantizer, (self.qn, self.qp) = quantizer, quantizer.code_range
        self.values = 0
        scale = quantizer.scale
        self.counts = torch.zeros(self.qp - self.qn + 1, dtype=torch.int64, device=scale.device)
        self.clipped = torch.zeros((), dtype=torch.int64, device=scale.device)
        self.lowest: Tensor | None = None   # code of each channel
        self.highest: Tensor | None = None

    def add(self, x: Tensor, codes: Tensor, channels: tuple[int, ...]) -> None:
        """Counts values and their codes. `channels`: the axes of x that number what may be dead."""
        scale, zero_point = self._broadcast(x.ndim)
        self.values += x.numel()
        self.counts += torch.bincount(codes.flatten() - self.qn, minlength=len(self.counts))
        self.clipped += ((x < (self.qn - zero_point) * scale) | (x > (self.qp - zero_point) * scale)).sum()
        others = [axis for axis in range(x.ndim) if axis not in channels]
        lowest, highest = codes.amin(others), codes.amax(others)
        self.lowest = lowest if self.lowest is None else torch.minimum(self.lowest, lowest)
        self.highest = highest if self.highest is None else torch.maximum(self.highest, highest)

    def _broadcast(self, ndim: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point in a shape that goes with values of so many axes."""
        scale = self.quantizer.scale
        if isinstance(self.quantizer, ActQ):
            shape = (-1, 1, 1) if ndim == 4 else (-1,)
            return scale.view(shape), self.quantizer.whole_zero_point.view(shape)
        return scale.view(-1, *[1] * (ndim - 1)), torch.zeros_like(scale[:1])

    def numbers(self) -> Tensor:
        """Scale, zero point (0 of a weight), clipped and dead share, and the counts of all codes: (4 + codes,)."""
        scale = self.quantizer.scale.mean()
        zero_point = self.quantizer.zero_point.mean() if isinstance(self.quantizer, ActQ) else torch.zeros_like(scale)
        dead = (self.lowest == self.highest).double().mean()
        few = [scale, zero_point, self.clipped.double() / self.values, dead]
        return torch.cat([torch.stack([number.double() for number in few]), self.counts.double()])


def _on_host(tallies: dict[str, _Tally]) -> dict[str, CodeStatistics]:
    numbers = [tally.numbers() for tally in tallies.values()]
    lengths = np.cumsum([len(own) for own in numbers])[:-1]
    found = {}
    for (name, tally), own in zip(tallies.items(), np.split(torch.cat(numbers).cpu().numpy(), lengths), strict=True):
        (scale, zero_point, clipped, dead), counts = own[:4].tolist(), own[4:]
        found[name] = CodeStatistics(scale, zero_point if isinstance(tally.quantizer, ActQ) else None, clipped, dead,
                                     code_distribution(counts, tally.qn))
    return found
