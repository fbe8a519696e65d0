"""What the benchmarks share: times of parts, peak memory of a process, and what a figure was measured on."""

import contextlib
import ctypes
import gc
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

RETURN_FREED_MEMORY = {'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '65536'}  # bytes; read by glibc


class Stopwatch:
    """Milliseconds of named parts, all kernels of a GPU included; `parts` holds those since `start`."""

    def __init__(self, device: str) -> None:
        self._synchronize = torch.cuda.synchronize if device != 'cpu' else lambda: None
        self.parts: dict[str, float] = {}

    def start(self) -> None:
        self.parts = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._synchronize()
        begin = time.perf_counter()
        yield
        self._synchronize()
        self.parts[part] = self.parts.get(part, 0.) + (time.perf_counter() - begin) * 1e3


def versions() -> str:
    return f'PyTorch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}'


def reset_peak_resident() -> int | None:
    """Lets the peak, VmHWM, begin anew, and returns the bytes it begins at; None where the system refuses."""
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', lambda pad: None)  # glibc's
    trim(0)  # The warm-up leaves holes, and filling them again would not show as growth.
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')
        return resident('VmRSS')
    return None


def resident(field: str) -> int:
    """Bytes of this process in physical memory: 'VmRSS' now, 'VmHWM' at most since the last reset."""
    fields = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
    return int(fields[field].removesuffix('kB')) * 1024


def bytes_in_tensors() -> int:
    """How many bytes all CPU tensors that Python knows take together; views of one storage count once."""
    gc.collect()
    storages = {}
    for tensor in gc.get_objects():
        if type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == 'cpu':
            with contextlib.suppress(RuntimeError):  # the compiler's own tensors have no data
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def hardware(device: str) -> str:
    if device != 'cpu':
        return torch.cuda.get_device_name(device)
    cpuinfo = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    models = [line.partition(': ')[2] for line in cpuinfo if line.startswith('model name')] or [platform.machine()]
    return f'{models[0]}, {os.cpu_count()} cores'
