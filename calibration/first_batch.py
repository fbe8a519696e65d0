"""Calibration from one batch, as published: every quantizer gets its scale from the first input that it meets."""
from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from _quan_base import Rule, UncalibratedError, first_batch_rule, named_quantizers
from utils import take_from_rank_0

__all__ = ['calibrate']


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor, rule: Rule = first_batch_rule) -> None:
    """Initialises every quantizer from one batch, in forward order, each on inputs that its predecessors quantize.

    To be called before DistributedDataParallel, the optimizer and torch.compile. Under torch.distributed every rank
    calls it, with its own images: parameters come from rank 0, scales are averaged, so that all ranks end alike.

    Args:
        model: the unwrapped network; runs in evaluation mode and gets its modes back.
        images: one batch for `model`, e.g. (B, 3, 224, 224).
        rule: gives scale and zero point from a quantizer's input or weight.

    Raises:
        ValueError: NaN or infinite values were met.
        UncalibratedError: the forward did not use some quantizer.
    """
    take_from_rank_0(*model.parameters(), *model.buffers())
    quantizers, modes = dict(named_quantizers(model)), {module: module.training for module in model.modules()}
    model.eval()
    for quantizer in quantizers.values():
        quantizer.await_input(rule)
    try:
        model(images)
    finally:
        for quantizer in quantizers.values():
            quantizer.await_input(None)
        for module, mode in modes.items():
            module.training = mode
    missed = [name for name, quantizer in quantizers.items() if not quantizer.calibrated]
    if missed:
        raise UncalibratedError(f'the forward of {type(model).__name__} did not use {", ".join(missed)}')
