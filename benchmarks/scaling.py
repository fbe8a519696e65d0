"""Time of an update by 1 and by 2 processes on a CPU, and the bytes of gradients that they all-reduce.

    python benchmarks/scaling.py                                 4-bit DeiT-Tiny, 8 images a process and batch
    python benchmarks/scaling.py --gpu-bandwidth 20 --gpu-step-ms 150

Each process has one thread and its own copy of the network, as main.py wraps it, over gloo; an update is forward, cross
entropy, backward and optimizer (LAMB) on random images, without teacher or data loading. `batches` are those of an
update (--grad-accum-steps), of which only the last all-reduces; the row without any all-reduce, which no training could
use, shows what the second process costs by itself: memory, and cores if others want them. The two processes start
every update together; the medians of rank 0 are given. CPU is the time that a core worked for the update, far below its
own where others took the cores. Bytes are those of the buckets that are all-reduced.

The second table is an estimate, by a formula and not by measurement: a ring all-reduce of b bytes among n GPUs takes
2 (n - 1) / n * b / bandwidth, without latency. --gpu-bandwidth is of the slowest link, --gpu-step-ms the time of a step
on one GPU; its last column adds the two, although DistributedDataParallel overlaps most of the all-reduce with the
backward: the least that the formula allows.
"""

import argparse
import contextlib
import json
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from _measure import hardware, versions
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ops  # noqa: E402
import quant_vision_transformer  # noqa: E402, F401  registers the variants
from _quan_base import clamp_steps_  # noqa: E402
from calibration.first_batch import calibrate  # noqa: E402
from ops.cpu_memory import keep_freed_memory
from training.networks import wrap  # noqa: E402
from training.optimizer import OptimizerConfig, build_optimizer  # noqa: E402
from utils import UserError  # noqa: E402

WARM_UP = 2  # updates
GPUS = 8, 64
# Processes, batches of an update, whether it all-reduces.
ROWS = (1, 1, False), (2, 1, True), (2, 2, True), (2, 1, False)


@dataclass(frozen=True)
class Settings:
    """The flags."""
    model: str
    batch_size: int
    input_size: int
    repeats: int
    gpu_bandwidth: float | None
    gpu_step_ms: float | None
    native_kernels: bool
    json: Path | None


def parse_args(argv: list[str]) -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add('--model', default='fourbits_deit_tiny_patch16_224', help='default: %(default)s')
    add('--batch-size', default=8, type=int, metavar='N', help='images of a process and batch (default: %(default)s)')
    add('--input-size', default=224, type=int, metavar='PIXELS', help='default: %(default)s')
    add('--repeats', default=5, type=int, metavar='N', help='timed updates of every row (default: %(default)s)')
    add('--gpu-bandwidth', type=float, metavar='GB/S', help='10^9 bytes a second that a GPU sends, for the estimate')
    add('--gpu-step-ms', type=float, metavar='MS', help='time of a step on one GPU, for the estimate')
    add('--native-kernels', action='store_true', help='quantizers in C++, as main.py has them where it can')
    add('--json', type=Path, metavar='FILE', help='also write the results there')
    settings = Settings(**vars(parser.parse_args(argv)))
    given = [value for value in (settings.gpu_bandwidth, settings.gpu_step_ms) if value is not None]
    if min(settings.batch_size, settings.repeats) < 1 or any(value <= 0 for value in given):
        parser.error('the numbers are at least 1, those of the GPU above 0')
    if settings.gpu_step_ms and not settings.gpu_bandwidth:
        parser.error('--gpu-step-ms needs --gpu-bandwidth')
    return settings


class Trained:
    """A process' network with its optimizer, random images, and the bytes that it all-reduced of late."""

    def __init__(self, settings: Settings, implementation: str) -> None:
        self.images = torch.randn(settings.batch_size, 3, settings.input_size, settings.input_size)
        self.labels = torch.randint(1000, (settings.batch_size,))
        self.reduced: list[int] = []
        self.model = timm.create_model(settings.model, img_size=settings.input_size)
        ops.use(self.model, implementation)
        calibrate(self.model, self.images)
        self.network: nn.Module = self.model
        if dist.get_world_size() > 1:
            self.network = wrap(self.model, torch.device('cpu'))
            self.network.register_comm_hook(None, self._count_and_reduce)
        self.optimizer = build_optimizer(OptimizerConfig(opt='lamb', lr=1e-6, weight_decay=0.), self.model)

    def _count_and_reduce(self, group: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.reduced.append(bucket.buffer().nbytes)
        return default_hooks.allreduce_hook(group, bucket)

    def update(self, batches: int, reduces: bool) -> None:
        for batch in range(batches):
            keeps = isinstance(self.network, DistributedDataParallel) and not (reduces and batch == batches - 1)
            with self.network.no_sync() if keeps else contextlib.nullcontext():
                loss = sum(F.cross_entropy(logits, self.labels) for logits in self.network(self.images))
                (loss / batches).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clamp_steps_(self.model)


def timed_rows(trained: Trained, processes: int, settings: Settings) -> list[dict[str, Any]]:
    """The rows of this number of processes, which start every update together."""
    rows = [{'processes': n, 'batches': batches, 'all_reduce': reduces, 'all_ms': [], 'all_cpu_ms': []}
            for n, batches, reduces in ROWS if n == processes]
    for turn in range(WARM_UP + settings.repeats):
        for row in rows:
            trained.reduced.clear()
            dist.barrier()
            begin, cpu_begin = time.perf_counter(), time.process_time()
            trained.update(row['batches'], row['all_reduce'])
            if turn >= WARM_UP:
                row['all_ms'].append((time.perf_counter() - begin) * 1e3)
                row['all_cpu_ms'].append((time.process_time() - cpu_begin) * 1e3)
            row['all_reduced_bytes'] = sum(trained.reduced)
    for row in rows:
        row['median_ms'] = statistics.median(row['all_ms'])
        row['median_cpu_ms'] = statistics.median(row['all_cpu_ms'])
        row['images_per_second'] = 1e3 * processes * row['batches'] * settings.batch_size / row['median_ms']
    return rows


def measure(rank: int, processes: int, folder: str, settings: Settings, implementation: str) -> None:
    """What each process runs; rank 0 leaves the rows of this number of processes in `folder`."""
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group('gloo', init_method=f'file://{folder}/store{processes}', rank=rank, world_size=processes)
    torch.manual_seed(rank)
    rows = timed_rows(Trained(settings, implementation), processes, settings)
    if rank == 0:
        Path(folder, f'{processes}.json').write_text(json.dumps(rows))
    dist.destroy_process_group()


def estimate(bytes_of_gradients: int, bandwidth: float, step_ms: float | None) -> list[dict[str, Any]]:
    """By the formula, for every number of GPUs: milliseconds of the all-reduce and, with `step_ms`, the efficiency.

    Args:
        bandwidth: 10^9 bytes a second.
    """
    rows = []
    for gpus in GPUS:
        ms = 2 * (gpus - 1) / gpus * bytes_of_gradients / (bandwidth * 1e9) * 1e3
        rows.append({'gpus': gpus, 'all_reduce_ms': ms, 'efficiency': step_ms and step_ms / (step_ms + ms)})
    return rows


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [f'- {key}: {value}' for key, value in results.items() if key not in ('rows', 'estimate')] + [
        '', '| processes | batches | all-reduce | update (ms) | smallest to largest | CPU (ms) | images/s '
            '| all-reduced (MB) |',
        '|--:|--:|---|--:|--:|--:|--:|--:|']
    for row in results['rows']:
        lines.append(f'| {row["processes"]} | {row["batches"]} | {"yes" if row["all_reduce"] else "no"} | '
                     f'{row["median_ms"]:.0f} | {min(row["all_ms"]):.0f} to {max(row["all_ms"]):.0f} | '
                     f'{row["median_cpu_ms"]:.0f} | {row["images_per_second"]:.1f} | '
                     f'{row["all_reduced_bytes"] / 1e6:.1f} |')
    if results['estimate']:
        lines += ['', 'Estimate by the formula, not a measurement:', '',
                  '| GPUs | all-reduce (ms) | efficiency, nothing overlapped |', '|--:|--:|--:|']
    for row in results['estimate']:
        efficiency = '' if row['efficiency'] is None else f'{row["efficiency"]:.1%}'
        lines.append(f'| {row["gpus"]} | {row["all_reduce_ms"]:.2f} | {efficiency} |')
    return '\n'.join(lines)


def main(argv: list[str]) -> None:
    settings = parse_args(argv)
    try:
        implementation = ops.choose(settings.native_kernels, torch.device('cpu'))
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for processes in sorted({row[0] for row in ROWS}):
            mp.spawn(measure, (processes, folder, settings, implementation), nprocs=processes)
            rows += json.loads(Path(folder, f'{processes}.json').read_text())
    most, bandwidth = max(row['all_reduced_bytes'] for row in rows), settings.gpu_bandwidth
    results = {'command': shlex.join(['python', 'benchmarks/scaling.py', *argv]), 'hardware': hardware('cpu'),
               'versions': versions(), 'runs': f'{settings.repeats} updates after {WARM_UP} to warm up', 'rows': rows,
               'estimate': estimate(most, bandwidth, settings.gpu_step_ms) if bandwidth else []}
    print(table(results))
    if settings.json:
        settings.json.write_text(json.dumps(results, indent=2) + '\n')


if __name__ == '__main__':
    main(sys.argv[1:])
