"""Speed, memory and file size of the integer network beside full precision, on this machine; `deploy.py bench`.

Every contender runs in a fresh process that stays alive. They take turns: in every round each does an untimed forward,
because the others emptied the caches, and then its timed ones; the order rotates. So the noise of a shared machine hits
all alike. All have the same images and the same number of threads, which is set before their libraries start.

Memory is the resident set of the process: after its libraries are imported, its peak after warm-up, and its peak from
start to end, which includes loading and, for torch.compile, compilation. Only Linux tells all of them; elsewhere they
are getrusage's. (On Linux, getrusage's would begin at that of the process that started this one.) 1 MB is 10^6 bytes.
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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from benchmarks.contenders import CONTENDERS, ON_CPU_ONLY, Spec, one_line, random_images
from calibration.first_batch import calibrate
from checkpoints.networks import ModelInfo, OpenedNetwork
from checkpoints.packed import write_packed
from console.mistakes import shown
from console.parser import file_path, path_text
from deployment.integer import IntegerViT
from deployment.predictor import TERMS
from quant_vision_transformer import BITS, FAMILIES, SIZES, QuantConfig, QVisionTransformer
from utils import UserError

__all__ = ['HELP', 'SUMMARY', 'Conditions', 'add_arguments', 'check_folders', 'measure_network', 'random_network',
           'write']

ROOT = Path(__file__).resolve().parents[1]
MOST = 10 ** 6     # images of a batch, and timed forwards
TURN = 5           # timed forwards in a row
PAUSE = 0.05       # seconds between turns, in which idle threads of the last one go to sleep
SUMMARY = 'measure speed and memory beside full precision'
HELP = '''\
Images/s, latency, memory and file size of the integer network, of the full-precision DeiT of its size in PyTorch
(float32, bf16, compiled), in ONNX Runtime (float32, int8) and in OpenVINO (float32, bf16, int8 by NNCF), in one run,
taking turns. What is not installed is said in its row. Without FILE, a network with random weights: speed and file
sizes do not depend on them.

  python deploy.py bench out/best_checkpoint.qvit.safetensors
  python deploy.py bench --model twobits_deit_small_patch16_224 --batch-sizes 1 --threads 1 --markdown table.md'''


DEFAULT_MODEL = 'fourbits_deit_small_patch16_224'


def add_arguments(add: Callable[..., argparse.Action]) -> None:
    add('file', nargs='?', metavar='FILE', type=path_text, help='packed file, or a checkpoint')
    add('--model', metavar='NAME', help='the network, where FILE does not say it; without FILE one of '
        f'{{twobits,threebits,fourbits}}_deit_{{tiny,small,base}}_patch16_224 (default: {DEFAULT_MODEL})')
    add('--arithmetic', default='int8', choices=TERMS, help='of the integers (default: %(default)s)')
    add('--batch-sizes', nargs='+', type=int, default=[1, 8, 32], metavar='N', help='(default: 1 8 32)')
    add('--threads', type=int, default=torch.get_num_threads(), metavar='N', help='of every contender '
                                                                                  '(here: %(default)s)')
    add('--device', default='cpu', choices=('cpu', 'cuda'), help='cuda: those that run there (default: %(default)s)')
    add('--runs', type=int, default=20, metavar='R', help='timed forwards of each contender and batch size '
                                                          '(default: %(default)s)')
    add('--contenders', nargs='+', choices=CONTENDERS, default=list(CONTENDERS), metavar='NAME',
        help=f'only these, of {", ".join(CONTENDERS)}')
    add('--markdown', type=file_path, metavar='FILE', help='also write the table there')
    add('--json', type=file_path, metavar='FILE', help='also write all results there, with the time of every forward')


@dataclass(frozen=True)
class Conditions:
    """What is measured, and how; the fields are named as the flags.

    Raises:
        UserError: a number is below 1, there is no such device, or no contender runs on it.
    """
    arithmetic: str = 'int8'
    batch_sizes: Sequence[int] = (1, 8, 32)
    threads: int = 1
    device: str = 'cpu'
    runs: int = 20
    contenders: Sequence[str] = tuple(CONTENDERS)

    def __post_init__(self) -> None:
        if min(self.threads, self.runs, *self.batch_sizes) < 1:
            raise UserError('--batch-sizes, --threads and --runs: choose values of at least 1')
        most = max(64, 4 * (os.cpu_count() or 1))  # far more than help; the system refuses to start thousands
        if self.threads > most:
            raise UserError(f'--threads {shown(self.threads)}: choose a value of at most {most}')
        if max(self.runs, *self.batch_sizes) > MOST:
            raise UserError(f'--batch-sizes and --runs: choose values of at most {MOST}')
        if self.device == 'cuda' and not torch.cuda.is_available():
            raise UserError('--device cuda: PyTorch finds no GPU here')
        if not self.wanted:
            raise UserError(f'--device cuda: {", ".join(self.contenders)} run on the CPU only')

    @property
    def wanted(self) -> list[str]:
        """The contenders that run on the device."""
        return [name for name in self.contenders if self.device == 'cpu' or name not in ON_CPU_ONLY]


# --- the network ------------------------------------------------------------------------------------------------------


def uneven_rule(x: Tensor, qn: int, qp: int) -> tuple[Tensor, Tensor]:
    """The published first-batch rule for each channel by itself: no two scales are alike, as after training."""
    scale = 2 * x.abs().mean(1) / qp ** 0.5
    return scale, 0.1 * (x.amin(1) - scale * qn)


def random_network(name: str) -> OpenedNetwork:
    """A variant with random weights, calibrated on noise."""
    if name not in {f'{bits}_{family}_{size}_patch16_224' for bits in BITS for family in FAMILIES for size in SIZES}:
        raise UserError(f'--model {name} is unknown: choose as fourbits_deit_small_patch16_224')
    torch.manual_seed(0)
    model = timm.create_model(name)
    calibrate(model, torch.randn(2, 3, 224, 224), uneven_rule)
    return OpenedNetwork(ModelInfo(name), model.eval(), {})


# --- the processes that take turns ------------------------------------------------------------------------------------


class _Failed(Exception):
    """A contender cannot take part; the message says why."""


class _Worker:
    """A contender's process."""

    def __init__(self, spec: Spec, errors: Path) -> None:
        threads = {f'{library}_NUM_THREADS': str(spec.threads) for library in ('OMP', 'MKL', 'OPENBLAS')}
        # It finds the modules that this process finds, and this repository's first: it starts in the repository, so
        # that a folder of the same name beside the user's files does not come before.
        paths = {'PYTHONPATH': os.pathsep.join(map(os.path.abspath, [ROOT, *filter(None, sys.path)]))}
        self._errors = errors
        with errors.open('w') as stderr:
            self._process = subprocess.Popen(
                [sys.executable, '-m', 'benchmarks.contenders', json.dumps(spec._asdict())], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=stderr, text=True, env=os.environ | threads | paths, cwd=ROOT)
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
        """Lets it do one untimed forward of `count` images and `runs` timed ones."""
        try:
            print(json.dumps([count, runs]), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it has ended, as reading shows
        return self._read()

    def end(self) -> None:
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def prepare(model: QVisionTransformer, info: ModelInfo, full: nn.Module, terms: int, folder: Path,
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

    def quantize_by_nncf(path: Path) -> None:
        import nncf
        import openvino

        if isinstance(files['onnx_float32'], _Failed):
            raise files['onnx_float32']
        images = np.random.default_rng(1).standard_normal((16, 1, 3, *model.patch_embed.img_size), np.float32)
        nncf.set_log_level(logging.ERROR)
        openvino.save_model(nncf.quantize(openvino.Core().read_model(folder / 'float32.onnx'),
                                          nncf.Dataset(list(images)), model_type=nncf.ModelType.TRANSFORMER,
                                          subset_size=len(images)), path)

    files: dict[str, Path | _Failed] = {}
    for key, name, write_file in (
            ('packed', 'network.qvit.safetensors', lambda path: write_packed(model, info, path)),
            ('float32', 'float32.safetensors', lambda path: safetensors.torch.save_file(full.state_dict(), path)),
            ('onnx_float32', 'float32.onnx', partial(export, full)),
            ('onnx_int8', 'int8.onnx', lambda path: export(IntegerViT(model, terms), path)),
            ('onnx_dynamic', 'dynamic.onnx', quantize),
            ('openvino_int8', 'nncf.xml', quantize_by_nncf)):
        try:
            write_file(folder / name)
            files[key] = folder / name
        except _Failed as error:
            files[key] = error
        except Exception as error:  # missing package or unsupported network: the rows that need the file say so
            files[key] = _Failed(one_line(error))
    return files


def measure(spec: Spec, files: dict[str, Path | _Failed], wanted: Sequence[str], runs: int, folder: Path,
            ) -> list[dict[str, Any]]:
    """Starts the wanted contenders and times them: a row of results for each."""
    rows, workers = [], {}
    for name in wanted:
        row = {'contender': name, 'label': CONTENDERS[name].label, 'ms': {count: [] for count in spec.batch_sizes}}
        rows.append(row)
        file = files[CONTENDERS[name].file]
        print(f'starting: {row["label"]}', flush=True)
        try:
            if isinstance(file, _Failed):
                raise file
            workers[name] = _Worker(spec._replace(contender=name, file=str(file)), folder / f'{name}.txt')
            row |= workers[name].state
            # A network of bfloat16 weights has a file of half the size.
            row['file_bytes'] = _size(file) // (2 if row['note'].startswith('.bfloat16()') else 1)
        except _Failed as error:
            row['error'] = str(error)
    for count in spec.batch_sizes:
        _take_turns(rows, workers, count, runs)
        print(f'done: batches of {count}', flush=True)
    for worker in workers.values():
        worker.end()
    return rows


def _size(file: Path) -> int:
    """Its bytes, with those of the weights that OpenVINO writes beside it."""
    weights = file.with_suffix('.bin')
    return file.stat().st_size + (weights.stat().st_size if weights.is_file() else 0)


def _take_turns(rows: list[dict[str, Any]], workers: dict[str, _Worker], count: int, runs: int) -> None:
    """Times `runs` forwards of `count` images of every contender that runs, and writes them into its row."""
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


def add_differences(rows: list[dict[str, Any]], full: nn.Module, images: np.ndarray) -> None:
    """Writes into each full-precision row how far its logits are from those in float32, relative to the largest.

    A fast network that computes something else would show. (A low-bit network has no such measure: a rounding
    difference flips a code, and the flips spread. Its tests compare in float64.)
    """
    with torch.inference_mode():
        reference = full(torch.from_numpy(images))
    for row in rows:
        logits = row.pop('logits', None)
        if logits is not None and CONTENDERS[row['contender']].file not in ('packed', 'onnx_int8'):
            row['difference'] = ((torch.tensor(logits) - reference).abs().max() / reference.abs().max()).item()


def measure_network(info: ModelInfo, model: QVisionTransformer, source: str, conditions: Conditions) -> dict[str, Any]:
    """Measures the contenders, and returns what was measured on what, with the `rows` of results.

    Args:
        source: where the network's weights come from, for the report.
    """
    torch.set_num_threads(conditions.threads)
    _, family, size, *_ = info.model.split('_')
    own = {field.name for field in fields(QuantConfig)}
    spec = Spec(conditions.threads, conditions.device, conditions.batch_sizes, info.input_size, info.num_classes,
                TERMS[conditions.arithmetic], FAMILIES[family][1].format(size),
                {key: value for key, value in info.kwargs.items() if key not in own})
    full = timm.create_model(spec.full_model, img_size=spec.input_size, num_classes=spec.num_classes,
                             **spec.full_kwargs).eval()
    with tempfile.TemporaryDirectory() as folder:
        files = prepare(model, info, full, spec.terms, Path(folder))
        rows = measure(spec, files, conditions.wanted, conditions.runs, Path(folder))
    add_differences(rows, full, random_images(1, spec))
    return {'network': f'{info.model}, {source}, {conditions.arithmetic}',
            'full precision': f'{spec.full_model}, random weights', 'hardware': hardware(conditions.device),
            'threads': conditions.threads, 'versions': versions(),
            'runs': f'{conditions.runs} forwards of each batch size in turns of {TURN}', 'rows': rows}


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
    for package in ('torch', 'timm', 'onnx', 'onnxruntime', 'openvino', 'nncf'):
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


def check_folders(*paths: Path | None) -> None:
    """Refuses files to write whose folders do not exist, before anything is measured."""
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f'{path} cannot be written: there is no folder {path.parent}')


def write(found: dict[str, Any], batch_sizes: Sequence[int], markdown: Path | None = None,
          json_file: Path | None = None) -> None:
    """Prints what `measure_network` found, and writes it to the files that are given."""
    text = '\n'.join([*(f'- {key}: {value}' for key, value in found.items() if key != 'rows'), '',
                      table(found['rows'], batch_sizes)])
    print(f'\n{text}')
    if markdown:
        markdown.write_text(f'{text}\n')
    if json_file:
        json_file.write_text(json.dumps(found, indent=2) + '\n')
