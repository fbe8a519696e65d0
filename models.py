"""Full-precision DeiT: teachers, and the networks that quantized ones start from.

They are timm's, under timm's names (`deit_tiny_distilled_patch16_224`) and under those of the published commands
(`vit_deit_tiny_distilled_patch16_224`). Importing this module registers the latter.
"""
import timm
import torch.nn as nn
from timm.models import generate_default_cfgs, register_model

__all__: list[str] = []  # the aliases, added as they are registered

_TARGETS = {f'vit_deit_{size}{distilled}_patch16_224': f'deit_{size}{distilled}_patch16_224'
            for size in ('tiny', 'small', 'base') for distilled in ('', '_distilled')}

default_cfgs = generate_default_cfgs({
    f'{alias}.fb_in1k': timm.get_pretrained_cfg(target).to_dict() for alias, target in _TARGETS.items()})


def _register_alias(alias: str, target: str) -> None:
    def model(pretrained: bool = False, **kwargs) -> nn.Module:
        return timm.create_model(target, pretrained=pretrained, **kwargs)

    model.__name__ = model.__qualname__ = alias
    model.__doc__ = f"timm's {target} under the name of the published commands."
    globals()[alias] = register_model(model)


for _alias, _target in _TARGETS.items():
    _register_alias(_alias, _target)
