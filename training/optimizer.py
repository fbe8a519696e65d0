"""The optimizer of a training run: timm's optimizers by DeiT's flags, and LAMB without apex.

The published recipe is `--opt fusedlamb` at weight decay 0: NVIDIA apex's FusedLAMB (LAMB: You et al., 2020, arXiv
1904.00962). timm's Lamb makes the same update in plain PyTorch and takes its place where apex or CUDA is missing.
"""

import difflib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm.optim
import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from _quan_base import named_quantizers
from utils import UserError

__all__ = ['OptimizerConfig', 'build_optimizer', 'check_optimizer']

# apex's own defaults, spelled out so that neither library's can drift away from the published update. timm's Lamb
# always adds the decay to the update (adam_w_mode) and by always_adapt=False skips the trust ratio where there is no
# decay (no NVLAMB).
_LAMB = {'bias_correction': True, 'grad_averaging': True, 'max_grad_norm': 1.0}
_APEX_ONLY = {'adam_w_mode': True, 'use_nvlamb': False}
_TIMM_ONLY = {'trust_clip': False, 'always_adapt': False}


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer, and the values that it takes; None leaves a value to the optimizer.

    Attributes:
        lr: the learning rate itself, scaled to the images of an update.
        step_lr_scale: learning rate of the quantizers' scales and zero points, in units of `lr`.
    """
    opt: str = 'adamw'
    lr: float = 5e-4
    weight_decay: float = 0.05
    momentum: float = 0.9
    opt_eps: float | None = None
    opt_betas: Sequence[float] | None = None
    step_lr_scale: float = 1.


def build_optimizer(config: OptimizerConfig, model: nn.Module, announce: bool = True) -> torch.optim.Optimizer:
    """The optimizer that `--opt` names, over the parameters of `model` that require gradients.

    One-dimensional parameters (biases, norms, scales and zero points of quantizers) and those that
    `model.no_weight_decay()` names (position embedding, class and distillation token) get no weight decay. Scales and
    zero points learn at `step_lr_scale` times the rate; the scheduler multiplies it in. `fusedlamb` is apex's where it
    can be used on the model's device, else timm's Lamb with the same update.

    Args:
        model: on its device; not wrapped in DDP, which hides `no_weight_decay`.
        announce: whether a line says, once, that `fusedlamb` is timm's.

    Raises:
        UserError: no optimizer of that name, one that is not installed, or values that it does not take.
    """
    assert not isinstance(model, DistributedDataParallel), 'build the optimizer from the model inside DDP (.module)'
    kwargs = timm.optim.optimizer_kwargs(config)
    kwargs['opt'] = name = config.opt.lower()
    if name == 'fusedlamb' and _apex_is_usable(next(model.parameters()).device):
        kwargs.update(_LAMB, **_APEX_ONLY)
    elif name == 'fusedlamb':
        if announce:
            _announce_timm_lamb()
        kwargs.update(_LAMB, **_TIMM_ONLY, opt='lamb')
    else:
        _check_name(name)
    parameters = _by_learning_rate(model, kwargs, config.step_lr_scale)
    try:
        return timm.optim.create_optimizer_v2(parameters, **kwargs)
    # timm and the optimizers refuse with whichever of these: unknown, not installed, needs CUDA, bad or unknown value.
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition('\n')[0] or type(error).__name__
        raise UserError(f'--opt {config.opt} cannot be used ({reason}): '
                        'correct the optimizer flags or choose another, e.g. --opt adamw') from error


def check_optimizer(config: OptimizerConfig) -> None:
    """Refuses what `build_optimizer` would refuse, before there is a network, on the CPU.

    Raises:
        UserError: see `build_optimizer`.
    """
    build_optimizer(config, nn.Linear(1, 1), announce=False)


def _by_learning_rate(model: nn.Module, kwargs: dict[str, Any], step_lr_scale: float) -> nn.Module | list[dict]:
    """What to optimize: the model, or groups of its parameters where scales and zero points have their own rate."""
    if step_lr_scale == 1:
        return model
    # At lr 1e-4 an Adam-like update moves every parameter by about 1e-4: little for a weight, much for a scale of 0.02.
    own_rate = {id(parameter) for _, quantizer in named_quantizers(model)
                for name, parameter in quantizer.named_parameters(recurse=False) if name in ('alpha', 'zero_point')}
    decay = kwargs.pop('weight_decay')
    exempt = getattr(model, 'no_weight_decay', set)()
    groups = []
    for group in param_groups_weight_decay(model, decay, no_weight_decay_list=exempt):
        chosen = [parameter for parameter in group['params'] if id(parameter) in own_rate]
        others = [parameter for parameter in group['params'] if id(parameter) not in own_rate]
        groups += [group | {'params': others}] if others else []
        groups += [group | {'params': chosen, 'lr_scale': step_lr_scale}] if chosen else []
    return groups


def _apex_is_usable(device: torch.device) -> bool:
    if device.type != 'cuda':
        return False
    try:
        import amp_C  # noqa: F401  the CUDA extension of apex, without which its optimizers refuse to be built
        from apex.optimizers import FusedLAMB  # noqa: F401  a package on PyPI called apex has no such optimizer
    except ImportError:
        return False
    return True


@functools.cache
def _announce_timm_lamb() -> None:
    print("--opt fusedlamb: apex with CUDA is not available, using timm's Lamb, which makes the same update")


def _check_name(name: str) -> None:
    # timm lists its optimizers since 1.0.12; before, create_optimizer_v2 refuses unknown names without suggestions.
    if not hasattr(timm.optim, 'list_optimizers'):
        return
    known = timm.optim.list_optimizers()
    if name.removeprefix('lookahead_') in known:
        return
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f'did you mean {", ".join(close)}?' if close else 'timm.optim.list_optimizers() lists the names'
    raise UserError(f'--opt {name} is no optimizer of timm: {hint}')
