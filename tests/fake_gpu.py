"""A GPU that computes nothing: tensors with a device, a type and a size, and a watch over what is done with them.

Every operation runs through PyTorch's own checks of devices, types and shapes, and none of them needs a GPU. What is
missed is what a kernel does: its values, its speed, and memory that it takes for itself.
"""
import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ['GPU', 'Watch', 'backward', 'fake_gpu', 'moved']

GPU = torch.device('cuda', 0)


def backward(root: torch.autograd.graph.Node, grad: Tensor) -> None:
    """What `loss.backward()` does, in Python: PyTorch's engine asks the device's driver for its streams.

    Args:
        root: the `grad_fn` of the loss, which nobody else may hold: what nodes saved is freed as they are done.
        grad: of the loss, 0-dim.
    """
    waiting, seen = {root: 0}, [root]
    for node in seen:  # grows
        for following, _ in node.next_functions:
            if following is not None:
                if following not in waiting:
                    seen.append(following)
                waiting[following] = waiting.get(following, 0) + 1
    del seen, node
    gradients, ready = {root: {0: grad}}, [root]
    del root
    with torch.no_grad():
        while ready:
            node = ready.pop()
            del waiting[node]
            given = gradients.pop(node, {})
            if hasattr(node, 'variable'):
                leaf, (grad,) = node.variable, given.values()
                leaf.grad = grad if leaf.grad is None else leaf.grad + grad
                continue
            call = getattr(node, 'apply', node)  # an autograd function in Python, or a node of PyTorch's
            results = call(*map(given.pop, range(len(node._input_metadata)), [None] * len(node._input_metadata)))
            results = results if isinstance(results, tuple) else (results,)
            edges = [edge for edge in node.next_functions if edge[0] is not None]
            if call is node:
                results = [result for result, edge in zip(results, node.next_functions, strict=True) if edge[0]]
            else:  # its results are also for what is no tensor
                results = [result for result, needed in zip(results, node.needs_input_grad, strict=True) if needed]
            for (following, place), result in zip(edges, results, strict=True):
                waiting[following] -= 1
                if result is not None:
                    result = _checked(node, result, following._input_metadata[place])
                    sums = gradients.setdefault(following, {})
                    sums[place] = result if place not in sums else sums[place] + result
                if waiting[following] == 0:
                    ready.append(following)
            del node, call, edges, following, results, result, given


def _checked(node: torch.autograd.graph.Node, gradient: Tensor, value: Any) -> Tensor:
    """The gradient in the type and the shape of the value, as PyTorch's engine hands it on."""
    assert gradient.device == value.device, f'{node.name()} gives a gradient on {gradient.device} for {value.device}'
    return gradient.sum_to_size(value.shape).to(value.dtype)


class Watch(TorchDispatchMode):
    """What operations on the fake GPU would do to the host and to the GPU's memory.

    Args:
        answer: what the host gets when it reads a value; None refuses, by PyTorch's DataDependentOutputException.

    Attributes:
        reads: operations that bring values to the host, which waits for them.
        uploads: operations that bring values from the host.
        held, peak: bytes of the tensors on the GPU, now and at most.
    """

    def __init__(self, answer: float | None = None) -> None:
        super().__init__()
        self.answer, self.held, self.peak = answer, 0, 0
        self.reads, self.uploads = [], []
        self._known: dict[int, Any] = {}

    def count(self, *tensors: Tensor) -> None:
        """Counts the memory of tensors on the GPU from now until they are gone; views of one storage count once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                size = storage.nbytes()
                self._known[key] = weakref.ref(storage, lambda _, key=key, size=size: self._gone(key, size))
                self.held += size
        self.peak = max(self.peak, self.held)

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        self.held -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.reads += [str(function)] if args[0].is_cuda else []
            if self.answer is not None:
                return bool(self.answer) if args[0].dtype == torch.bool else self.answer
        result = function(*args, **(kwargs or {}))
        given, made = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
                       for tree in ((args, kwargs or {}), result))
        self.count(*(tensor for tensor in made if tensor.is_cuda))
        on_gpu = any(tensor.is_cuda for tensor in given)
        for tensor in made:
            if not tensor.is_cuda and on_gpu:
                self.reads.append(str(function))
            elif tensor.is_cuda and any(not other.is_cuda and other.ndim for other in given):
                self.uploads.append(str(function))
        return result


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """Lets what asks for a GPU find one; tensors that are made within are fake."""
    present = {'is_available': True, 'is_bf16_supported': True, 'max_memory_allocated': 0}
    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        torch.empty(1, device=GPU)
        patch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)
        patch.setattr(FakeTensorMode, '__deepcopy__', lambda mode, memo: mode, raising=False)  # copies stay in it
        for name, value in present.items():
            patch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
        yield


def moved(model: nn.Module) -> nn.Module:
    """The model with parameters and buffers of the same types and shapes on the fake GPU."""
    def like(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(like(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = like(buffer)
    return model
