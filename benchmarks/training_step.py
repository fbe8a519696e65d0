"""Time and peak memory of one training step and of one evaluation, against full precision.

    python benchmarks/training_step.py                             4-bit DeiT-Tiny, batch 16
    python benchmarks/training_step.py --device cuda --compile --amp bf16 --batch-size 64

The reference is timm's distilled DeiT of the same size, with its own fused attention. Both networks have random
weights, neither dropout nor drop path, and 1000 classes; the quantized one is calibrated on the batch.

    training step   forward, the cross entropies of both heads, backward; the optimizer's step is not in it
    evaluation      forward without gradients; an eager quantized network keeps its quantized weights from the first

Time: machines are noisy, so the two networks take turns, and the ratio is the median of the pairs' ratios, given with
its quartiles; the ratio of the minima stands beside it. Warm-up, and so compilation, comes first.

Peak memory: parameters, buffers, gradients, and all that lives during a step, but no images and no optimizer state;
each figure comes from a process of its own. On a GPU it is the peak of PyTorch's allocator. On Linux CPUs it is the
tensors held between steps plus the resident set's growth to its peak during the steps after the warm-up; what
libraries and the compiler keep for themselves is in neither. glibc keeps freed memory, so these processes, and never
those that are timed, run with thresholds that make it return freed tensors. Other systems have no peak that can be
reset: there, none is given. 1 MB is 10^6 bytes.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.utils import ParseKwargs
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _quan_base import calibrate  # noqa: E402
from quant_vision_transformer import BITS, SIZES  # noqa: E402

VARIANTS = {f'{bits}_deit_{size}_patch16_224': f'deit_{size}_distilled_patch16_224' for bits in BITS for size in SIZES}
NETWORKS = 'full precision', 'quantized'
MODES = 'training step', 'evaluation'
WARM_UP = 3  # steps before any measurement; the first compiles
RETURN_FREED_MEMORY = {'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '65536'}  # bytes; read by glibc


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add('--model', default='fourbits_deit_tiny_patch16_224', choices=VARIANTS, metavar='NAME',
        help=f'quantized variant, one of {", ".join(VARIANTS)} (default: %(default)s)')
    add('--model-kwargs', nargs='+', default={}, action=ParseKwargs, metavar='KEY=VALUE',
        help='options of the quantized network, e.g. irm=False act_granularity=tensor')
    add('--batch-size', default=16, type=int, metavar='N', help='images of a step (default: %(default)s)')
    add('--input-size', default=224, type=int, metavar='PIXELS',
        help='height and width of the images, a multiple of 16 (default: %(default)s)')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='cpu or cuda (here: %(default)s)')
    add('--threads', default=torch.get_num_threads(), type=int, metavar='N', help='of the CPU (here: %(default)s)')
    add('--compile', action='store_true', help='torch.compile both networks, the quantized one with fullgraph=True')
    add('--amp', default='none', choices=('none', 'bf16'), help='bf16: under autocast (default: %(default)s)')
    add('--repeats', default=10, type=int, metavar='N',
        help='timed pairs of steps; more of them narrow the quartiles (default: %(default)s)')
    add('--json', type=Path, metavar='FILE', help='also write the results there, with the time of every step')
    add('--memory-of', nargs=2, metavar=('NETWORK', 'MODE'), help=argparse.SUPPRESS)  # the processes of peak_memory
    args = parser.parse_args(argv)
    if args.input_size % 16 or min(args.input_size, args.batch_size, args.threads, args.repeats) < 1:
        parser.error('the numbers are at least 1, and --input-size is a multiple of 16')
    if not (args.device == 'cpu' or args.device.startswith('cuda') and torch.cuda.is_available()):
        parser.error(f'--device {args.device}: neither cpu nor a GPU that PyTorch {torch.__version__} finds')
    return args


def build_batch(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) and labels (B,), random."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, generator=generator)
    return images.to(args.device), torch.randint(1000, (args.batch_size,), generator=generator).to(args.device)


def build_network(name: str, args: argparse.Namespace, images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    if name == 'quantized':
        net = timm.create_model(args.model, img_size=args.input_size, **args.model_kwargs).to(args.device)
        calibrate(net, images)
    else:
        net = timm.create_model(VARIANTS[args.model], img_size=args.input_size).to(args.device)
        net.set_distilled_training(True)
    return torch.compile(net, fullgraph=name == 'quantized') if args.compile else net


def build_step(mode: str, net: nn.Module, args: argparse.Namespace, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """The function to measure; on a GPU it returns before its kernels have run."""
    images, labels = batch
    autocast = torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp == 'bf16')
    training = mode == 'training step'
    net.train(training)

    def step() -> None:
        with torch.set_grad_enabled(training), autocast:
            out = net(images)  # (B, 1000); in training one for each head
            loss = sum(F.cross_entropy(logits, labels) for logits in out) if training else None
        if training:
            loss.backward()

    return step


def timed(step: Callable[[], None], net: nn.Module, device: str) -> float:
    """Milliseconds of the step, all kernels of a GPU included."""
    synchronize = torch.cuda.synchronize if device != 'cpu' else lambda device: None
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    milliseconds = (time.perf_counter() - start) * 1e3
    net.zero_grad()
    return milliseconds


def times(mode: str, nets: dict[str, nn.Module], args: argparse.Namespace, batch: tuple) -> dict[str, list[float]]:
    """Milliseconds of every step of each network, by pairs; who goes first alternates too."""
    steps = {name: build_step(mode, net, args, batch) for name, net in nets.items()}
    taken = {name: [] for name in nets}
    for turn in range(WARM_UP + args.repeats):
        for name in NETWORKS if turn % 2 else NETWORKS[::-1]:
            taken[name].append(timed(steps[name], nets[name], args.device))
    return {name: milliseconds[WARM_UP:] for name, milliseconds in taken.items()}


def peak_memory(name: str, mode: str, argv: list[str]) -> float | None:
    """Peak memory in MB, measured in a fresh process; None where this system doesn't tell."""
    command = [sys.executable, __file__, *argv, '--memory-of', name, mode]
    child = subprocess.run(command, env=os.environ | RETURN_FREED_MEMORY, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(child.stdout.splitlines()[-1])


def measure_memory(name: str, mode: str, args: argparse.Namespace) -> float | None:
    """What `peak_memory` runs in its process."""
    device, on_gpu = args.device, args.device != 'cpu'
    if not (on_gpu or sys.platform == 'linux'):
        return None
    batch = build_batch(args)
    before = torch.cuda.memory_allocated(device) if on_gpu else bytes_in_tensors()
    net = build_network(name, args, batch[0])
    step = build_step(mode, net, args, batch)
    for turn in range(2 * WARM_UP):
        if turn == WARM_UP and on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        elif turn == WARM_UP:
            held, at_rest = bytes_in_tensors() - before, reset_peak_resident()
        timed(step, net, device)
    if on_gpu:
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    return None if at_rest is None else (held + resident('VmHWM') - at_rest) / 1e6


def reset_peak_resident() -> int | None:
    """VmHWM begins anew at the bytes returned; None where the system refuses."""
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', lambda pad: None)  # glibc's
    trim(0)  # empties the holes that the warm-up left: filling them again would not show as growth
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')
        return resident('VmRSS')
    return None


def resident(field: str) -> int:
    """Bytes of this process in physical memory: 'VmRSS' now, 'VmHWM' at most since the last reset."""
    fields = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
    return int(fields[field].removesuffix('kB')) * 1024


def bytes_in_tensors() -> int:
    """Of every CPU tensor that Python knows; views count once."""
    gc.collect()
    storages = {}
    for tensor in gc.get_objects():
        if type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == 'cpu':
            with contextlib.suppress(RuntimeError):  # the compiler's: they have no data
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def hardware(device: str) -> str:
    if device != 'cpu':
        return torch.cuda.get_device_name(device)
    cpuinfo = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    models = [line.partition(': ')[2] for line in cpuinfo if line.startswith('model name')] or [platform.machine()]
    return f'{models[0]}, {os.cpu_count()} cores'


def summarize(taken: dict[str, list[float]], memory: dict[str, float | None]) -> dict:
    """One row: medians, minima and ratios, quantized to full precision."""
    full, quantized = (taken[name] for name in NETWORKS)
    ratios = torch.tensor([q / f for f, q in zip(full, quantized, strict=True)], dtype=torch.float64)
    low, median, high = ratios.quantile(torch.tensor([.25, .5, .75], dtype=torch.float64)).tolist()
    return {'median_ms': {name: statistics.median(taken[name]) for name in NETWORKS}, 'time_ratio': median,
            'time_ratio_quartiles': [low, high], 'time_ratio_of_minima': min(quantized) / min(full),
            'memory_mb': memory, 'memory_ratio': None if None in memory.values() else
            memory['quantized'] / memory['full precision'], 'all_ms': taken}


def table(results: dict) -> str:
    """Markdown."""
    lines = [f'- {key}: {value}' for key, value in results.items() if key != 'rows'] + [
        '', '| | full precision (ms) | quantized (ms) | ratio (quartiles) | of minima '
            '| full precision (MB) | quantized (MB) | ratio |', '|---|--:|--:|--:|--:|--:|--:|--:|']
    for mode, row in results['rows'].items():
        low, high = row['time_ratio_quartiles']
        cells = [mode, *(f'{row["median_ms"][name]:.1f}' for name in NETWORKS),
                 f'{row["time_ratio"]:.2f} ({low:.2f} to {high:.2f})', f'{row["time_ratio_of_minima"]:.2f}']
        cells += ['not measured'] * 3 if row['memory_ratio'] is None else [
            *(f'{row["memory_mb"][name]:.0f}' for name in NETWORKS), f'{row["memory_ratio"]:.2f}']
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(measure_memory(*args.memory_of, args)))
        return
    # Memory first: this process would hold some of the GPU's.
    memory = {mode: {name: peak_memory(name, mode, argv) for name in NETWORKS} for mode in MODES}
    batch = build_batch(args)
    nets = {name: build_network(name, args, batch[0]) for name in NETWORKS}
    rows = {mode: summarize(times(mode, nets, args, batch), memory[mode]) for mode in MODES}
    results = {'command': shlex.join(['python', 'benchmarks/training_step.py', *argv]),
               'hardware': hardware(args.device), 'threads': torch.get_num_threads(),
               'versions': f'PyTorch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}',
               'runs': f'{args.repeats} pairs of steps after {WARM_UP} to warm up', 'rows': rows}
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + '\n')


if __name__ == '__main__':
    main(sys.argv[1:])
