"""The methods of training that there are. A further one needs a line in each of the two places here."""
from __future__ import annotations

from torch import nn

from training.methods import Method
from training.methods.oscillation import OscillationConfig, Oscillations

__all__ = ['METHODS', 'build_methods']

METHODS: tuple[type[Method], ...] = (Oscillations,)


def build_methods(model: nn.Module, oscillation: OscillationConfig) -> list[Method]:
    """The methods that a run asks for, of a calibrated model on its device and outside any wrapper."""
    return [Oscillations(model, oscillation)] if oscillation.active else []
