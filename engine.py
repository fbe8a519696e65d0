"""The loops: a training run, one epoch of it, an evaluation; and what they write to the log and TensorBoard."""

import json
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from analysis.model_card import write_model_card
from checkpoints.files import write_checkpoint
from losses import DistillationLoss
from models import Teacher
from samplers import ResumableSampler
from training.diagnostics import Diagnostics, warning_lines
from training.state import Training
from utils import DivergedError, MetricLogger, StopRequest, any_rank, keep_log_before

AMP_DTYPES = {'none': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def autocast(device: torch.device, amp: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=AMP_DTYPES[amp], enabled=amp != 'none')


# --- training ---------------------------------------------------------------------------------------------------------


def _without_all_reduce(network: nn.Module) -> Any:
    """The context of the batches whose gradients only add up until the update."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


def train_one_epoch(
        network: nn.Module, training: Training, criterion: DistillationLoss, loader: Iterable, args: Namespace,
        stop: StopRequest, mixup: Mixup | None = None, writer: SummaryWriter | None = None,
) -> tuple[dict[str, float], bool]:
    """Trains from `training.step` to the end of the epoch, or to the update after which a stop is requested.

    The host waits for the device at log lines only (and, with fp16, where the loss scaler looks for infinities).
    Several processes agree on a stop at log lines; a single one looks for it after every batch.

    Args:
        network: `training.model`, or its DistributedDataParallel.
        loader: the remaining batches, (images (B, 3, H, W), labels (B,)).
        mixup: mixes a batch; its labels become (B, classes).
        writer: gets the log lines' values, at the number of batches since the run began.

    Returns:
        The means over the batches seen, and whether a stop was requested.

    Raises:
        DivergedError: a loss was not finite; the model is not to be saved.
    """
    device, header = training.device, f'Epoch: [{training.epoch}]'
    total = training.step + len(loader)
    logger = MetricLogger(header, total, args.print_freq, device, training.step)
    return_qk = {'return_qk': True} if criterion.dgd_weight > 0 else {}
    training.model.train()
    stopping, = any_rank(stop.requested, device=device)
    if stopping or not len(loader):
        return {}, stopping

    for images, labels in logger.batches(loader):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if mixup is not None:
            images, labels = mixup(images, labels)
        # The last update of an epoch may have fewer batches than the others.
        first = training.step - training.step % args.grad_accum_steps
        batches = min(args.grad_accum_steps, total - first)
        is_update = training.step + 1 == first + batches
        training.progress = min(1., (training.epoch + training.step / total) / args.epochs)
        with nullcontext() if is_update else _without_all_reduce(network):
            with autocast(device, args.amp):
                outputs = network(images, **return_qk)
                outputs, qk = outputs if return_qk else (outputs, None)
                parts = criterion(images, outputs, labels, qk)
                if training.oscillations is not None:
                    parts = training.oscillations.add_dampening(parts, training.progress)
            training.scaler.scale(parts['loss'] / batches).backward()
        if is_update:
            training.update(args.clip_grad, (training.step + 1) / total)
        training.step += 1

        logger.update(lr=training.optimizer.param_groups[0]['lr'],
                      **{name: part.detach() for name, part in parts.items()})
        if logger.end_batch() or stopping or (stop.requested and args.world_size == 1):
            diverged, stopping = any_rank(not logger.read(), stop.requested or stopping, device=device)
            if diverged:
                raise DivergedError(f'the loss is not finite by batch {training.step} of epoch {training.epoch}: '
                                    'lower --lr, or pass --clip-grad; checkpoint.pth is from before')
            logger.print_line()
            if writer is not None:
                _write_line(writer, logger, training.epoch * total + training.step,
                            args.batch_size * args.world_size)
        if stopping and is_update:
            break
    logger.print_total()
    means = logger.means()
    print('Averaged stats:', '  '.join(f'{name}: {mean:.6f}' for name, mean in means.items()))
    return means, stopping


def _write_line(writer: SummaryWriter, logger: MetricLogger, at: int, batch: int) -> None:
    for name, meter in logger.meters.items():
        writer.add_scalar(f'train/{name}', meter.last, at)
    writer.add_scalar('train/images_per_second', batch / max(statistics.median(logger.batch_time.recent), 1e-9), at)


# --- evaluation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
        predict: Callable[[Tensor], Tensor], loader: Iterable, device: torch.device, args: Namespace,
        stop: StopRequest | None = None, header: str = 'Test:',
) -> dict[str, float] | None:
    """Accuracy over the loaders of all ranks, which may be of different lengths, or empty.

    Args:
        predict: images (B, 3, H, W) -> logits (B, classes); a module is put in evaluation mode.

    Returns:
        loss, acc1 and acc5 (percent) and n, the images counted; None if a stop was requested meanwhile.
    """
    if isinstance(predict, nn.Module):
        predict.eval()
    # No collective in the loop: ranks may have different numbers of batches.
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, images
    logger = MetricLogger(header, len(loader), args.print_freq, device)
    for images, labels in logger.batches(loader):
        if stop is not None and stop.requested:
            break
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with autocast(device, args.amp):
            logits = predict(images)
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (B, 5)
        batch = torch.stack([F.cross_entropy(logits.float(), labels, reduction='sum'), ranked[:, 0].sum(), ranked.sum(),
                             torch.as_tensor(len(labels), device=device)])
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
    # Without --dist-eval each rank went through all of the images.
    stats = {'loss': loss / images, 'acc1': 100 * top1 / images, 'acc5': 100 * top5 / images,
             'n': round(images) if args.dist_eval else round(images / args.world_size)}
    logger.print_total()
    print(f'* Acc@1 {stats["acc1"]:.3f} Acc@5 {stats["acc5"]:.3f} loss {stats["loss"]:.3f}')
    return stats


def evaluate_and_say(what: str, predict: Callable[[Tensor], Tensor], loader: Iterable, device: torch.device,
                     args: Namespace, stop: StopRequest | None = None) -> dict[str, float] | None:
    """`evaluate` of 'test', 'test_ema' or 'teacher' to loss, acc1 and acc5; says the accuracy in DeiT's words."""
    header, name = {'test': ('Test:', 'network'), 'test_ema': ('Test EMA:', 'averaged network'),
                    'teacher': ('Teacher:', 'teacher')}[what]
    stats = evaluate(predict, loader, device, args, stop, header)
    if stats is not None:
        print(f'Accuracy of the {name} on the {stats.pop("n")} test images: {stats["acc1"]:.1f}%')
    return stats


def write_epoch(writer: SummaryWriter, test_stats: dict[str, float], quantizers: dict[str, dict[str, float]], at: int,
                ) -> None:
    """The results of an epoch, and its quantizers, to TensorBoard; `at` batches since the run began."""
    for name, value in test_stats.items():
        kind, _, key = name.rpartition('_')
        writer.add_scalar(f'{kind}/{key}', value, at)
    for name, entry in quantizers.items():
        for what, value in entry.items():
            writer.add_scalar(f'{what}/{name}', value, at)
    writer.flush()


# --- a whole run ------------------------------------------------------------------------------------------------------


def fit(
        network: nn.Module, training: Training, criterion: DistillationLoss, loader: DataLoader,
        sampler: ResumableSampler, loader_val: DataLoader, mixup: Mixup | None, args: Namespace, about: dict[str, Any],
        stop: StopRequest,
) -> None:
    """All epochs that remain, each with its evaluation, log line and checkpoints, or as many as signals allow.

    Args:
        network, training, criterion, loader, mixup, args, stop: see `train_one_epoch`.
        sampler: that of the loader; is told epoch and position.
        loader_val: for `evaluate`.
        about: `checkpoints.description` of the network.
    """
    output = Path(args.output_dir) if args.output_dir and args.rank == 0 else None
    batches = len(sampler.sampler) // args.batch_size
    writer = diagnostics = None
    if output:
        keep_log_before(output / 'log.txt', training.epoch)
        writer = SummaryWriter(str(output / 'tensorboard'), purge_step=training.epoch * batches + training.step + 1)
        images = [loader_val.dataset[index][0] for index in range(min(16, len(loader_val.dataset)))]
        diagnostics = Diagnostics(training.model, torch.stack(images).to(training.device), training.oscillations)

    def save(*names: str) -> None:
        if args.output_dir:
            state = training.checkpoint(args, about)
            for name in names if output else ():
                write_checkpoint(state, output / name)

    started = time.monotonic()
    while training.epoch < args.epochs + args.cooldown_epochs:
        epoch = training.epoch
        sampler.set_epoch(epoch, training.step * args.batch_size)
        train_stats, stopped = train_one_epoch(network, training, criterion, loader, args, stop, mixup, writer)
        save('checkpoint.pth')  # now, so that nothing that happens during the evaluation costs the epoch
        # Evaluated once, with the first epoch of the run.
        teacher = criterion.teacher if training.max_accuracy < 0 else None
        test_stats = None if stopped else evaluate_all(args, training, loader_val, stop, teacher)
        if test_stats is None:
            print(f'stopped by a signal in epoch {training.epoch} after batch {training.step} of {batches}, '
                  + ('--resume auto continues from there' if args.output_dir else 'nothing saved without --output_dir'))
            return
        is_best = test_stats['test_acc1'] > training.max_accuracy
        training.max_accuracy = max(training.max_accuracy, test_stats['test_acc1'])
        print(f'Max accuracy: {training.max_accuracy:.2f}%')
        training.end_epoch()
        if output:
            stats = {f'train_{name}': value for name, value in train_stats.items()} | test_stats
            with (output / 'log.txt').open('a') as log:
                log.write(json.dumps(stats | {'epoch': epoch, 'n_parameters': args.n_parameters}) + '\n')
            quantizers = diagnostics.measure()
            write_epoch(writer, test_stats, quantizers, training.epoch * batches)
            for line in warning_lines(training.model, quantizers, training.epoch / args.epochs):
                print(line)
        save(*(['best_checkpoint.pth'] if is_best else []), 'checkpoint.pth')
        if output:
            write_model_card(output, training.model, about, args, images=len(loader_val.dataset))
    print(f'Training time {timedelta(seconds=int(time.monotonic() - started))}')


def evaluate_all(args: Namespace, training: Training, loader: DataLoader, stop: StopRequest, teacher: Teacher | None,
                 ) -> dict[str, float] | None:
    """The statistics of the network (test_), its average (test_ema_) and the teacher (teacher_); None if stopped."""
    ema, device = training.ema, training.device
    predictors = [('teacher', lambda images: teacher(images)[0])] if teacher is not None else []
    predictors += [('test', training.model)] + ([('test_ema', ema.module)] if ema is not None else [])
    found: dict[str, float] = {}
    for name, predict in predictors:
        if name == 'test_ema':
            predict.to(device)  # with --model-ema-force-cpu only now
        stats = evaluate_and_say(name, predict, loader, device, args, stop)
        if name == 'test_ema' and args.model_ema_force_cpu:
            predict.to('cpu')
        if stats is None:
            return None
        found |= {f'{name}_{key}': value for key, value in stats.items()}
    return found
