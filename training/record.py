"""What a run records of itself in its output folder: args.json, log.txt, TensorBoard, and the model card."""

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.data import Dataset

from analysis.logs import parse_epoch
from analysis.model_card import write_model_card
from checkpoints.networks import ModelInfo
from files.readers import is_reader
from files.samples import first_images
from models import is_quantized
from training.diagnostics import Diagnostics, warning_lines
from training.state import Training
from utils import MetricLogger, UserError, printable, write_whole_text

__all__ = ['RunRecord', 'describe_run', 'keep_log_before', 'run_lines', 'write_args']

DIAGNOSED_IMAGES = 16
EVALUATED_DATA = ('data_path', 'data_set', 'inat_category', 'class_map', 'val_split', 'input_key', 'target_key',
                  'exif_orientation')  # the flags that say which images an evaluation sees


def describe_run(flags: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The flags with all defaults resolved, and the versions that they ran with."""
    folder = Path(__file__).resolve().parent
    try:
        git = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'], cwd=folder,
                             capture_output=True, text=True, timeout=10)
        commit = git.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    gpu = torch.cuda.get_device_name(device) if device.type == 'cuda' else None
    return {'args': dict(flags), 'git_commit': commit, 'python': sys.version.split()[0], 'torch': torch.__version__,
            'timm': timm.__version__, 'cuda': torch.version.cuda, 'gpu': gpu, 'command': sys.argv}


def run_lines(run: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """What `describe_run` gives, to be read: versions, then one flag a line as a command line has it.

    Args:
        run: with what the learning rate follows from, effective_batch and scaled_lr.
        defaults: the flags of an empty command line. Flags that have these are left out.
    """
    flags = {name: value for name, value in run['args'].items() if name in defaults and value != defaults[name]}
    versions = ', '.join(f'{name} {run[name]}' for name in ('python', 'torch', 'timm', 'cuda', 'gpu') if run[name])
    where = run['args'].get('output_dir')
    return [f'Q-ViT{" at " + run["git_commit"] if run["git_commit"] else ""}, {versions}',
            *(f'  {_as_flag(name, value)}' for name, value in flags.items()),
            f'  all other flags are at their defaults (--help{", " + where + "/args.json" if where else ""}); '
            f'{run["effective_batch"]} images an update, learning rate {run["scaled_lr"]:.6g}']


def _as_flag(name: str, value: Any) -> str:
    flag = f'--{name.replace("_", "-")}'
    if isinstance(value, bool):
        return flag if value else f'--no-{flag[2:]}'
    items = [f'{key}={item}' for key, item in value.items()] if isinstance(value, dict) else (
        value if isinstance(value, list) else [value])
    return ' '.join([flag, *(shlex.quote(printable(str(item))) for item in items)])


def write_args(run: Mapping[str, Any], folder: Path) -> None:
    """Writes args.json, what `describe_run` gives, into the folder.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_whole_text(folder / 'args.json', json.dumps(run, indent=2) + '\n')
    except OSError as error:
        raise UserError(f'--output_dir {folder} cannot be written ({error.strerror}): choose another') from error


def keep_log_before(path: Path, epoch: int) -> None:
    """Drops the lines of log.txt from `epoch` on: a resumed run writes them again."""
    def is_kept(line: str) -> bool:
        try:
            return parse_epoch(line)['epoch'] < epoch
        except ValueError:  # cut off when the earlier run was killed
            return False

    if path.is_file():
        lines = path.read_text(encoding='utf-8', errors='replace').splitlines()
        write_whole_text(path, ''.join(f'{line}\n' for line in lines if is_kept(line)))


def _event_writer(folder: Path, purge_step: int) -> Any:
    """TensorBoard's writer; None where it is not installed, which is said."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print('TensorBoard is not installed, the run writes no events (pip install tensorboard)')
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)


class RunRecord:
    """The files of a run that tell how it goes. Rank 0 of a run with an output folder has one.

    In TensorBoard, values stand at the number of batches since the run began.

    Args:
        folder: of the run.
        training: where the run starts.
        info: the description of the network.
        dataset: the evaluation part; diagnostics look at its first images.
        batches: how many an epoch has.
        images_per_batch: how many images all ranks together have in a batch.
        flags, defaults: those of the run and those of the parser, for the model card; values that JSON can hold.
    """

    def __init__(self, folder: Path, training: Training, info: ModelInfo, dataset: Dataset, batches: int,
                 images_per_batch: int, flags: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.folder, self.training, self.info, self.dataset = folder, training, info, dataset
        self.batches, self.images_per_batch, self.flags, self.defaults = batches, images_per_batch, flags, defaults
        keep_log_before(folder / 'log.txt', training.epoch)
        self.writer = _event_writer(folder / 'tensorboard', self._batches_so_far + 1)
        images = first_images(dataset, DIAGNOSED_IMAGES)
        self.diagnostics = Diagnostics(training.model, images.to(training.device), training.methods)

    @property
    def _batches_so_far(self) -> int:
        return self.training.epoch * self.batches + self.training.batches_done

    def line(self, logger: MetricLogger) -> None:
        """Records what a log line says."""
        at, seconds = self._batches_so_far, statistics.median(logger.batch_time.recent)
        for name, meter in logger.meters.items():
            self._add(f'train/{name}', meter.last, at)
        self._add('train/images_per_second', self.images_per_batch / max(seconds, 1e-9), at)

    def epoch(self, train_stats: dict[str, float], test_stats: dict[str, float], progress: float) -> None:
        """Records the epoch that ends, and warns of what goes wrong in the quantizers.

        Args:
            test_stats: of `engine.evaluate_all`.
            progress: share of the run that is done with this epoch, in [0, 1].
        """
        self._write_log({f'train_{name}': value for name, value in train_stats.items()} | test_stats)
        quantizers = self.diagnostics.measure()
        self._write_tensorboard(test_stats, quantizers)
        is_fitted = bool(self.flags.get('finetune')) and self.flags.get('calibration') != 'published'
        for warning in warning_lines(self.training.model, quantizers, progress, is_fitted):
            print(warning)

    def _write_log(self, stats: dict[str, float]) -> None:
        entry = stats | {'epoch': self.training.epoch, 'n_parameters': self.training.n_parameters}
        path = self.folder / 'log.txt'
        before = path.read_text(encoding='utf-8') if path.is_file() else ''
        write_whole_text(path, f'{before}{json.dumps(entry)}\n')  # whole: a run may be killed at any time

    def _write_tensorboard(self, test_stats: dict[str, float], quantizers: dict[str, dict[str, float]]) -> None:
        for name, value in test_stats.items():
            kind, _, key = name.rpartition('_')
            self._add(f'{kind}/{key}', value, self._batches_so_far)
        for name, entry in quantizers.items():
            for what, value in entry.items():
                self._add(f'{what}/{name}', value, self._batches_so_far)
        if self.writer is not None:
            self.writer.flush()

    def _add(self, name: str, value: float, at: int) -> None:
        if self.writer is not None:
            self.writer.add_scalar(name, value, at)

    def summary(self) -> str:
        """Where the results of the finished run are, and which commands take them."""
        folder, best = self.folder, shlex.quote(str(self.folder / 'best_checkpoint.pth'))
        data = ''.join(f' {_as_flag(name, value)}' for name, value in self.flags.items()
                       if name in EVALUATED_DATA and value != self.defaults.get(name)
                       and (name != 'data_set' or is_reader(value)))  # other names stand in the checkpoint
        lines = [f'{self.training.max_accuracy:.2f} % top-1: {folder / "best_checkpoint.pth"}, with model_card.md; the '
                 'last epoch: checkpoint.pth', f'its course: {folder / "log.txt"}, or tensorboard --logdir '
                 f'{shlex.quote(str(folder))}; its flags: args.json',
                 f'evaluate it: python main.py --eval --resume {best}{data}']
        if is_quantized(self.training.model):
            lines.append(f'pack it: python deploy.py pack {best}')
        return '\n'.join(lines)

    def model_card(self) -> None:
        """Writes the card of best_checkpoint.pth by what is recorded so far."""
        write_model_card(self.folder, self.training.model, self.info, dict(self.flags), dict(self.defaults),
                         images=len(self.dataset))
