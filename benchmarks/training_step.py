"""Time and peak memory of one training step and of one evaluation, against full precision.

    python benchmarks/training_step.py                                    4-bit DeiT-Tiny, batch 16, this machine's device
    python benchmarks/training_step.py --compile --amp bf16 --batch-size 64 --device cuda
    python benchmarks/training_step.py --model twobits_deit_small_patch16_224 --json small.json

The reference is timm's distilled DeiT of the same size, with its own fused attention. Both networks have random weights,
neither dropout nor drop path, and 1000 classes; the quantized one is calibrated on the batch.

What is measured:
    training step   forward, the cross entropies of both heads, backward; the optimizer's step is not in it
    evaluation      forward without gradients; an eager quantized network keeps its quantized weights from the first one

Time: machines are noisy, so the two networks take turns, and the ratio is the median of the pairs' ratios, given with its
quartiles; the ratio of the minima stands beside it. Warm-up, and so compilation, comes first.

Peak memory: parameters, gradients, and all that lives during a step, but no batch of images and no optimizer state; each
figure comes from a process of its own. On a GPU it is the peak of PyTorch's allocator. On Linux CPUs it is the peak of the
resident set over the steps after the warm-up, less the resident set before the network was built. glibc keeps freed memory
for itself, so these processes, and never those that are timed, run with thresholds that make it return every freed tensor.
Other systems have no peak that can be reset: there, none is given. 1 MB is 10^6 bytes.
"""
from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _quan_base import calibrate  # noqa: E402
from quant_vision_transformer import BITS, SIZES  # noqa: E402

VARIANTS = {f'{bits}_deit_{size}_patch16_224': size for bits in BITS for size in SIZES}
NETWORKS = 'full precision', 'quantized'
MODES = 'training step', 'evaluation'
WARM_UP = 3  # steps before any measurement; the first compiles
MEMORY_STEPS = 3
RETURN_FREED_MEMORY = {'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '65536'}  # bytes; read by glibc


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition('=')
    if not (key.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f'{text!r} is not of the form key=value')
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive integer')
    return int(text)


def parse_args(argv: list[str]) -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add('--model', default='fourbits_deit_tiny_patch16_224', choices=VARIANTS, metavar='NAME',
        help='quantized variant, {twobits,threebits,fourbits}_deit_{tiny,small,base}_patch16_224; its size is also that '
             'of the full-precision network (default: %(default)s)')
    add('--model-kwargs', nargs='+', action='extend', default=[], type=_key_value, metavar='KEY=VALUE',
        help='options of the quantized network, e.g. irm=False act_granularity=tensor')
    add('--batch-size', default=16, type=_positive, metavar='N', help='images of a step (default: %(default)s)')
    add('--input-size', default=224, type=_positive, metavar='PIXELS',
        help='height and width of the images, a multiple of 16 (default: %(default)s)')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='(default here: %(default)s)')
    add('--threads', type=_positive, metavar='N',
        help="CPU threads (default: PyTorch's choice, here %d)" % torch.get_num_threads())
    add('--compile', action='store_true', help='torch.compile both networks, the quantized one with fullgraph=True')
    add('--amp', default='none', choices=('none', 'bf16'),
        help='bf16: forward and loss of both networks under autocast (default: %(default)s)')
    add('--repeats', default=10, type=_positive, metavar='N',
        help='timed pairs of steps; more narrow the quartiles (default: %(default)s)')
    add('--json', type=Path, metavar='FILE', help='also write the results there, with the time of every step')
    add('--memory-of', nargs=2, metavar=('NETWORK', 'MODE'), help=argparse.SUPPRESS)  # the processes of peak_memory
    args = parser.parse_args(argv)
    if args.input_size % 16:
        parser.error(f'--input-size {args.input_size} is not a multiple of 16')
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        parser.error(f'--device {args.device}: PyTorch {torch.__version__} finds no GPU')
    return args


# --- the networks and their steps --------------------------------------------------------------------------------------


def build_batch(args: Namespace) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) and labels (B,), random."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, generator=generator)
    return images.to(args.device), torch.randint(1000, (args.batch_size,), generator=generator).to(args.device)


def build_network(name: str, args: Namespace, images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    if name == 'quantized':
        net = timm.create_model(args.model, img_size=args.input_size, **dict(args.model_kwargs)).to(args.device)
        calibrate(net, images)
    else:
        full_precision = f'deit_{VARIANTS[args.model]}_distilled_patch16_224'
        net = timm.create_model(full_precision, img_size=args.input_size).to(args.device)
        net.set_distilled_training(True)
    return torch.compile(net, fullgraph=name == 'quantized') if args.compile else net


def build_step(mode: str, net: nn.Module, args: Namespace, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """The function to measure; on a GPU it returns before its kernels have run."""
    autocast = torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp == 'bf16')

    def training_step() -> None:
        with autocast:
            logits, dist_logits = net(images)  # (B, 1000) each
            loss = F.cross_entropy(logits, labels) + F.cross_entropy(dist_logits, labels)
        loss.backward()

    def evaluation() -> None:
        with torch.no_grad(), autocast:
            net(images)

    net.train(mode == 'training step')
    return training_step if mode == 'training step' else evaluation


def synchronize(device: str) -> None:
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)


# --- time --------------------------------------------------------------------------------------------------------------


def times(mode: str, nets: dict[str, nn.Module], args: Namespace, images: Tensor,
          labels: Tensor) -> dict[str, list[float]]:
    """Milliseconds of every step of each network, by pairs; who goes first alternates too."""
    steps = {name: build_step(mode, net, args, images, labels) for name, net in nets.items()}
    taken = {name: [] for name in nets}
    for turn in range(WARM_UP + args.repeats):
        for name in NETWORKS if turn % 2 else NETWORKS[::-1]:
            synchronize(args.device)
            start = time.perf_counter()
            steps[name]()
            synchronize(args.device)
            taken[name].append((time.perf_counter() - start) * 1e3)
            nets[name].zero_grad(set_to_none=True)
    return {name: milliseconds[WARM_UP:] for name, milliseconds in taken.items()}


# --- memory ------------------------------------------------------------------------------------------------------------


def peak_memory(name: str, mode: str, argv: list[str]) -> float | None:
    """Peak memory in MB, measured in a fresh process; None where this system doesn't tell."""
    command = [sys.executable, __file__, *argv, '--memory-of', name, mode]
    child = subprocess.run(command, env=os.environ | RETURN_FREED_MEMORY, stdout=subprocess.PIPE, text=True)
    if child.returncode:
        sys.exit(f'the measurement of memory ended with status {child.returncode}: {shlex.join(command)}')
    return json.loads(child.stdout.splitlines()[-1])


def measure_memory(name: str, mode: str, args: Namespace) -> float | None:
    """What `peak_memory` runs in its process."""
    on_gpu = torch.device(args.device).type == 'cuda'
    if not on_gpu and not sys.platform.startswith('linux'):
        return None
    images, labels = build_batch(args)
    before = torch.cuda.memory_allocated(args.device) if on_gpu else resident('VmRSS')
    net = build_network(name, args, images)
    step = build_step(mode, net, args, images, labels)
    for turn in range(WARM_UP + MEMORY_STEPS):
        if turn == WARM_UP:
            torch.cuda.reset_peak_memory_stats(args.device) if on_gpu else reset_peak_resident()
        step()
        net.zero_grad(set_to_none=True)
    synchronize(args.device)
    return ((torch.cuda.max_memory_allocated(args.device) if on_gpu else resident('VmHWM')) - before) / 1e6


def resident(field: str) -> int:
    """Bytes of this process in physical memory: 'VmRSS' now, 'VmHWM' at most since the last reset."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f'{field}:'))


def reset_peak_resident() -> None:
    Path('/proc/self/clear_refs').write_text('5')
