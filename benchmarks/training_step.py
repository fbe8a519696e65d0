"""Time and peak memory of a whole training step, part by part, and of an evaluation, against full precision.

    python benchmarks/training_step.py                             4-bit DeiT-Tiny, batch 16
    python benchmarks/training_step.py --native-kernels            its quantizers and DGD in C++, main.py's default
    python benchmarks/training_step.py --device cuda --compile --amp bf16 --batch-size 128

The reference is timm's distilled DeiT of the same size, with its own fused attention, that learns from the same teacher
(a distilled DeiT of that size too) by hard distillation; the quantized network also by DGD. Both have random weights,
neither dropout nor drop path, and 1000 classes; the quantized one is calibrated on the batch.

    training step   student forward, teacher, losses (of the quantized network with DGD), backward, optimizer (LAMB)
    student         its two parts student forward and backward (with the backward of the losses)
    evaluation      forward without gradients; an eager quantized network keeps its quantized weights from the first

DGD, forward and backward, is timed by itself as well, by products of d x d and by plain N x N Gram matrices; in the
step, its time is part of the losses and the backward. Loading the images is `data_loading.py`'s.

Time: machines are noisy, so the two networks take turns, and the ratio is the median of the pairs' ratios, given with
its quartiles; the ratio of the minima stands beside it. Warm-up, and so compilation, comes first.

Peak memory: parameters, buffers, gradients, teacher, state of the optimizer, and all that lives during a step, but no
images; each figure comes from a process of its own. On a GPU it is the peak of PyTorch's allocator. On Linux CPUs it is
the tensors held between steps plus the resident set's growth to its peak during the steps after the warm-up; what
libraries and the compiler keep for themselves is in neither. glibc keeps freed memory, so these processes, and never
those that are timed, run with thresholds that make it return freed tensors; those that are timed keep it, as main.py
does. Other systems have no peak that can be reset: there, none is given. 1 MB is 10^6 bytes.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from _measure import RETURN_FREED_MEMORY, Stopwatch, bytes_in_tensors, hardware, reset_peak_resident, resident, versions
from timm.utils import ParseKwargs
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engine  # noqa: E402
import ops  # noqa: E402
from _quan_base import clamp_steps_  # noqa: E402
from calibration.first_batch import calibrate  # noqa: E402
from losses import Distillation, DistillationLoss, distribution_guided_distillation  # noqa: E402
from models import BlockOutputs, Teacher  # noqa: E402
from ops.cpu_memory import keep_freed_memory
from quant_vision_transformer import BITS, SIZES  # noqa: E402
from training.optimizer import OptimizerConfig, build_optimizer  # noqa: E402
from utils import UserError  # noqa: E402

VARIANTS = {f'{bits}_deit_{size}_patch16_224': f'deit_{size}_distilled_patch16_224' for bits in BITS for size in SIZES}
NETWORKS = 'full precision', 'quantized'
MODES = 'training step', 'evaluation'
STUDENT = 'student forward', 'backward'
WARM_UP = 3  # steps before any measurement; the first compiles


@dataclass(frozen=True)
class Settings:
    """The flags."""
    model: str
    model_kwargs: dict[str, Any]
    batch_size: int
    input_size: int
    device: str
    threads: int
    compile: bool
    native_kernels: bool
    kernels: str | None
    amp: str
    tf32: bool
    repeats: int
    json: Path | None
    memory_of: list[str] | None


def parse_args(argv: list[str]) -> Settings:
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
    add('--native-kernels', action='store_true', help='quantizers and DGD in C++, on a CPU')
    add('--kernels', choices=('triton',), help='quantizers in Triton, on a GPU')
    add('--amp', default='none', choices=engine.AMP_DTYPES, help='precision of the products; the loss is not '
        'scaled (default: %(default)s)')
    add('--tf32', action='store_true', help='float32 products of a GPU in TF32')
    add('--repeats', default=10, type=int, metavar='N',
        help='timed pairs of steps; more of them narrow the quartiles (default: %(default)s)')
    add('--json', type=Path, metavar='FILE', help='also write the results there, with the time of every step')
    add('--memory-of', nargs=2, metavar=('NETWORK', 'MODE'), help=argparse.SUPPRESS)  # the processes of peak_memory
    settings = Settings(**vars(parser.parse_args(argv)))
    numbers = settings.input_size, settings.batch_size, settings.threads, settings.repeats
    if settings.input_size % 16 or min(numbers) < 1:
        parser.error('the numbers are at least 1, and --input-size is a multiple of 16')
    if settings.native_kernels and settings.device != 'cpu':
        parser.error('--native-kernels are for --device cpu')
    if settings.kernels and settings.device == 'cpu':
        parser.error(f'--kernels {settings.kernels} are for --device cuda')
    if not (settings.device == 'cpu' or settings.device.startswith('cuda') and torch.cuda.is_available()):
        parser.error(f'--device {settings.device}: neither cpu nor a GPU that PyTorch {torch.__version__} finds')
    return settings


def build_batch(settings: Settings) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) and labels (B,), random."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(settings.batch_size, 3, settings.input_size, settings.input_size, generator=generator)
    labels = torch.randint(1000, (settings.batch_size,), generator=generator)
    return images.to(settings.device), labels.to(settings.device)


def implementation_of(settings: Settings) -> str:
    return ops.choose(settings.native_kernels, torch.device(settings.device), settings.kernels)


def build_network(name: str, settings: Settings, images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    if name == 'quantized':
        net = timm.create_model(settings.model, img_size=settings.input_size, **settings.model_kwargs)
        net.to(settings.device)
        ops.use(net, implementation_of(settings))
        calibrate(net, images)
    else:
        net = timm.create_model(VARIANTS[settings.model], img_size=settings.input_size).to(settings.device)
        net.set_distilled_training(True)
    if settings.compile:
        net.compile(fullgraph=name == 'quantized')
    return net


class TimedTeacher(Teacher):
    """A teacher whose forward is a part of its own."""

    def __init__(self, model: nn.Module, return_qk: bool, watch: Stopwatch) -> None:
        super().__init__(model, return_qk)
        self._watch = watch

    def __call__(self, images: Tensor) -> tuple[Tensor, list[BlockOutputs]]:
        with self._watch('teacher'):
            return super().__call__(images)


def build_step(name: str, mode: str, net: nn.Module, settings: Settings, batch: tuple[Tensor, Tensor],
               watch: Stopwatch) -> Callable[[], None]:
    """The function to measure, whose parts `watch` times."""
    images, labels = batch
    autocast = engine.autocast(torch.device(settings.device), settings.amp)
    net.train(mode == 'training step')
    if mode == 'evaluation':
        def evaluate() -> None:
            with watch('evaluation'), torch.no_grad(), autocast:
                net(images)
        return evaluate

    quantized = name == 'quantized'
    torch.manual_seed(1)
    network = timm.create_model(VARIANTS[settings.model], img_size=settings.input_size).to(settings.device)
    distillation = Distillation('hard', dgd_weight=float(quantized))
    criterion = DistillationLoss(nn.CrossEntropyLoss(), TimedTeacher(network, quantized, watch), distillation,
                                 net.num_prefix_tokens)
    optimizer = build_optimizer(OptimizerConfig(opt='fusedlamb', lr=1e-6, weight_decay=0.), net)

    def train() -> None:
        with autocast:
            with watch('student forward'):
                outputs, blocks = net(images, return_blocks=True) if quantized else (net(images), None)
            before = watch.parts.get('teacher', 0.)
            with watch('losses'):
                loss = criterion(images, outputs, labels, blocks)['loss']
            watch.parts['losses'] -= watch.parts['teacher'] - before  # which the criterion runs
        del outputs, blocks
        with watch('backward'):
            loss.backward()
        with watch('optimizer'):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            clamp_steps_(net)

    return train


def times(mode: str, nets: dict[str, nn.Module], settings: Settings, batch: tuple) -> dict[str, list[dict]]:
    """Milliseconds of every part of every step of each network, by pairs; who goes first alternates too."""
    watch = Stopwatch(settings.device)
    steps = {name: build_step(name, mode, net, settings, batch, watch) for name, net in nets.items()}
    taken = {name: [] for name in nets}
    for turn in range(WARM_UP + settings.repeats):
        for name in NETWORKS if turn % 2 else NETWORKS[::-1]:
            watch.start()
            steps[name]()
            taken[name].append(watch.parts)
    return {name: parts[WARM_UP:] for name, parts in taken.items()}


def dgd_times(settings: Settings) -> dict[str, float]:
    """Median milliseconds of DGD, forward and backward, of random queries and keys: by d x d and by N x N products."""
    width, heads = SIZES[settings.model.split('_')[2]]
    shape = settings.batch_size, heads, (settings.input_size // 16) ** 2 + 2, width // heads  # (B, H, N, d)
    make = torch.Generator(settings.device).manual_seed(0)
    student, teacher = ([tuple(torch.randn(shape, generator=make, device=settings.device, requires_grad=learns)
                               for _ in range(2)) for _ in range(12)] for learns in (True, False))
    leaves, watch, taken = [x for pair in student for x in pair], Stopwatch(settings.device), []
    forms = {'d x d': distribution_guided_distillation, 'N x N': plain_dgd}
    for _ in range(1 + settings.repeats):
        watch.start()
        for name, form in forms.items():
            with watch(name):
                torch.autograd.grad(sum(form(student, teacher, 2, 2)), leaves)
        taken.append(watch.parts)
    return {name: statistics.median(parts[name] for parts in taken[1:]) for name in forms}


def plain_dgd(student: list, teacher: list, *_: int) -> tuple[Tensor, Tensor]:
    """DGD as the paper writes it, with Gram matrices of N x N."""
    def distance(a: Tensor, b: Tensor) -> Tensor:
        gram_a, gram_b = (F.normalize((x @ x.mT).flatten(-2), dim=-1) for x in (a, b))
        return torch.linalg.vector_norm(gram_a - gram_b, dim=-1).sum(1).mean()  # (B, H) -> (B,) -> ()
    return tuple(sum(distance(a[i], b[i]) for a, b in zip(student, teacher, strict=True)) for i in (0, 1))


def peak_memory(name: str, mode: str, argv: list[str]) -> float | None:
    """Peak memory in MB, measured in a fresh process; None where this system doesn't tell."""
    command = [sys.executable, __file__, *argv, '--memory-of', name, mode]
    child = subprocess.run(command, env=os.environ | RETURN_FREED_MEMORY, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(child.stdout.splitlines()[-1])


def measure_memory(name: str, mode: str, settings: Settings) -> float | None:
    """What `peak_memory` runs in its process."""
    device, on_gpu = settings.device, settings.device != 'cpu'
    if not (on_gpu or sys.platform == 'linux'):
        return None
    batch = build_batch(settings)
    before = torch.cuda.memory_allocated(device) if on_gpu else bytes_in_tensors()
    net = build_network(name, settings, batch[0])
    step = build_step(name, mode, net, settings, batch, Stopwatch(device))
    for turn in range(2 * WARM_UP):
        if turn == WARM_UP and on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        elif turn == WARM_UP:
            held, at_rest = bytes_in_tensors() - before, reset_peak_resident()
        step()
    if on_gpu:
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    return None if at_rest is None else (held + resident('VmHWM') - at_rest) / 1e6


def summarize(taken: dict[str, list[float]], memory: dict[str, float | None], batch_size: int) -> dict:
    """One row: medians, minima and ratios, quantized to full precision."""
    full, quantized = (taken[name] for name in NETWORKS)
    ratios = torch.tensor([q / f for f, q in zip(full, quantized, strict=True)], dtype=torch.float64)
    low, median, high = ratios.quantile(torch.tensor([.25, .5, .75], dtype=torch.float64)).tolist()
    medians = {name: statistics.median(taken[name]) for name in NETWORKS}
    rates = {name: 1e3 * batch_size / ms for name, ms in medians.items()}
    return {'median_ms': medians, 'images_per_second': rates, 'time_ratio': median,
            'time_ratio_quartiles': [low, high], 'time_ratio_of_minima': min(quantized) / min(full),
            'memory_mb': memory, 'memory_ratio': None if None in memory.values() else
            memory['quantized'] / memory['full precision'], 'all_ms': taken}


def all_rows(nets: dict[str, nn.Module], settings: Settings, batch: tuple, memory: dict) -> tuple[dict, dict]:
    """The rows of the table, and the median milliseconds of every part of the training step."""
    rows, parts = {}, {}
    for mode in MODES:
        taken = times(mode, nets, settings, batch)
        rows[mode] = summarize({name: [sum(step.values()) for step in taken[name]] for name in nets}, memory[mode],
                               settings.batch_size)
        if mode == 'training step':
            rows['student'] = summarize({name: [sum(step[part] for part in STUDENT) for step in taken[name]]
                                         for name in nets}, dict.fromkeys(nets), settings.batch_size)
            parts = {part: {name: statistics.median(step[part] for step in taken[name]) for name in NETWORKS}
                     for part in taken['quantized'][0]}
    return rows, parts


def table(results: dict) -> str:
    """Markdown."""
    lines = [f'- {key}: {value}' for key, value in results.items() if key not in ('rows', 'parts_ms', 'dgd_ms')] + [
        '', '| | full precision (ms) | quantized (ms) | ratio (quartiles) | of minima | images/s, full | quantized '
            '| full precision (MB) | quantized (MB) | ratio |', '|---|' + '--:|' * 9]
    for mode, row in results['rows'].items():
        low, high = row['time_ratio_quartiles']
        cells = [mode, *(f'{row["median_ms"][name]:.1f}' for name in NETWORKS),
                 f'{row["time_ratio"]:.2f} ({low:.2f} to {high:.2f})', f'{row["time_ratio_of_minima"]:.2f}',
                 *(f'{row["images_per_second"][name]:.1f}' for name in NETWORKS)]
        cells += [''] * 3 if row['memory_ratio'] is None else [
            *(f'{row["memory_mb"][name]:.0f}' for name in NETWORKS), f'{row["memory_ratio"]:.2f}']
        lines.append(f'| {" | ".join(cells)} |')
    whole = {name: sum(part[name] for part in results['parts_ms'].values()) for name in NETWORKS}
    lines += ['', '| part of the training step | full precision (ms) | share | quantized (ms) | share |',
              '|---|' + '--:|' * 4]
    for part, taken in results['parts_ms'].items():
        cells = [cell for name in NETWORKS for cell in (f'{taken[name]:.1f}', f'{taken[name] / whole[name]:.1%}')]
        lines.append(f'| {part} | {" | ".join(cells)} |')
    for form, taken in results['dgd_ms'].items():
        lines.append(f'| DGD by {form} products, by itself | | | {taken:.1f} | {taken / whole["quantized"]:.1%} |')
    return '\n'.join(lines)


def main(argv: list[str]) -> None:
    settings = parse_args(argv)
    torch.set_num_threads(settings.threads)
    engine.allow_tf32(settings.tf32)
    try:
        implementation_of(settings)  # compiles, before anything is measured
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    if settings.memory_of:
        print(json.dumps(measure_memory(*settings.memory_of, settings)))
        return
    # Memory first: this process would hold some of the GPU's.
    memory = {mode: {name: peak_memory(name, mode, argv) for name in NETWORKS} for mode in MODES}
    if settings.device == 'cpu':
        keep_freed_memory()
    batch = build_batch(settings)
    nets = {name: build_network(name, settings, batch[0]) for name in NETWORKS}
    rows, parts = all_rows(nets, settings, batch, memory)
    results = {'command': shlex.join(['python', 'benchmarks/training_step.py', *argv]),
               'hardware': hardware(settings.device), 'threads': torch.get_num_threads(), 'versions': versions(),
               'runs': f'{settings.repeats} pairs of steps after {WARM_UP} to warm up', 'rows': rows, 'parts_ms': parts,
               'dgd_ms': dgd_times(settings)}
    print(table(results))
    if settings.json:
        settings.json.write_text(json.dumps(results, indent=2) + '\n')


if __name__ == '__main__':
    main(sys.argv[1:])
