"""What each tensor of a network costs when it alone is quantized: where the accuracy of a low-bit network goes."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from _quan_base import ActQ, named_quantizers
from calibration.closed_form import check_kind, fit_activation
from calibration.full_precision import FullPrecision, full_precision_block
from calibration.scales import weight_scales
from quant_vision_transformer import QVisionTransformer

__all__ = ['sensitivity']

CHUNK = 32  # images at a time


@torch.no_grad()
def sensitivity(model: QVisionTransformer, images: Tensor) -> dict[str, np.ndarray]:
    """The divergence from full precision that every quantizer of the blocks brings about alone.

    A quantizer gets the scales of least squared error for what it meets in full precision, and nothing makes up for its
    rounding. The figures say which tensors are delicate, not how accurate a calibrated network will be.

    Args:
        model: holds full-precision weights; not changed.
        images: (B, C, H, W).

    Returns:
        By the quantizer's name within a block, in the order of the forward, (blocks,): the mean KL divergence, in nats,
        of the class probabilities from those of full precision.

    Raises:
        UserError: a network of another kind.
    """
    check_kind(model)
    full, device = FullPrecision(model), next(model.parameters()).device
    streams = [torch.cat([full.embed(chunk.to(device)) for chunk in images.split(CHUNK)])]
    for index in range(full.depth):
        streams.append(_onwards(full, streams[-1], index, index + 1))
    reference = full.head(streams[-1]).log_softmax(-1)
    found = {}
    for index, block in enumerate(full.model.blocks):
        quantizers = dict(named_quantizers(block))
        given = full.transition(index, streams[index])
        for name in sorted(quantizers, key=_ORDER.index):
            changed = full_precision_block(block, given, full.has_irm, _alone(quantizers[name]))
            logits = full.head(_onwards(full, changed, index + 1, full.depth))
            divergence = F.kl_div(logits.log_softmax(-1), reference, log_target=True, reduction='batchmean')
            found.setdefault(name, np.zeros(full.depth))[index] = divergence.item()
    return found


_ORDER = ('attn.qkv.act', 'attn.qkv', 'attn.q_act', 'attn.k_act', 'attn.attn_act', 'attn.v_act', 'attn.proj.act',
          'attn.proj', 'mlp.fc1.act', 'mlp.fc1', 'mlp.fc2.act', 'mlp.fc2')


def _onwards(full: FullPrecision, x: Tensor, first: int, last: int) -> Tensor:
    """x through the blocks from `first` up to `last`, in full precision."""
    for index in range(first, last):
        x = torch.cat([full.block(index, full.transition(index, chunk)) for chunk in x.split(CHUNK)])
    return x


def _alone(wanted: nn.Module) -> Callable[[nn.Module, Tensor], Tensor]:
    """Quantizes what the quantizer `wanted` does, and leaves everything else as it is."""
    def change(quantizer: nn.Module, values: Tensor) -> Tensor:
        if quantizer is not wanted:
            return values
        if isinstance(quantizer, ActQ):
            return fit_activation(quantizer, values, 1 if values.ndim == 4 else -1)
        quantizer.set_qparams(weight_scales(values, *quantizer.code_range))
        return quantizer.quantized_weight()
    return change
