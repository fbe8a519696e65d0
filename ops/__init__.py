"""The products that quantized layers call, in several implementations of one interface.

`reference.Reference` has the signatures and is the definition. A layer names the implementation that computes it:

    reference   plain compositions of the quantizer's equation
    torch       quantizes again in the backward instead of keeping quantized copies; any device (the default)
    cpu         the same with elementwise passes in C++; what these do not take is left to torch
    triton      the same with elementwise passes in Triton, for GPUs; not yet measured on any

`use(model, name)` sets it for a whole network, `get(layer.implementation).linear(...)` computes. Another one is
a class with these methods and a line below.
"""
from __future__ import annotations

import torch
from torch import nn

from ops.cpp_library import NativeUnavailable
from ops.cpu_kernels import CppKernels
from ops.grid import Grid, min_scale
from ops.recompute import OpaqueRecomputing, Recomputing
from ops.reference import Reference
from ops.registry import get, names, register
from ops.torch_kernels import TorchKernels, clipped_gelu
from utils import UserError

__all__ = ['Grid', 'NativeUnavailable', 'choose', 'clipped_gelu', 'get', 'min_scale', 'names', 'use']

register('reference', Reference)
register('torch', lambda: Recomputing('torch', TorchKernels()))
register('cpu', lambda: OpaqueRecomputing('cpu', CppKernels()))
register('triton', lambda: Recomputing('triton', _triton_kernels()))


def use(model: nn.Module, name: str) -> None:
    """Lets `name` compute every quantized product of the model from now on.

    Raises:
        ValueError: there is no implementation of that name.
        NativeUnavailable: its code cannot be compiled here.
    """
    get(name)
    for module in model.modules():
        if hasattr(module, 'implementation'):
            module.implementation = name


def _triton_kernels() -> TorchKernels:
    try:
        from ops.triton_kernels import TritonKernels
    except ImportError as error:
        raise NativeUnavailable(f'Triton cannot be imported ({error})') from error
    return TritonKernels()


def choose(native: bool | None, device: torch.device, kernels: str | None = None) -> str:
    """The implementation for a device: `kernels`; else 'cpu' on a CPU that has a C++ compiler, and 'torch' elsewhere.

    Args:
        native: True demands the C++ kernels and False refuses them; None takes them where they can be had, and says so
            where they cannot.
        kernels: the implementation that is demanded; None leaves it open.

    Raises:
        UserError: what is demanded cannot be had.
    """
    if kernels is not None:
        try:
            get(kernels)
        except NativeUnavailable as error:
            raise UserError(f'--kernels {kernels}: {error}') from error
        return kernels
    if not (device.type == 'cpu' if native is None else native):
        return 'torch'
    try:
        get('cpu')
    except NativeUnavailable as error:
        if native:
            raise UserError(f'--native-kernels: {error}') from error
        print(f'quantizers are computed in plain PyTorch, without C++ kernels: {error}')
        return 'torch'
    return 'cpu'
