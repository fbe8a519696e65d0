"""Everything that only a GPU can tell, in one command of about ten minutes; a report in Markdown and JSON.

    python benchmarks/gpu.py --output gpu_report                     no network, no data: synthetic images, the digits
    python benchmarks/gpu.py --output gpu_report --cifar-path DIR    trains on CIFAR-10, which lies there, too
    python benchmarks/gpu.py --output out --dry-run                  the same on a CPU at the smallest sizes

Every part is a process of its own, or several: one that fails, or takes too long, does not lose the others, and says so
in the report. What this machine lacks (a second GPU, apex, a C++ compiler) is listed as not measured, never estimated.
Figures of a dry run say nothing about speed.
"""

import argparse
import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _measure import hardware, nested_list, step_rows, versions
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ops  # noqa: E402
from _quan_base import QParams, code_range  # noqa: E402
from checkpoints.files import read_checkpoint  # noqa: E402
from utils import UserError, report, write_whole  # noqa: E402

# Relative error, by norms, of float32 against float64. Few values lie so near a border that their code differs.
MOST_ERROR = 1e-2


class NotMeasured(Exception):
    """This machine lacks what a part needs; the message says what."""


@dataclass(frozen=True)
class Settings:
    """The flags, named as these."""
    output: Path
    device: str = 'cuda'
    minutes: float = 10.
    batch_size: int = 128
    cifar_path: Path | None = None
    dry_run: bool = False
    parts: Sequence[str] = ()
    part: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.minutes < math.inf or self.batch_size < 1:
            raise UserError('--minutes and --batch-size: choose values above 0')
        if self.device == 'cuda' and not torch.cuda.is_available():
            raise UserError('PyTorch finds no GPU here: pass --dry-run to try this command on the CPU')


# --- the parts that are other commands --------------------------------------------------------------------------------


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def step_commands(settings: Settings, folder: Path) -> dict[str, list[str]]:
    """benchmarks/training_step.py by precision and compilation."""
    size = ('--batch-size', 2, '--input-size', 32, '--repeats', 1) if settings.dry_run else (
        '--batch-size', settings.batch_size, '--repeats', 10)
    forms = {'fp32': (), 'fp32, TF32': ('--tf32',), 'bf16': ('--amp', 'bf16'), 'fp16': ('--amp', 'fp16'),
             'bf16, compiled': ('--amp', 'bf16', '--compile'), 'bf16, Triton': ('--amp', 'bf16', '--kernels', 'triton')}
    if settings.dry_run:
        forms = {'fp32': ()}
    return {name: python(ROOT / 'benchmarks' / 'training_step.py', '--device', settings.device, *size, *form, '--json',
                         folder / f'{number}.json') for number, (name, form) in enumerate(forms.items())}


def training_flags(settings: Settings, *flags: object) -> list[object]:
    """A short run of main.py: a small network on the digits, or on CIFAR-10."""
    data = ('--data-set', 'CIFAR10', '--data-path', settings.cifar_path, '--input-size', 32) if settings.cifar_path \
        else ('--data-set', 'DIGITS', '--input-size', 16)
    return [ROOT / 'main.py', '--device', settings.device, '--model-kwargs', 'embed_dim=48', 'depth=2', 'num_heads=2',
            'patch_size=8', *data, '--batch-size', 256, '--num_workers', 0, '--opt', 'fusedlamb', '--lr', '1e-2',
            '--warmup-epochs', 0, '--weight-decay', 0, '--no-repeated-aug', *flags]


def ran(command: Sequence[object]) -> str:
    """What the command printed.

    Raises:
        RuntimeError: it failed; the message has its last line.
    """
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or 'no message').splitlines()[-1]
        raise RuntimeError(f'{shlex.join(str(word) for word in command[1:3])} ended with status {done.returncode}: '
                           f'{last}')
    return done.stdout


def last_epoch(folder: Path) -> dict[str, float]:
    line = json.loads((folder / 'log.txt').read_text().splitlines()[-1])
    return {name: line[name] for name in ('train_loss', 'test_acc1')}


# --- the parts --------------------------------------------------------------------------------------------------------


def machine(settings: Settings) -> dict[str, Any]:
    """What the figures are measured on."""
    found = {'hardware': hardware(settings.device), 'versions': versions(), 'cores': os.cpu_count()}
    if settings.device == 'cuda':
        properties = torch.cuda.get_device_properties(0)
        found |= {'GPUs': torch.cuda.device_count(), 'memory of one (GiB)': round(properties.total_memory / 2 ** 30, 1),
                  'compute capability': f'{properties.major}.{properties.minor}', 'CUDA': torch.version.cuda,
                  'cuDNN': torch.backends.cudnn.version(), 'NCCL': '.'.join(map(str, torch.cuda.nccl.version()))}
    return found


def products(settings: Settings) -> dict[str, Any]:
    """Relative errors of values and gradients of every implementation on the device, against float64 there."""
    found, worst = {}, []
    for name in ops.names():
        try:
            ops.get(name)
        except ops.NativeUnavailable as error:
            found[name] = f'not measured: {error}'
            continue
        if name == 'triton' and settings.device == 'cpu':
            found[name] = 'not measured: on a CPU it is the plain torch'
            continue
        found[name] = errors = {}
        for product in ('fake_quantize', 'linear', 'linear of a GELU', 'attention', 'gram_distance'):
            exact, ours = (product_and_gradients(product, implementation, settings, dtype)
                           for implementation, dtype in (('reference', torch.float64), (name, torch.float32)))
            of_each = {key: ((ours[key].double() - value).norm() / value.norm()).item() for key, value in exact.items()}
            errors[product] = {key: float(f'{error:.2g}') for key, error in of_each.items()}
            worst += [f'{name}, {product}, {key}: {error:.1e}' for key, error in of_each.items()
                      if not error <= MOST_ERROR]
    if worst:
        raise RuntimeError('errors are too large: ' + '; '.join(worst))
    return found


def product_and_gradients(product: str, implementation: str, settings: Settings, dtype: torch.dtype,
                          ) -> dict[str, Tensor]:
    """The product's value and its gradients, of random operands that are the same for every implementation."""
    make, tensors = torch.Generator().manual_seed(0), {}

    def operand(name: str, values: Tensor) -> Tensor:
        tensors[name] = values.to(settings.device, dtype).requires_grad_()
        return tensors[name]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make)

    def quantizer(name: str, *shape: int, signed: bool = True) -> QParams:
        scale = (0.2 + 0.1 * torch.rand(shape, generator=make)) / (1 if signed else 30)
        zero_point = None if name == 'weight' else operand(f'{name} zero point', random(*shape))
        return QParams(operand(f'{name} scale', scale), zero_point, *code_range(4, signed))

    own, (batch, tokens, width) = ops.get(implementation), (2, 5, 8) if settings.dry_run else (16, 197, 64)
    if product == 'attention':
        q, k, v = (operand(name, random(batch, 2, tokens, width)) for name in 'qkv')
        quantizers = *(quantizer(name, 2, 1, 1) for name in 'qkv'), quantizer('A', 2, 1, 1, signed=False)
        out = own.attention(q, k, v, quantizers, width ** -0.5)
    elif product == 'gram_distance':
        a, b = (random(1, batch, 2, tokens, width) for _ in range(2))
        out = own.gram_distance(operand('a', a), b.to(settings.device, dtype))
    elif product == 'fake_quantize':
        out = own.fake_quantize(operand('x', random(batch, tokens, width)), quantizer('x', width))
    else:
        x, weight = operand('x', random(batch, tokens, width)), operand('weight', random(2 * width, width))
        out = own.linear(x, weight, operand('bias', random(2 * width)), quantizer('x', width),
                         quantizer('weight', 2 * width, 1), gelu='GELU' in product)
    grads = torch.autograd.grad(out, list(tensors.values()), random(*out.shape).to(settings.device, dtype))
    return {'value': out.detach(), **dict(zip(tensors, grads, strict=True))}


def precisions(settings: Settings) -> dict[str, Any]:
    """Loss and accuracy of a short run in every precision, and compiled."""
    forms = {'fp32': (), 'bf16': ('--amp', 'bf16'), 'fp16': ('--amp', 'fp16'),
             'bf16, compiled': ('--amp', 'bf16', '--compile')}
    if settings.dry_run:
        forms = {'bf16': forms['bf16']}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, form in forms.items():
            out = Path(folder) / name.replace(', ', '-')
            ran(python(*training_flags(settings, '--epochs', 1 if settings.dry_run else 3, *form, '--output_dir', out)))
            found[name] = last_epoch(out)
    return found


def resumption(settings: Settings) -> dict[str, Any]:
    """Whether a run that goes on after its first epoch ends with the same bits as one that was not interrupted."""
    flags = training_flags(settings, '--sched', 'step', '--decay-epochs', 100)
    with tempfile.TemporaryDirectory() as folder:
        whole, halves = Path(folder) / 'whole', Path(folder) / 'halves'
        ran(python(*flags, '--epochs', 2, '--output_dir', whole))
        ran(python(*flags, '--epochs', 1, '--output_dir', halves))
        ran(python(*flags, '--epochs', 2, '--output_dir', halves, '--resume', 'auto'))
        states = [read_checkpoint(out / 'checkpoint.pth')['model'] for out in (whole, halves)]
    differing = [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]
    if differing:
        raise RuntimeError(f'{len(differing)} of {len(states[0])} tensors differ, the first is {differing[0]}')
    return {'tensors that are the same to the last bit': len(states[0])}


def processes(settings: Settings) -> dict[str, Any]:
    """A run of one process and of two, connected by NCCL (on a CPU by gloo)."""
    available = torch.cuda.device_count() if settings.device == 'cuda' else 1
    found = {}
    for count in (1, 2):
        if count > available:
            found[f'{count} processes'] = f'not measured: {available} of {count} devices are here'
            continue
        with tempfile.TemporaryDirectory() as folder:
            ran(python('-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={count}',
                       *training_flags(settings, '--epochs', 1, '--output_dir', folder)))
            found[f'{count} processes'] = last_epoch(Path(folder))
    return found


def training_step(settings: Settings) -> dict[str, Any]:
    """Time, images/s and peak memory of a step by its parts, against full precision with the same teacher."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, command in step_commands(settings, Path(folder)).items():
            try:
                ran(command)
                found[name] = json.loads(Path(command[-1]).read_text())
            except RuntimeError as error:
                found[name] = f'failed: {error}'
    return found


def data_loading(settings: Settings) -> dict[str, Any]:
    """Images/s of the data alone on this machine."""
    cores = os.cpu_count() or 1
    size = ('--workers', 0, '--batches', 1, '--repeats', 1, '--batch-size', 2, '--input-size', 32) \
        if settings.dry_run else ('--workers', *sorted({1, max(1, cores // 2), cores}), '--batches', 12)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'loading.json'
        ran(python(ROOT / 'benchmarks' / 'data_loading.py', *size, '--json', file))
        return json.loads(file.read_text())


def inference(settings: Settings) -> dict[str, Any]:
    """Integer inference beside full precision: `deploy.py bench`."""
    small = '--batch-sizes', 1, '--runs', 1, '--contenders', 'torch-int', '--model', 'fourbits_deit_tiny_patch16_224'
    size = small if settings.dry_run else ('--batch-sizes', 1, settings.batch_size, '--runs', 20)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'inference.json'
        ran(python(ROOT / 'deploy.py', 'bench', '--device', settings.device, *size, '--json', file))
        return json.loads(file.read_text())


def apex(settings: Settings) -> dict[str, Any]:
    """A run with apex's FusedLAMB, which --opt fusedlamb is where apex can be used."""
    missing = [name for name in ('apex', 'amp_C') if importlib.util.find_spec(name) is None]
    if missing or settings.device != 'cuda':
        raise NotMeasured('apex with its CUDA extension is not installed' if missing else 'apex runs on GPUs only')
    with tempfile.TemporaryDirectory() as folder:
        said = ran(python(*training_flags(settings, '--epochs', 1, '--output_dir', folder)))
        if "timm's Lamb" in said:
            raise RuntimeError("apex is installed, but timm's Lamb was used")
        return last_epoch(Path(folder))


PARTS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    'machine': machine, 'products': products, 'precisions': precisions, 'resumption': resumption,
    'processes': processes, 'apex': apex, 'training-step': training_step, 'inference': inference,
    'data-loading': data_loading}


# --- the whole --------------------------------------------------------------------------------------------------------


def run_part(name: str, argv: Sequence[str], seconds: float) -> dict[str, Any]:
    """Runs a part in its own process: its 'result', or why there is none as 'not measured' or 'failed'."""
    with tempfile.TemporaryDirectory() as folder:
        errors, answer = Path(folder) / 'errors.txt', Path(folder) / 'answer.json'
        with errors.open('w') as file:
            # A session of its own, so that what the part started ends with it.
            child = subprocess.Popen(python(__file__, *argv, '--part', name, '--output', answer), stdout=file,
                                     stderr=file, start_new_session=True)
            try:
                status = child.wait(max(1., seconds))
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, 9)
                child.wait()
                return {'failed': f'took more than {seconds:.0f} s, what was left of --minutes'}
        if answer.exists():
            return json.loads(answer.read_text())
        last = (errors.read_text(errors='replace').strip() or 'no message').splitlines()[-1]
        return {'failed': f'its process ended with status {status}: {last}'}


def answer_of(name: str, settings: Settings) -> dict[str, Any]:
    """What `run_part` runs in its process."""
    try:
        return {'result': PARTS[name](settings)}
    except NotMeasured as error:
        return {'not measured': str(error)}
    except Exception as error:  # whatever the device, the compiler or a library raises: the report says it
        return {'failed': ' '.join(f'{type(error).__name__}: {error}'.split())}


def markdown(results: dict[str, Any]) -> str:
    lines = ['# What a GPU was measured to do', '', f'    {results["command"]}', '']
    if results['dry_run']:
        lines += ['A dry run on a CPU at the smallest sizes: no figure below says anything about speed.', '']
    lines += ['| part | |', '|---|---|', *(f'| {name} | {_state(part)} |' for name, part in results['parts'].items())]
    for name, part in results['parts'].items():
        if 'result' not in part:
            continue
        lines += ['', f'## {name}', '']
        lines += step_rows(part['result']) if name == 'training-step' else nested_list(part['result'])
    return '\n'.join(lines) + '\n'


def _state(part: dict[str, Any]) -> str:
    if 'result' in part:
        return f'measured in {part["seconds"]:.0f} s'
    return next(f'{state}: {part[state]}' for state in ('not measured', 'failed') if state in part)


def parse_args(argv: Sequence[str]) -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add('--output', type=Path, required=True, metavar='NAME', help='writes NAME.md and NAME.json')
    add('--minutes', type=float, default=10., metavar='M', help='that all parts may take together (default: 10)')
    add('--batch-size', type=int, default=128, metavar='N', help='of the training step and of inference (default: 128)')
    add('--cifar-path', type=Path, metavar='DIR', help='with CIFAR-10, to train on instead of the digits')
    add('--dry-run', action='store_true', help='on the CPU, at the smallest sizes')
    add('--parts', nargs='+', choices=PARTS, default=list(PARTS), metavar='NAME',
        help=f'only these, of {", ".join(PARTS)}')
    add('--part', choices=PARTS, help=argparse.SUPPRESS)  # the processes of run_part
    flags = vars(parser.parse_args(argv))
    return Settings(**flags, device='cpu' if flags['dry_run'] else 'cuda')


def main(argv: Sequence[str]) -> int:
    try:
        settings = parse_args(argv)
    except UserError as error:
        report(error)
        return 2
    if settings.part:
        answer = json.dumps(answer_of(settings.part, settings))
        write_whole(settings.output, lambda path: path.write_text(answer))
        return 0
    started, parts = time.monotonic(), {}
    for name in settings.parts:
        begin = time.monotonic()
        parts[name] = run_part(name, argv, 60 * settings.minutes - (begin - started))
        parts[name]['seconds'] = time.monotonic() - begin
        print(f'{name}: {_state(parts[name])}', flush=True)
        results = {'command': shlex.join(['python', 'benchmarks/gpu.py', *argv]), 'dry_run': settings.dry_run,
                   'parts': parts}
        for suffix, text in (('.json', json.dumps(results, indent=2) + '\n'), ('.md', markdown(results))):
            target = settings.output.with_name(settings.output.name + suffix)
            write_whole(target, lambda path, text=text: path.write_text(text))
    return int(any('failed' in part for part in parts.values()))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
