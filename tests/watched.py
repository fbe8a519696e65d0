"""Small networks to look into, for tests of the analysis and of the commands that use it."""

import timm
import torch
from torch import nn

import models  # noqa: F401  registers the full-precision networks
import quant_vision_transformer  # noqa: F401  registers the quantized ones
from calibration.first_batch import calibrate

SHAPE = {'embed_dim': 24, 'depth': 2, 'num_heads': 2, 'patch_size': 8}
STUDENT, TEACHER = 'fourbits_deit_tiny_patch16_224', 'deit_tiny_distilled_patch16_224'


def build(name: str, dtype: torch.dtype = torch.float32, **kwargs) -> nn.Module:
    """A network for images of 16 px, its quantizers calibrated."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=16, num_classes=10, **(SHAPE | kwargs)).to(dtype)
    for block in model.blocks:  # weights of 0.02 would make all attention alike
        nn.init.normal_(block.attn.qkv.weight, std=0.5)
    calibrate(model, images_of(8, dtype))
    return model.eval()


def images_of(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(1))
