"""Confidence-guided annealing: at the end of a run only weights near a border between two codes are still trained.

After OFQ (Liu et al., ICML 2023, arXiv 2302.02210, CGA): weights of high confidence, far from every border, are frozen,
so that those which oscillate around one settle in a network that no longer moves. With the distance of w / alpha to the
nearest border k + 1/2 between two codes, in steps (beyond the range, to the outermost one):

    confident    distance > boundary range: w stays as it was before the update
    else         w is trained as ever; once it has left the boundary range, it stays

Which range, and for how long, are options here; the defaults are this project's, not the paper's.

Cost: none in the deployed network. For each weight and update 10 elementwise operations, before the end of the run a
copy; 4 bytes of state, which no checkpoint needs.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from _quan_base import LinearQ, block_weights
from utils import UserError

__all__ = ['ConfidenceAnnealing', 'border_distance']

SHARE = 0.1  # of the run, at its end


def border_distance(layer: LinearQ, weight: Tensor) -> Tensor:
    """Distance of each value to the nearest border between two codes of the layer's weight, in steps."""
    qn, qp = layer.code_range
    position = weight / layer.weight_lsq().step
    return (position - (position - 0.5).round().clamp(qn, qp - 1) - 0.5).abs()


class ConfidenceAnnealing:
    """Holds the confident weights of a calibrated network's blocks in the last part of a run.

        annealing = ConfidenceAnnealing(model, boundary_range=0.1, share=0.2)
        ...; optimizer.step(); clamp_steps_(model); annealing.update(progress)    # progress: done share, in [0, 1]

    Args:
        model: outside any wrapper, on its device.
        boundary_range: in steps, between 0 and 0.5.
        share: of the run, at its end.

    Raises:
        UserError: the network has no weights of fewer than 8 bits.
    """

    def __init__(self, model: nn.Module, boundary_range: float, share: float = SHARE) -> None:
        self.layers = block_weights(model)
        if not self.layers:
            raise UserError(f'{type(model).__name__} has no weights of fewer than 8 bits: leave out '
                            '--confidence-annealing')
        self.boundary_range, self.start = boundary_range, 1 - share
        self.before = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}

    @torch.no_grad()
    def update(self, progress: float) -> None:
        """To be called last after an update of the optimizer: takes it back for confident weights, once it is time."""
        for name, layer in self.layers.items():
            before = self.before[name]
            if progress >= self.start:
                is_confident = border_distance(layer, before) > self.boundary_range
                layer.weight.copy_(torch.where(is_confident, before, layer.weight))
            before.copy_(layer.weight)
