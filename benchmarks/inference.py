"""Speed, memory and file size of the integer network beside full precision, on this machine; `deploy.py bench`.

Every contender runs in a fresh process that stays alive. They take turns: in every round each does an untimed forward,
because the others emptied the caches, and then its timed ones; the order rotates. So the noise of a shared machine hits
all alike. All have the same number of threads, set before their libraries start, and the same images.

Memory is the resident set of the process: after its libraries are imported; its peak after warm-up; its peak from start
to end, with loading and, for torch.compile, compilation in it. Only Linux tells all; elsewhere they are getrusage's.
(On Linux, getrusage's would begin at that of the process that started this one.) 1 MB is 10^6 bytes.
"""
from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from _quan_base import calibrate
from benchmarks import contenders as deploy_contenders
from benchmarks.contenders import CONTENDERS, ON_CPU_ONLY, Spec, one_line, random_images
from checkpoints.networks import model_info
from checkpoints.packed import write_packed
from deployment.integer import IntegerViT
from quant_vision_transformer import BITS, SIZES, QuantConfig, QVisionTransformer
from utils import UserError

__all__ = ['HELP', 'SUMMARY', 'add_arguments', 'run']

TURN = 5           # timed forwards in a row
PAUSE = 0.05       # seconds between turns, in which idle threads of the last one go to sleep
SUMMARY = 'measure speed and memory beside full precision'
HELP = '''\
Images/s, latency, memory and file size of the integer network, of the full-precision DeiT of its size in PyTorch
(float32, bf16, compiled) and in ONNX Runtime (float32, int8), in one run, taking turns. What is not installed is said
in its row. Without FILE, a network with random weights: speed and file sizes do not depend on them.

  python deploy.py bench out/best_checkpoint.qvit.safetensors
  python deploy.py bench --model twobits_deit_small_patch16_224 --batch-sizes 1 --threads 1 --markdown table.md'''


# --- the process that lets them take turns ----------------------------------------------------------------------------


class _Failed(Exception):
    """A contender cannot take part; the message says why."""


class _Worker:
    """A contender's process."""

    def __init__(self, spec: Spec, errors: Path) -> None:
        threads = {f'{library}_NUM_THREADS': str(spec['threads']) for library in ('OMP', 'MKL', 'OPENBLAS')}
        self._errors = errors
        with errors.open('w') as stderr:
            self._process = subprocess.Popen(
                [sys.executable, deploy_contenders.__file__, json.dumps(spec)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=stderr, text=True, env=os.environ | threads)
        try:
            self.state = self._read()
        except _Failed:
            self.end()
            raise

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            last = (self._errors.read_text().strip().splitlines() or ['no message'])[-1]
            raise _Failed(f'its process ended with status {self._process.wait()}: {last}')
        message = json.loads(line)
        if 'error' in message:
            raise _Failed(message['error'])
        return message

    def run(self, count: int, runs: int) -> dict[str, Any]:
        try:
            print(json.dumps([count, runs]), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it has ended, as reading shows
        return self._read()

    def end(self) -> None:
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def prepare(model: QVisionTransformer, about: dict[str, Any], full: nn.Module, terms: int, folder: Path,
            ) -> dict[str, Path | _Failed]:
    """Writes the files that the contenders load: their paths by key, or why there is none."""
    def export(network: nn.Module, path: Path) -> None:
        from deployment.onnx_export import export_onnx

        export_onnx(network, path)

    def quantize(path: Path) -> None:
        if isinstance(files['onnx_float32'], _Failed):
            raise files['onnx_float32']
        from onnxruntime.quantization import QuantType, quantize_dynamic

        logging.disable(logging.WARNING)  # it recommends its own pre-processing, of which this graph needs nothing
        try:
            quantize_dynamic(folder / 'float32.onnx', path, weight_type=QuantType.QInt8)
        finally:
            logging.disable(logging.NOTSET)

    files: dict[str, Path | _Failed] = {}
    for key, name, write in (
            ('packed', 'network.qvit.safetensors', lambda path: write_packed(model, about, path)),
            ('float32', 'float32.safetensors', lambda path: safetensors.torch.save_file(full.state_dict(), path)),
            ('onnx_float32', 'float32.onnx', partial(export, full)),
            ('onnx_int8', 'int8.onnx', lambda path: export(IntegerViT(model, terms), path)),
            ('onnx_dynamic', 'dynamic.onnx', quantize)):
        try:
            write(folder / name)
            files[key] = folder / name
        except _Failed as error:
            files[key] = error
        except Exception as error:  # missing package or unsupported network: the rows that need the file say so
            files[key] = _Failed(one_line(error))
    return files


def measure(spec: Spec, files: dict[str, Path | _Failed], wanted: Sequence[str], runs: int, folder: Path,
            ) -> list[dict[str, Any]]:
    """A row of results for each contender wanted."""
    rows, workers = [], {}
    for name in wanted:
        row = {'contender': name, 'label': CONTENDERS[name].label, 'ms': {count: [] for count in spec['batch_sizes']}}
        rows.append(row)
        file = files[CONTENDERS[name].file]
        print(f'starting: {row["label"]}', flush=True)
        try:
            if isinstance(file, _Failed):
                raise file
            workers[name] = _Worker(spec | {'contender': name, 'file': str(file)}, folder / f'{name}.txt')
            row |= workers[name].state
            # A network of bfloat16 weights has a file of half the size.
            row['file_bytes'] = file.stat().st_size // (2 if row['note'].startswith('.bfloat16()') else 1)
        except _Failed as error:
            row['error'] = str(error)
    for count in spec['batch_sizes']:
        for turn in range(math.ceil(runs / TURN)):
            for row in rows[turn % len(rows):] + rows[:turn % len(rows)]:
                if 'error' in row:
                    continue
                time.sleep(PAUSE)
                try:
                    result = workers[row['contender']].run(count, min(TURN, runs - turn * TURN))
                except _Failed as error:
                    row['error'] = str(error)
                    continue
                row['ms'][count] += [1e3 * seconds for seconds in result.pop('seconds')]
                row |= result
        print(f'done: batches of {count}', flush=True)
    for worker in workers.values():
        worker.end()
    return rows


# --- the report -------------------------------------------------------------------------------------------------------


def hardware(device: str) -> str:
    """The processor, its cores and those of its instructions that decide about 8-bit and bf16 speed; the GPU in use."""
    text = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
    entries = dict(map(str.strip, line.split(':', 1)) for line in text.splitlines() if ':' in line)
    known = entries.get('flags', entries.get('Features', '')).split()
    telling = [flag for flag in ('avx2', 'avx_vnni', 'avx512f', 'avx512_vnni', 'avx512_bf16', 'amx_int8', 'asimddp')
               if flag in known]
    model = entries.get('model name', platform.machine())
    return f'{model}, {os.cpu_count()} cores' + (f' ({", ".join(telling)})' if telling else '') + (
        f', {torch.cuda.get_device_name()}' if device == 'cuda' else '')


def versions() -> str:
    found = [f'Python {platform.python_version()}']
    for package in ('torch', 'timm', 'onnx', 'onnxruntime'):
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f'{package} {importlib.metadata.version(package)}')
    return ', '.join(found)


def table(rows: list[dict[str, Any]], batch_sizes: Sequence[int]) -> str:
    """Markdown: a line for each contender, and what is to be said of it below."""
    heads = [f'batch {count}: {what}' for count in batch_sizes for what in ('images/s', 'ms, median (p99)')]
    lines = [f'| | {" | ".join(heads)} | memory (MB): libraries | running | peak | file (MB) |',
             '|---' + '|--:' * (len(heads) + 4) + '|']
    for row in rows:
        cells = [row['label']]
        for count in batch_sizes:
            ms = row['ms'][count]
            cells += ['-', '-'] if 'error' in row else [
                f'{1e3 * count / np.median(ms):.1f}', f'{np.median(ms):.1f} ({np.percentile(ms, 99):.1f})']
        cells += [f'{row[key] / 1e6:.{digits}f}' if row.get(key) is not None and 'error' not in row else '-'
                  for key, digits in (('library_bytes', 0), ('running_bytes', 0), ('peak_bytes', 0), ('file_bytes', 1))]
        lines.append(f'| {" | ".join(cells)} |')
    notes = []
    for row in rows:
        said = [f'not measured, {row["error"]}'] if 'error' in row else [row['note']] if row['note'] else []
        if 'difference' in row:
            said.append(f'logits within {row["difference"]:.1e} of the largest')
        notes += [f'- {row["label"]}: {"; ".join(said)}'] if said else []
    return '\n'.join([*lines, '', *notes])


# --- the command ------------------------------------------------------------------------------------------------------


def add_arguments(add: Callable[..., argparse.Action]) -> None:
    add('file', nargs='?', metavar='FILE', help='packed file, or a checkpoint')
    add('--model', default='fourbits_deit_small_patch16_224', metavar='NAME',
        help='without FILE: the network, one of {twobits,threebits,fourbits}_deit_{tiny,small,base}_patch16_224 '
             '(default: %(default)s)')
    add('--arithmetic', default='int8', choices=('int8', 'int8x2'), help='of the integers (default: %(default)s)')
    add('--batch-sizes', nargs='+', type=int, default=[1, 8, 32], metavar='N', help='(default: 1 8 32)')
    add('--threads', type=int, default=torch.get_num_threads(), metavar='N', help='of every contender '
                                                                                  '(here: %(default)s)')
    add('--device', default='cpu', choices=('cpu', 'cuda'), help='cuda: those that run there (default: %(default)s)')
    add('--runs', type=int, default=20, metavar='R', help='timed forwards of each contender and batch size '
                                                          '(default: %(default)s)')
    add('--contenders', nargs='+', choices=CONTENDERS, default=list(CONTENDERS), metavar='NAME',
        help=f'only these, of {", ".join(CONTENDERS)}')
    add('--markdown', type=Path, metavar='FILE', help='also write the table there')
    add('--json', type=Path, metavar='FILE', help='also write all results there, with the time of every forward')


def uneven_rule(x: Tensor, qn: int, qp: int) -> tuple[Tensor, Tensor]:
    """The published first-batch rule for each channel by itself, as training makes them: no two steps are alike."""
    step = 2 * x.abs().mean(1) / qp ** 0.5
    return step, 0.1 * (x.amin(1) - step * qn)


def random_network(name: str) -> tuple[dict[str, Any], QVisionTransformer]:
    """A variant with random weights, calibrated on noise, and its description."""
    if name not in {f'{bits}_deit_{size}_patch16_224' for bits in BITS for size in SIZES}:
        raise UserError(f'--model {name} is unknown: choose as fourbits_deit_small_patch16_224')
    torch.manual_seed(0)
    model = timm.create_model(name)
    calibrate(model, torch.randn(2, 3, 224, 224), uneven_rule)
    return model_info(name, {}, 1000, 224), model.eval()


def add_differences(rows: list[dict[str, Any]], full: nn.Module, images: np.ndarray) -> None:
    """Of the logits of each full-precision row the largest difference to those in float32, relative to the largest of
    these: a fast network that computes something else would show. (A low-bit network has no such measure: a rounding
    difference flips a code, and the flips spread. Its tests compare in float64.)"""
    with torch.inference_mode():
        reference = full(torch.from_numpy(images))
    for row in rows:
        logits = row.pop('logits', None)
        if logits is not None and CONTENDERS[row['contender']].file not in ('packed', 'onnx_int8'):
            row['difference'] = ((torch.tensor(logits) - reference).abs().max() / reference.abs().max()).item()


def run(args: Namespace, about: dict[str, Any] | None, model: QVisionTransformer | None) -> None:
    """Measures, and prints and writes the table; of a random network where `model` is None."""
    if min(args.threads, args.runs, *args.batch_sizes) < 1:
        raise UserError('--batch-sizes, --threads and --runs: choose values of at least 1')
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda: PyTorch finds no GPU here')
    for path in (args.markdown, args.json):
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f'{path} cannot be written: there is no folder {path.parent}')
    what = 'random weights' if model is None else args.file
    torch.set_num_threads(args.threads)
    if model is None:
        about, model = random_network(args.model)
    own = {field.name for field in fields(QuantConfig)}
    terms = 2 if args.arithmetic == 'int8x2' else 1
    full_model = f'deit_{about["model"].split("_")[2]}_distilled_patch16_224'
    spec = {'terms': terms, 'threads': args.threads, 'device': args.device, 'batch_sizes': args.batch_sizes,
            'input_size': about['input_size'], 'num_classes': about['num_classes'], 'full_model': full_model,
            'full_kwargs': {key: value for key, value in about['kwargs'].items() if key not in own}}
    full = timm.create_model(full_model, img_size=spec['input_size'], num_classes=spec['num_classes'],
                             **spec['full_kwargs']).eval()
    with tempfile.TemporaryDirectory() as folder:
        files = prepare(model, about, full, terms, Path(folder))
        wanted = [name for name in args.contenders if args.device == 'cpu' or name not in ON_CPU_ONLY]
        rows = measure(spec, files, wanted, args.runs, Path(folder))
    add_differences(rows, full, random_images(1, spec))
    results = {'network': f'{about["model"]}, {what}, {args.arithmetic}',
               'full precision': f'{full_model}, random weights', 'hardware': hardware(args.device),
               'threads': args.threads, 'versions': versions(),
               'runs': f'{args.runs} forwards of each batch size in turns of {TURN}'}
    text = '\n'.join([*(f'- {key}: {value}' for key, value in results.items()), '', table(rows, args.batch_sizes)])
    print(f'\n{text}')
    if args.markdown:
        args.markdown.write_text(f'{text}\n')
    if args.json:
        args.json.write_text(json.dumps(results | {'rows': rows}, indent=2) + '\n')
