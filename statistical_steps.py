"""Steps of the blocks' weights that follow from the weights, instead of learning by gradient.

A learned step and the weights on its grid move against each other, which makes codes oscillate: OFQ (Liu et al., ICML
2023, arXiv 2302.02210, StatsQ) takes the scale of a weight from its statistics. Implemented is, per output channel,

    statistics      alpha = 2 mean|w| / 2^(bits - 1): the codes span 2 mean|w| to either side. That factor is this
                    project's reading of the paper, on the grid of the other steps here, which has a code for 0.
    proportional    alpha = c mean|w|, with the c that calibration gave each channel: a variant of this project, which
                    keeps what a calibration has found.

Both are set after every update of the optimizer; no gradient goes through the statistic. Patch embedding and heads (8
bits) keep learned steps. The paper's confidence-guided annealing is in `confidence.py`; its reparametrised queries and
keys (QKR) are not implemented.

Cost: none in the deployed network, whose steps are numbers as ever. For each weight and update 2 operations.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from _lsq import min_step
from _quan_base import block_weights

__all__ = ['WEIGHT_STEPS', 'StatisticalSteps']

WEIGHT_STEPS = ('learned', 'statistics', 'proportional')


class StatisticalSteps:
    """Keeps the steps of a calibrated network's block weights at their statistic.

        steps = StatisticalSteps(model, 'statistics')      # before the optimizer and DistributedDataParallel
        steps.set_()                                       # now, and after every optimizer.step()

    Args:
        model: outside any wrapper, on its device; the steps in question stop requiring gradients.
        kind: 'statistics' or 'proportional'.
    """

    def __init__(self, model: nn.Module, kind: str) -> None:
        assert kind in WEIGHT_STEPS[1:], kind
        self.layers = block_weights(model)
        self.ratios: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            layer.alpha.requires_grad_(False)
            self.ratios[name] = (torch.full_like(layer.alpha, 2 / 2 ** (layer.weight_bits - 1))
                                 if kind == 'statistics' else layer.alpha / self._mean(layer.weight))

    @staticmethod
    def _mean(weight: Tensor) -> Tensor:
        """mean|w| of every output channel, (out,)."""
        return weight.detach().flatten(1).abs().mean(1).clamp_min(min_step(weight.dtype))

    @torch.no_grad()
    def set_(self) -> None:
        for name, layer in self.layers.items():
            layer.alpha.copy_((self.ratios[name] * self._mean(layer.weight)).clamp_min(min_step(layer.alpha.dtype)))

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.ratios)

    def load_state_dict(self, ratios: dict[str, Tensor]) -> None:
        """Continues from a `state_dict` of the same network."""
        for name, ratio in self.ratios.items():
            ratio.copy_(ratios[name])
