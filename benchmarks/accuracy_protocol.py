"""Accuracy after 150 updates on 1000 images, for every row of a table: bits, IRM, DGD, distillation, granularity.

    python benchmarks/accuracy_protocol.py --data-path DIR --weights deit_tiny.pth --output out/protocol.json
    python benchmarks/accuracy_protocol.py ... --rows 4bit 4bit-published --seeds 0 1 2     # some of the rows
    python benchmarks/accuracy_protocol.py --output out/protocol.json --table               # print the table only

DIR holds train/ (1000 images, one a class, in the measurements of docs/accuracy.md) and val/, a folder a class. The
student starts from the full-precision network --weights, which is also its teacher: calibration, then 150 updates of 20
images by LAMB without weight decay, cosine learning rate by the update, images in the evaluation crop with random
horizontal flips; a `descent` does so at 4 bits, then at fewer and fewer. Results are appended to --output row by row
and seed by seed; what it holds already is skipped, so that an interrupted run continues with the same command.
"""
import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import quant_vision_transformer  # noqa: E402, F401  registers the variants
from _quan_base import clamp_steps_  # noqa: E402
from calibration.closed_form import calibrate_to_full_precision  # noqa: E402
from calibration.first_batch import calibrate  # noqa: E402
from checkpoints.files import read_checkpoint  # noqa: E402
from checkpoints.full_precision import load_full_precision  # noqa: E402
from checkpoints.networks import ModelInfo  # noqa: E402
from datasets import build_dataset, build_transform  # noqa: E402
from losses import Distillation, DistillationLoss, SoftLabels  # noqa: E402
from models import BlockOutputs, Teacher  # noqa: E402
from training.methods.oscillation import OscillationConfig  # noqa: E402
from training.methods.registry import build_methods  # noqa: E402
from training.methods.soft_labels import top_k  # noqa: E402
from training.optimizer import OptimizerConfig, build_optimizer  # noqa: E402
from utils import UserError, write_whole  # noqa: E402

BITS = {2: 'twobits', 3: 'threebits', 4: 'fourbits'}
BATCH = 20
LR = {2: 3e-4, 3: 1e-4, 4: 1e-4}


@dataclass(frozen=True)
class Row:
    """One line of the table: a network, its calibration and its training.

    With a `descent`, a student of each of these bits is calibrated and trained first, each from the one before it.
    """
    bits: int
    calibration: str = 'mse'
    distillation: str = 'both'
    alpha: float = 1.
    dgd_weight: float = 0.
    token_weight: float = 0.5
    lr: float = 1e-4
    step_lr_scale: float = 0.1
    updates: int = 150
    descent: tuple[int, ...] = ()
    dampening: float = 0.
    freezing: float | None = None
    stored_classes: int | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


def _published(bits: int, **changes: Any) -> Row:
    return Row(bits, **{'calibration': 'published', 'distillation': 'hard', 'alpha': 0.5, 'token_weight': 0.,
                        'lr': 3e-4, 'step_lr_scale': 1.} | changes)


def _rows() -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for bits in (4, 3, 2):
        name = f'{bits}bit'
        ours = partial(Row, bits, lr=LR[bits])
        rows[name] = ours()
        rows[f'{name}-published'] = _published(bits)
        for irm in (False, True):
            for dgd in (False, True):
                parts = [name, 'baseline', *['irm'] * irm, *['dgd'] * dgd]
                rows['-'.join(parts)] = _published(bits, lr=1e-4, dgd_weight=float(dgd), kwargs={'irm': irm})
        for weight in (0.1, 10.):
            rows[f'{name}-baseline-dgd-{weight:g}'] = _published(bits, lr=1e-4, dgd_weight=weight,
                                                                 kwargs={'irm': False})
        rows[f'{name}-no-irm'] = ours(kwargs={'irm': False})
        for weight in (0.01, 0.1, 1.):
            rows[f'{name}-dgd-{weight:g}'] = ours(dgd_weight=weight)
        rows[f'{name}-tensor'] = ours(kwargs={'act_granularity': 'tensor'})
        rows[f'{name}-no-tokens'] = ours(token_weight=0.)
        rows[f'{name}-hard'] = ours(distillation='hard', alpha=0.5, token_weight=0.)
        rows[f'{name}-soft'] = ours(distillation='soft', alpha=0.5, token_weight=0.)
        rows[f'{name}-steps-as-weights'] = ours(step_lr_scale=1.)
        rows[f'{name}-dampening'] = ours(dampening=0.1)
        rows[f'{name}-freezing'] = ours(freezing=0.02)
        rows[f'{name}-long'] = ours(updates=450)
        if bits < 4:
            rows[f'{name}-descent'] = ours(descent=tuple(range(4, bits, -1)))
        rows[f'{name}-stored'] = ours(token_weight=0., stored_classes=10)
    return rows


ROWS = _rows()


# --- data -------------------------------------------------------------------------------------------------------------


class Images:
    """A data set of uint8 images in memory, to be normalized and flipped batch by batch."""

    def __init__(self, dataset: Dataset, normalize: transforms.Normalize) -> None:
        self.images, self.labels = (torch.stack([torch.as_tensor(item) for item in items])
                                    for items in zip(*(dataset[i] for i in range(len(dataset))), strict=True))
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (normalize.mean, normalize.std))

    def __call__(self, index: Tensor | slice, flip: Tensor | None = None) -> Tensor:
        """Normalized, (B, 3, H, W); those with `flip`, (B,), mirrored."""
        images = self.images[index]
        if flip is not None:
            images = torch.where(flip[:, None, None, None], images.flip(3), images)
        return (images / 255. - self.mean) / self.std


def load_images(data_path: str) -> tuple[Images, Images]:
    """train/ and val/ in the evaluation crop."""
    *crop, _, normalize = build_transform(False, 224).transforms
    to_uint8 = transforms.Compose([*crop, transforms.PILToTensor()])
    train, val = (Images(build_dataset(is_train, 'IMNET', data_path, to_uint8)[0], normalize)
                  for is_train in (True, False))
    return train, val


# --- a row ------------------------------------------------------------------------------------------------------------


class StoredTeacher(Teacher):
    """Asks the network once for each image and its mirror image, and remembers the answers for all rows (1.8 GB).

    Attributes:
        index: which images the next batch shows; mirror images are numbered after all the others.
    """

    def __init__(self, model: nn.Module, images: int) -> None:
        super().__init__(model, return_tokens=True)
        tokens = model.num_prefix_tokens + model.patch_embed.num_patches
        self.known = torch.zeros(2 * images, dtype=torch.bool)
        self.logits = torch.empty(2 * images, model.num_classes)
        self.tokens = torch.empty(2 * images, len(model.blocks), tokens, model.embed_dim, dtype=torch.bfloat16)
        self.index = torch.empty(0, dtype=torch.long)

    def __call__(self, images: Tensor) -> tuple[Tensor, list[BlockOutputs]]:
        new = ~self.known[self.index]
        if new.any():
            index = self.index[new]
            logits, blocks = super().__call__(images[new])
            self.logits[index] = logits.float()
            self.tokens[index] = torch.stack([block.tokens for block in blocks], 1).bfloat16()
            self.known[index] = True
        return self.logits[self.index], [BlockOutputs(tokens=tokens) for tokens in self.tokens[self.index].unbind(1)]


@torch.no_grad()
def top1(model: nn.Module, images: Images, amp: bool) -> float:
    """Per cent of the images classified right."""
    model.eval()
    correct = 0
    for part in torch.arange(len(images.labels)).split(32):
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            correct += (model(images(part)).argmax(1) == images.labels[part]).sum().item()
    return 100 * correct / len(images.labels)


def start_from(weights: dict[str, Any], name: str, **kwargs: Any) -> nn.Module:
    """The network of that name, which starts from a full-precision checkpoint, or from one of more bits."""
    network = timm.create_model(name, **kwargs)
    load_full_precision(network, weights)
    return network


def run_row(row: Row, seed: int, stored: StoredTeacher, weights: dict[str, Any], train: Images, val: Images, amp: bool,
            calibration_images: int) -> dict[str, float]:
    """Top-1 of the calibrated and of the trained student."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    drawn = train(torch.randperm(len(train.labels), generator=generator)[:calibration_images])
    teacher = stored
    if row.dgd_weight:
        teacher = Teacher(start_from(weights, 'deit_tiny_patch16_224'), True, row.token_weight > 0)
    start, calibration_s, training_s = weights, 0., 0.
    for stage in (*(replace(row, bits=bits, lr=LR[bits]) for bits in row.descent), row):
        name = f'{BITS[stage.bits]}_deit_tiny_patch16_224'
        student = start_from(start, name, **row.kwargs)
        begun = time.perf_counter()
        (calibrate if row.calibration == 'published' else calibrate_to_full_precision)(student, drawn)
        calibration_s += time.perf_counter() - begun
        calibrated = top1(student, val, amp)
        print(f'  {stage.bits} bits calibrated: {calibrated:.1f} %', flush=True)
        begun = time.perf_counter()
        fit(stage, student, stored, teacher, train, generator, amp)
        training_s += time.perf_counter() - begun
        trained = top1(student, val, amp)
        print(f'  {stage.bits} bits trained: {trained:.1f} %', flush=True)
        start = {'model': student.state_dict(), 'qvit': ModelInfo(name, row.kwargs, student.num_classes, 224).to_dict()}
    return {'calibrated': calibrated, 'calibration_s': round(calibration_s, 1), 'training_s': round(training_s, 1),
            'trained': trained}


class Updates:
    """The optimizer of a row, and the methods that act with each of its updates."""

    def __init__(self, row: Row, student: nn.Module) -> None:
        self.row, self.student = row, student
        freezing = None if row.freezing is None else [row.freezing]
        self.methods = build_methods(student, OscillationConfig(row.dampening, freezing))
        self.optimizer = build_optimizer(
            OptimizerConfig(opt='fusedlamb', lr=row.lr, weight_decay=0., step_lr_scale=row.step_lr_scale), student)
        for group in self.optimizer.param_groups:
            group['lr'] = row.lr * group.get('lr_scale', 1.)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, row.updates)

    def make(self, loss: Tensor, update: int) -> None:
        """The update of this number, by a loss to which the methods add their parts."""
        progress = update / self.row.updates
        for method in self.methods:
            loss = loss + sum(method.loss_parts(progress).values())
        loss.backward()
        for method in self.methods:
            method.before_update()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        clamp_steps_(self.student)
        for method in self.methods:
            method.after_update((update + 1) / self.row.updates)


def build_criterion(row: Row, student: nn.Module, teacher: Teacher) -> DistillationLoss:
    distillation = Distillation(row.distillation, row.alpha, dgd_weight=row.dgd_weight, token_weight=row.token_weight)
    return DistillationLoss(nn.CrossEntropyLoss(), teacher, distillation, student.num_prefix_tokens,
                            stored_labels=row.stored_classes is not None)


def fit(row: Row, student: nn.Module, stored: StoredTeacher, teacher: Teacher, train: Images,
        generator: torch.Generator, amp: bool) -> None:
    criterion, updates = build_criterion(row, student, teacher), Updates(row, student)
    student.train()
    order = torch.empty(0, dtype=torch.long)
    running = 0.
    for update in range(row.updates):
        if len(order) < BATCH:
            order = torch.randperm(len(train.labels), generator=generator)
        index, order = order[:BATCH], order[BATCH:]
        flip = torch.rand(BATCH, generator=generator) < 0.5
        images, labels = train(index, flip), train.labels[index]
        stored.index = index + len(train.labels) * flip
        if row.stored_classes is not None:
            labels = SoftLabels(labels, *top_k(F.softmax(stored(images)[0], 1), row.stored_classes))
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            outputs, blocks = student(images, return_blocks=True)
            parts = criterion(images, outputs, labels, blocks)
        updates.make(parts['loss'], update)
        running += parts['loss'].item()
        if (update + 1) % 25 == 0:
            print(f'  update {update + 1}: mean loss {running / 25:.3f}', flush=True)
            running = 0.


# --- the table --------------------------------------------------------------------------------------------------------


def read_results(path: Path) -> list[dict]:
    try:
        return json.loads(path.read_text()) if path.is_file() else []
    except ValueError as error:
        raise UserError(f'--output {path} is not a file of results: name another') from error


def write_results(results: list[dict], path: Path) -> None:
    write_whole(path, lambda beside: beside.write_text(json.dumps(results, indent=1) + '\n'))


def table(results: list[dict]) -> str:
    """Markdown: a line a row, means over the seeds, with their standard deviation from two on."""
    lines = ['| row | bits | calibration | distillation | DGD | tokens | lr | updates | network | seeds '
             '| calibrated (%) | trained (%) |', '|---|--:|---|---|--:|--:|--:|--:|---|--:|--:|--:|']
    for name in dict.fromkeys(result['row'] for result in results):
        found = [result for result in results if result['row'] == name]
        # The file also has rows of methods that were removed since: what it says of them is not in the table.
        row = Row(**{key: value for key, value in found[0]['settings'].items() if key in Row.__dataclass_fields__})
        updates = row.updates * (1 + len(row.descent))

        def mean(key: str, found=found) -> str:
            values = [result[key] for result in found]
            spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
            return f'{statistics.mean(values):.1f}{spread}'

        network = ' '.join(f'{key}={value}' for key, value in row.kwargs.items())
        lines.append(f'| {name} | {row.bits} | {row.calibration} | {row.distillation} | {row.dgd_weight:g} | '
                     f'{row.token_weight:g} | {row.lr:g} | {updates} | {network} | {len(found)} | '
                     f'{mean("calibrated")} | {mean("trained")} |')
    return '\n'.join(lines)


def run(data_path: str, weights_path: str, output: Path, rows_and_seeds: list[tuple[str, int]], results: list[dict],
        amp: str, calibration_images: int) -> None:
    """Runs the rows, each at its seed; `results` and the file `output` get each as it is done."""
    weights, (train, val) = read_checkpoint(weights_path), load_images(data_path)
    stored = StoredTeacher(start_from(weights, 'deit_tiny_patch16_224'), len(train.labels))
    output.parent.mkdir(parents=True, exist_ok=True)
    machine = {'torch': torch.__version__, 'timm': timm.__version__, 'threads': torch.get_num_threads(),
               'machine': platform.machine(), 'amp': amp, 'calibration_images': calibration_images}
    for name, seed in rows_and_seeds:
        print(f'{name}, seed {seed}', flush=True)
        found = run_row(ROWS[name], seed, stored, weights, train, val, amp == 'bf16', calibration_images)
        results.append({'row': name, 'seed': seed, **found, 'settings': asdict(ROWS[name]), **machine})
        write_results(results, output)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-path', help='folder with train/ and val/')
    parser.add_argument('--weights', help='full-precision DeiT-Tiny checkpoint')
    parser.add_argument('--output', required=True, type=Path, help='JSON file of results, to be continued')
    parser.add_argument('--rows', nargs='+', choices=ROWS, metavar='ROW', default=list(ROWS),
                        help=f'all unless given: {", ".join(ROWS)}')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--calibration-images', type=int, default=64)
    parser.add_argument('--amp', choices=('none', 'bf16'), default='none', help='bf16: products under autocast')
    parser.add_argument('--table', action='store_true', help='only print the table of --output')
    args = parser.parse_args()
    try:
        results = read_results(args.output)
        if not args.table:
            if not (args.data_path and args.weights):
                raise UserError('--data-path and --weights are needed: name the images and the full-precision network')
            done = {(result['row'], result['seed']) for result in results}
            missing = [(name, seed) for seed in args.seeds for name in args.rows if (name, seed) not in done]
            if missing:
                run(args.data_path, args.weights, args.output, missing, results, args.amp, args.calibration_images)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(table(results))
    return 0


if __name__ == '__main__':
    sys.exit(main())
