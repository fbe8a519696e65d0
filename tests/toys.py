"""Networks to count, for tests of costs and of the command that reports them."""

import timm
from torch import nn

import models  # noqa: F401  registers the aliases
import quant_vision_transformer  # noqa: F401  registers the variants

TINY, SMALL = 'fourbits_deit_tiny_patch16_224', 'fourbits_deit_small_patch16_224'


def create(name: str = TINY, **changes) -> nn.Module:
    return timm.create_model(name, **{'img_size': 48, 'embed_dim': 48, 'depth': 2, 'num_heads': 3, 'num_classes': 10}
                             | changes)
