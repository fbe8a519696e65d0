"""What the benchmarks share: times of parts, peak memory of a process, and what a figure was measured on."""

import contextlib
import ctypes
import gc
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


# --- reports ----------------------------------------------------------------------------------------------------------


def nested_list(value: Any, indent: int = 0) -> list[str]:
    """A nested list of what was found; what single forwards took stays in the JSON file."""
    lines = []
    for key, item in value.items():
        if isinstance(item, list) and item and isinstance(item[0], dict):
            item = {row.get('label') or row.get('workers', number): {
                name: cell for name, cell in row.items() if name not in ('all', 'ms', 'label')} | {
                f'median ms, batch {count}': sorted(ms)[len(ms) // 2] for count, ms in row.get('ms', {}).items() if ms}
                for number, row in enumerate(item)}
        if isinstance(item, dict):
            lines += [f'{"  " * indent}- {key}', *nested_list(item, indent + 1)]
        else:
            lines.append(f'{"  " * indent}- {key}: {item}')
    return lines


def step_rows(result: dict[str, Any]) -> list[str]:
    """The columns of docs/training_speed.md."""
    lines = ['| | | full precision (ms) | quantized (ms) | time ratio | images/s, full | quantized | full precision '
             '(MB) | quantized (MB) | memory ratio |', '|---|---|' + '--:|' * 8]
    both, notes = ('full precision', 'quantized'), []
    for form, found in result.items():
        if isinstance(found, str):
            notes.append(f'- {form}: {found}')
            continue
        for mode, row in found['rows'].items():
            numbers = [*(f'{row["median_ms"][name]:.1f}' for name in both), f'{row["time_ratio"]:.2f}',
                       *(f'{row["images_per_second"][name]:.1f}' for name in both)]
            numbers += ['', '', ''] if row['memory_ratio'] is None else [
                *(f'{row["memory_mb"][name]:.0f}' for name in both), f'{row["memory_ratio"]:.2f}']
            lines.append(f'| {form} | {mode} | {" | ".join(numbers)} |')
        step = sum(part['quantized'] for part in found['parts_ms'].values())
        parts = ', '.join(f'{part} {ms["quantized"]:.1f} ms' for part, ms in found['parts_ms'].items())
        notes.append(f'- {form}: {parts}; DGD by itself {found["dgd_ms"]["d x d"]:.1f} ms, '
                     f'{found["dgd_ms"]["d x d"] / step:.1%} of the step')
    return [*lines, '', *notes]
