"""One epoch of training, evaluation, and the state of a training run that its checkpoints hold."""

import statistics
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import Mixup
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from _quan_base import ActQ, clamp_steps_, named_quantizers
from checkpoints import load_quantized
from losses import DistillationLoss
from quant_vision_transformer import QAttention
from utils import DivergedError, MetricLogger, StopRequest, UserError, any_rank, plain_args, rng_states, set_rng_state

AMP_DTYPES = {'none': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}
# Flags that the learning rate of an epoch follows from.
SCHEDULE_FLAGS = ('sched', 'epochs', 'cooldown_epochs', 'warmup_epochs', 'warmup_lr', 'min_lr', 'decay_epochs',
                  'decay_rate', 'lr_noise', 'lr_noise_pct', 'lr_noise_std', 'scaled_lr')
# Flags that a position within an epoch depends on.
POSITION_FLAGS = ('batch_size', 'world_size', 'grad_accum_steps', 'repeated_aug', 'seed', 'data_set')


def autocast(device: torch.device, amp: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=AMP_DTYPES[amp], enabled=amp != 'none')


def build_scheduler(args: Namespace, optimizer: torch.optim.Optimizer) -> Scheduler:
    """The learning rate schedule by epochs."""
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=args.sched, num_epochs=args.epochs, decay_epochs=args.decay_epochs,
        decay_rate=args.decay_rate, min_lr=args.min_lr, warmup_lr=args.warmup_lr, warmup_epochs=args.warmup_epochs,
        noise=args.lr_noise, noise_pct=args.lr_noise_pct, noise_std=args.lr_noise_std, noise_seed=args.seed)
    return scheduler


@dataclass
class Training:
    """All that training changes.

    Attributes:
        model: the network outside any wrapper.
        epoch: the epoch in progress, or the next one.
        step: batches done of it. All of them: its evaluation is still due.
        max_accuracy: best top-1 so far, in percent.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    device: torch.device
    epoch: int = 0
    step: int = 0
    max_accuracy: float = 0.

    def update(self, clip_grad: float | None) -> None:
        """One step of the optimizer by the gradients of the model, which are cleared."""
        self.scaler.unscale_(self.optimizer)
        if clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        clamp_steps_(self.model)
        if self.ema is not None:
            self.ema.update(self.model)

    def end_epoch(self) -> None:
        # The schedule is asked for the epoch that ended, not for the next one: DeiT does so, and with it the published
        # runs. The first two epochs share one learning rate.
        self.scheduler.step(self.epoch)
        self.epoch, self.step = self.epoch + 1, 0

    def checkpoint(self, args: Namespace, about: dict[str, Any]) -> dict[str, Any]:
        """The file's contents. A collective.

        Args:
            about: `checkpoints.description` of the network.
        """
        # 'epoch' counts as in released files: the last complete epoch, or the one that `step` batches of are done.
        state = {'model': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
                 'lr_scheduler': self.scheduler.state_dict(), 'epoch': self.epoch if self.step else self.epoch - 1,
                 'scaler': self.scaler.state_dict(), 'args': plain_args(args), 'qvit': about, 'step': self.step,
                 'max_accuracy': self.max_accuracy, 'rng': rng_states(self.device)}
        if self.ema is not None:
            state['model_ema'] = self.ema.module.state_dict()
        return state

    def resume(self, checkpoint: dict[str, Any], args: Namespace) -> list[str]:
        """Continues from a checkpoint, whose network must have been loaded: what it says of the rest of the state.

        Returns:
            What could not be taken, a line each.

        Raises:
            UserError: it was written within an epoch whose batches would be others now.
        """
        saved = vars(checkpoint['args']) if isinstance(checkpoint.get('args'), Namespace) else {}
        is_own, notes = 'qvit' in checkpoint, []
        self.step = checkpoint.get('step', 0)
        self.epoch = checkpoint.get('epoch', -1) + (self.step == 0)
        self.max_accuracy = checkpoint.get('max_accuracy', 0.)
        if 'epoch' not in checkpoint:
            notes.append('epoch: not in the checkpoint, training starts with epoch 0')
        changed = _changed(POSITION_FLAGS, saved, args)
        if self.step and changed:
            raise UserError(f'the checkpoint lies within epoch {self.epoch}, which continues only with the same '
                            f'{", ".join(changed)}: pass these as before')

        other_opt = _changed(('opt',), saved, args) if is_own else ['not written by this code']
        changed = _changed(SCHEDULE_FLAGS, saved, args) if is_own else ['not written by this code']
        notes += self._resume_optimizer(checkpoint.get('optimizer'), other_opt, keep_lr=not changed)
        if not changed:
            self.scheduler.load_state_dict(checkpoint['lr_scheduler'])
        else:
            notes.append(f'lr_scheduler: not taken ({", ".join(changed)}), the learning rate follows from the epoch '
                         'and the flags of this run')
            if self.epoch:
                self.scheduler.step(self.epoch - 1)

        if self.scaler.is_enabled():
            if checkpoint.get('scaler'):
                self.scaler.load_state_dict(checkpoint['scaler'])
            else:
                notes.append('scaler: not in the checkpoint, the loss scale starts anew')
        if self.ema is not None:
            if checkpoint.get('model_ema'):
                load_quantized(self.ema.module, {'model': checkpoint['model_ema']})
            else:
                self.ema.set(self.model)
                notes.append('model_ema: not in the checkpoint, the average starts from the model')
        elif checkpoint.get('model_ema'):
            notes.append('model_ema: not taken without --model-ema')
        if len(checkpoint.get('rng', ())) == args.world_size:
            set_rng_state(checkpoint['rng'][args.rank], self.device)
        else:
            notes.append(f'rng: no random states of {args.world_size} processes in the checkpoint, drop path and mixup '
                         'differ from those of an uninterrupted run')
        return notes

    def _resume_optimizer(self, state: dict[str, Any] | None, misfits: list[str], keep_lr: bool) -> list[str]:
        flags = ('weight_decay', 'initial_lr', 'betas', 'eps', 'momentum', *(() if keep_lr else ('lr',)))
        wanted = [{name: group[name] for name in flags if name in group} for group in self.optimizer.param_groups]
        try:
            if state is None or misfits:
                raise ValueError(', '.join(misfits) or 'not in the checkpoint')
            self.optimizer.load_state_dict(state)
        except (KeyError, ValueError) as error:
            return [f'optimizer: not taken ({" ".join(str(error).split())}), its moments start from zero']
        for group, values in zip(self.optimizer.param_groups, wanted, strict=True):
            group.update(values)  # flags win over the file, which differs from them only where the user changed them
        return []


def _changed(names: Iterable[str], saved: dict[str, Any], args: Namespace) -> list[str]:
    """The flags whose values differ from those in the checkpoint."""
    now = vars(plain_args(args))
    return [f'--{name.replace("_", "-")}' for name in names if saved.get(name) != now[name]]


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
        with nullcontext() if is_update else _without_all_reduce(network):
            with autocast(device, args.amp):
                outputs = network(images, **return_qk)
                outputs, qk = outputs if return_qk else (outputs, None)
                parts = criterion(images, outputs, labels, qk)
            training.scaler.scale(parts['loss'] / batches).backward()
        if is_update:
            training.update(args.clip_grad)
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


# --- quantizers in the log --------------------------------------------------------------------------------------------


@torch.no_grad()
def quantizer_statistics(model: nn.Module, images: Tensor) -> dict[str, dict[str, float]]:
    """Mean step, mean zero point and share of clipped values of every quantizer, by its name.

    One forward in evaluation mode, with hooks; a layer appears as `<layer>` (weight) and `<layer>.act` (input).
    """
    found: dict[str, dict[str, Tensor]] = {}
    names = {module: name for name, module in model.named_modules()}

    def note(name: str, quantizer: nn.Module, x: Tensor) -> None:
        axis = 0 if not isinstance(quantizer, ActQ) else 1 if x.ndim == 4 else x.ndim - 1
        shape = [-1 if i == axis else 1 for i in range(x.ndim)]
        position = x / quantizer.alpha.view(shape)
        found[name] = {'step': quantizer.alpha.mean()}
        if isinstance(quantizer, ActQ):
            position = position + quantizer.zero_point.round().view(shape)
            found[name]['zero_point'] = quantizer.zero_point.mean()
        low, high = quantizer.code_range
        found[name]['clipped'] = ((position < low) | (position > high)).float().mean()

    def of_layer(layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        note(names[layer], layer, layer.weight)
        note(names[layer.act], layer.act, inputs[0])

    def of_attention(attention: QAttention, inputs: tuple[Tensor, ...], output: tuple) -> None:
        _, (q, k) = output                                                                       # (B, H, N, d) each
        v = attention.qkv(inputs[0])[..., 2 * attention.num_heads * attention.head_dim:]         # (B, N, H d)
        v = v.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)           # (B, H, N, d)
        probabilities = (attention.q_act(q) @ attention.k_act(k).mT * attention.scale).softmax(dim=-1)
        for name, x in (('q_act', q), ('k_act', k), ('v_act', v), ('attn_act', probabilities)):
            note(f'{names[attention]}.{name}', getattr(attention, name), x)

    hooks = [module.register_forward_hook(of_layer) for _, module in named_quantizers(model)
             if not isinstance(module, ActQ)]
    hooks += [module.register_forward_hook(of_attention) for module in model.modules()
              if isinstance(module, QAttention) and module.quantize_attn]
    was_training = model.training
    try:
        model.eval().forward(images)  # not __call__, which may be compiled without the hooks
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    measured = [value for entry in found.values() for value in entry.values()]
    values = iter(torch.stack(measured).tolist() if measured else [])
    return {name: {what: next(values) for what in entry} for name, entry in found.items()}
