"""The loops: a training run, one epoch of it, and an evaluation."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from losses import DistillationLoss, SoftLabels
from models import Teacher
from samplers import ResumableSampler
from training.record import RunRecord
from training.signals import Agreement, StopRequest
from training.state import CheckpointFolder, Training
from utils import DivergedError, MetricLogger, any_rank

AMP_DTYPES = {'none': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def autocast(device: torch.device, amp: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=AMP_DTYPES[amp], enabled=amp != 'none')


def allow_tf32(allowed: bool) -> None:
    """Whether a GPU multiplies float32 in TF32, with 10 bits of mantissa: matrix products and convolutions alike."""
    torch.set_float32_matmul_precision('high' if allowed else 'highest')
    torch.backends.cudnn.allow_tf32 = allowed


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """How training goes through the data.

    Attributes:
        cooldown_epochs: follow after `epochs`, at the last learning rate.
        batch_size: images of a process at a time.
        grad_accum_steps: batches per update.
        clip_grad: largest norm of the gradient; None for any.
        amp: precision of the matrix products, of AMP_DTYPES.
        print_freq: batches between log lines.
        dist_eval: an evaluation's images are shared out to the ranks.
    """
    epochs: int
    cooldown_epochs: int = 0
    batch_size: int = 64
    grad_accum_steps: int = 1
    clip_grad: float | None = None
    amp: str = 'none'
    print_freq: int = 10
    dist_eval: bool = False


def train_one_epoch(
        network: nn.Module, training: Training, criterion: DistillationLoss, loader: Iterable, loop: Loop,
        stop: StopRequest, mixup: Mixup | None = None, record: RunRecord | None = None,
) -> tuple[dict[str, float], bool]:
    """Trains from `training.batches_done` to the end of the epoch, or to the update after which a stop is requested.

    The host waits for the device at log lines only (and, with fp16, where the loss scaler looks for infinities).
    Several processes agree on a stop every few seconds; a single one looks for it after every update.

    Args:
        network: `training.model`, or its DistributedDataParallel.
        loader: the remaining batches, (images (B, 3, H, W), labels (B,)).
        mixup: mixes a batch; its labels become (B, classes).
        record: is told of every log line.

    Returns:
        The means over the batches of the epoch, and whether a stop was requested.

    Raises:
        DivergedError: a loss was not finite; the model is not to be saved.
    """
    total = training.batches_done + len(loader)
    logger = MetricLogger(f'Epoch: [{training.epoch}]', total, loop.print_freq, training.device, training.batches_done,
                          training.meters)
    training.model.train()
    stopping, = any_rank(stop.requested, device=training.device)
    if stopping or not len(loader):
        return logger.means(), stopping

    agreement = Agreement(training.device)
    for images, labels in logger.batches(loader):
        images, labels = _on_device(images, labels, training.device)
        if mixup is not None:
            images, labels = mixup(images, labels)
        batches, is_update = _update_of(training.batches_done, total, loop.grad_accum_steps)
        training.progress = min(1., (training.epoch + training.batches_done / total) / loop.epochs)
        with nullcontext() if is_update else _without_all_reduce(network):
            parts = _losses(network, training, criterion, images, labels, loop.amp)
            training.scaler.scale(parts['loss'] / batches).backward()
        if is_update:
            training.update(loop.clip_grad, (training.batches_done + 1) / total)
        training.batches_done += 1

        logger.update(**_rates(training), **{name: part.detach() for name, part in parts.items()})
        if is_update and not stopping:
            stopping = agreement.after_update(stop.requested)
        if logger.end_batch() or stopping:
            stopping = _read(logger, training, stopping or stop.requested)
            logger.print_line()
            if record is not None:
                record.line(logger)
        if stopping and is_update:
            break
    logger.print_total()
    training.meters = logger.sums()
    means = logger.means()
    print('Averaged stats:', '  '.join(f'{name}: {mean:.6f}' for name, mean in means.items()))
    return means, stopping


def _on_device(images: Tensor, labels: Tensor | SoftLabels, device: torch.device) -> tuple[Tensor, Tensor | SoftLabels]:
    return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _update_of(batch: int, total: int, grad_accum_steps: int) -> tuple[int, bool]:
    """How many batches make up the update that `batch` of an epoch belongs to, and whether it is their last.

    The last update of an epoch may have fewer batches than the others.
    """
    first = batch - batch % grad_accum_steps
    batches = min(grad_accum_steps, total - first)
    return batches, batch + 1 == first + batches


def _without_all_reduce(network: nn.Module) -> AbstractContextManager[Any]:
    """The context of the batches whose gradients only add up until the update."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


def _losses(network: nn.Module, training: Training, criterion: DistillationLoss, images: Tensor,
            labels: Tensor | SoftLabels, amp: str) -> dict[str, Tensor]:
    """The loss of a batch by its parts, 'loss' first, in one forward."""
    with autocast(training.device, amp):
        if criterion.needs_blocks:
            outputs, blocks = network(images, return_blocks=True)
        else:
            outputs, blocks = network(images), None
        return training.add_methods_parts(criterion(images, outputs, labels, blocks))


def _rates(training: Training) -> dict[str, float]:
    """The largest learning rate, and the smallest where the groups differ; with fp16 the updates that were skipped."""
    rates = [group['lr'] for group in training.optimizer.param_groups]
    said = {'lr': max(rates)} | ({'lr_min': min(rates)} if min(rates) < max(rates) else {})
    return said | ({'skipped': training.skipped} if training.scaler.is_enabled() else {})


def _read(logger: MetricLogger, training: Training, stopping: bool) -> bool:
    """Brings the values since the last log line to the host, and lets the ranks agree whether to stop."""
    diverged, stopping = any_rank(not logger.read(), stopping, device=training.device)
    if diverged:
        raise DivergedError(f'the loss is not finite by batch {training.batches_done} of epoch {training.epoch}: '
                            'lower --lr, or pass --clip-grad; checkpoint.pth is from before')
    return stopping


# --- evaluation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(predict: Callable[[Tensor], Tensor], loader: Iterable, device: torch.device, *, amp: str = 'none',
             shared: bool = False, print_freq: int = 10, stop: StopRequest | None = None, header: str = 'Test:',
             ) -> dict[str, float] | None:
    """Accuracy over the loaders of all ranks, which may be of different lengths, or empty.

    Args:
        predict: images (B, 3, H, W) -> logits (B, classes); a module is put in evaluation mode.
        loader: batches of (images (B, 3, H, W), labels (B,)).
        amp: precision of the matrix products, of AMP_DTYPES.
        shared: the images are shared out to the ranks; otherwise each rank goes through all of them.
        print_freq: batches between log lines, which begin with `header`.

    Returns:
        loss, acc1 and acc5 (percent) and n, the images counted; None if a stop was requested meanwhile.
    """
    if isinstance(predict, nn.Module):
        predict.eval()
    # No collective in the loop: ranks may have different numbers of batches.
    # Loss, top-1, top-5, images. Apple's GPUs have no double precision.
    sums = torch.zeros(4, dtype=torch.float32 if device.type == 'mps' else torch.float64, device=device)
    logger = MetricLogger(header, len(loader), print_freq, device)
    for images, labels in logger.batches(loader):
        if stop is not None and stop.requested:
            break
        images, labels = _on_device(images, labels, device)
        with autocast(device, amp):
            logits = predict(images)
        batch = _counts(logits, labels)
        sums += batch
        logger.update(loss=batch[0] / len(labels), acc1=batch[1] * 100 / len(labels), acc5=batch[2] * 100 / len(labels))
        if logger.end_batch():
            logger.read()
            logger.print_line()
    stopped, = any_rank(stop is not None and stop.requested, device=device)
    if stopped:
        return None
    if dist.is_initialized():
        dist.all_reduce(sums)
    loss, top1, top5, images = sums.tolist()
    times_counted = dist.get_world_size() if dist.is_initialized() and not shared else 1
    stats = {'loss': loss / images, 'acc1': 100 * top1 / images, 'acc5': 100 * top5 / images,
             'n': round(images / times_counted)}
    logger.print_total()
    print(f'* Acc@1 {stats["acc1"]:.3f} Acc@5 {stats["acc5"]:.3f} loss {stats["loss"]:.3f}')
    return stats


def _counts(logits: Tensor, labels: Tensor) -> Tensor:
    """The sums over a batch, (4,): loss, labels that were the likeliest class, labels among the five, images."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (B, 5)
    return torch.stack([F.cross_entropy(logits.float(), labels, reduction='sum'), ranked[:, 0].sum(), ranked.sum(),
                        torch.as_tensor(len(labels), device=logits.device)])


def evaluate_and_say(what: str, predict: Callable[[Tensor], Tensor], loader: Iterable, device: torch.device, loop: Loop,
                     stop: StopRequest | None = None) -> dict[str, float] | None:
    """`evaluate` of 'test', 'test_ema' or 'teacher' to loss, acc1 and acc5; says the accuracy in DeiT's words."""
    header, name = {'test': ('Test:', 'network'), 'test_ema': ('Test EMA:', 'averaged network'),
                    'teacher': ('Teacher:', 'teacher')}[what]
    stats = evaluate(predict, loader, device, amp=loop.amp, shared=loop.dist_eval, print_freq=loop.print_freq,
                     stop=stop, header=header)
    if stats is not None:
        print(f'Accuracy of the {name} on the {stats.pop("n")} test images: {stats["acc1"]:.1f}%')
    return stats


def evaluate_all(training: Training, teacher: Teacher | None, loader: DataLoader, loop: Loop, stop: StopRequest,
                 ) -> dict[str, float] | None:
    """The statistics of the network (test_), its average (test_ema_) and the teacher (teacher_); None if stopped."""
    predictors = [('teacher', lambda images: teacher(images)[0])] if teacher is not None else []
    predictors += [('test', training.model)]
    predictors += [('test_ema', training.ema.module)] if training.ema is not None else []
    found: dict[str, float] = {}
    for name, predict in predictors:
        with _moved_to(training.device, predict):
            stats = evaluate_and_say(name, predict, loader, training.device, loop, stop)
        if stats is None:
            return None
        found |= {f'{name}_{key}': value for key, value in stats.items()}
    return found


@contextmanager
def _moved_to(device: torch.device, predict: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Moves a module to the device for a while: --model-ema-force-cpu keeps the average elsewhere."""
    if not isinstance(predict, nn.Module):
        yield
        return
    home = next(predict.parameters()).device
    predict.to(device)
    yield
    predict.to(home)


# --- a whole run ------------------------------------------------------------------------------------------------------


def fit(
        network: nn.Module, training: Training, criterion: DistillationLoss, loader: DataLoader,
        sampler: ResumableSampler, loader_val: DataLoader, loop: Loop, stop: StopRequest, mixup: Mixup | None = None,
        folder: CheckpointFolder | None = None, record: RunRecord | None = None,
) -> bool:
    """All epochs that remain, each with its evaluation, log line and checkpoints, or as many as signals allow.

    Args:
        network, training, criterion, loader, loop, stop, mixup, record: see `train_one_epoch`.
        sampler: that of the loader; is told epoch and position.
        loader_val: for `evaluate`.
        folder: for the checkpoints, on all ranks; None where none are to be kept.

    Returns:
        Whether all epochs are done.
    """
    batches = len(sampler.sampler) // loop.batch_size
    started = time.monotonic()
    while training.epoch < loop.epochs + loop.cooldown_epochs:
        sampler.set_epoch(training.epoch, training.batches_done * loop.batch_size)
        train_stats, stopped = train_one_epoch(network, training, criterion, loader, loop, stop, mixup, record)
        if folder is not None:
            folder.save(training, 'checkpoint.pth')  # now, so that nothing during the evaluation costs the epoch
        # The teacher is evaluated once, with the first epoch of the run.
        teacher = criterion.teacher if training.max_accuracy < 0 else None
        test_stats = None if stopped else evaluate_all(training, teacher, loader_val, loop, stop)
        if test_stats is None:
            print(f'stopped by a signal in epoch {training.epoch} after batch {training.batches_done} of {batches}, '
                  + ('--resume auto continues from there' if folder else 'nothing saved without --output_dir'))
            return False
        is_best = training.take_accuracy(test_stats['test_acc1'])
        print(f'Max accuracy: {training.max_accuracy:.2f}%')
        if record is not None:
            record.epoch(train_stats, test_stats, (training.epoch + 1) / loop.epochs)
        training.end_epoch()
        if folder is not None:
            folder.save(training, *(['best_checkpoint.pth'] if is_best else []), 'checkpoint.pth')
        if record is not None:
            record.model_card()
    print(f'Training time {timedelta(seconds=int(time.monotonic() - started))}')
    return True
