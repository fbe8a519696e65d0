"""Calibration by reconstruction: blocks, then the network, learn without labels to give what full precision gives.

After its closed forms (`calibration.closed_form`) all of a block learns by gradient: weights, biases, LayerNorms,
scales and zero points. Its inputs are those of the network that is quantized so far, its target is the full-precision
network's stream behind the block, so that it also makes up for what the blocks before it have lost (block-wise
reconstruction: Li et al., BRECQ, ICLR 2021, arXiv 2102.05426).

What an error costs is told by `calibration.importance`. At the end the later half of the blocks learns, all together,
to give the class probabilities of the full-precision network (Hinton et al., arXiv 1503.02531). Each time they see
another view of an image: from the images themselves they would learn what holds for them alone.
"""
from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from _quan_base import LinearQ, clamp_steps_, named_quantizers
from calibration.closed_form import check_kind, fit_block, fit_embedding, fit_heads, fit_transition, synchronize
from calibration.full_precision import FullPrecision, transitions
from calibration.importance import fisher_information, information_root, weighted_error
from calibration.twins import halve_attention_to_twins
from calibration.views import view_of
from checkpoints.files import read_checkpoint, write_checkpoint
from quant_vision_transformer import QBlock, QVisionTransformer
from utils import MetricLogger, UserError, take_from_rank_0

__all__ = ['Reconstruction', 'reconstruct']

FITTED = 128  # images of the closed forms, and of the Fisher information
HELD_OUT = 1 / 8  # of the images: what gets no better on them is undone
# Learning rates of Adam: of weights and scales in units of the mean scale of their quantizer, of zero points in codes,
# of biases and LayerNorms in units of their mean size, or 0.1.
RATES = {'weight': 0.01, 'scale': 0.005, 'zero_point': 0.01, 'other': 0.001}
TUNING_RATE = 0.3  # of these rates, for blocks that learn together
CHUNK = 32  # images at a time where nothing is learned
KEPT_EVERY = 25  # updates of blocks that learn together


@dataclass(frozen=True)
class Reconstruction:
    """How long blocks learn.

    Attributes:
        epochs: how often a block sees each image.
        tuning: how often the later blocks together then see a view of each image.
        batch_size: images of an update of one block; of the later blocks together twice as many.
        seed: of the order of the images, their views, and the labels that the network draws.
    """
    epochs: int = 2
    tuning: int = 3
    batch_size: int = 8
    seed: int = 0


# --- one block --------------------------------------------------------------------------------------------------------


def _parameter_groups(block: QBlock) -> list[dict[str, Any]]:
    """A group for every parameter, with its rate at the start."""
    groups = []
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            size = parameter.detach().abs().mean().item()
            if name == 'alpha':
                rate = RATES['scale'] * size
            elif name == 'zero_point':
                rate = RATES['zero_point']
            elif name == 'weight' and isinstance(module, LinearQ):
                rate = RATES['weight'] * module.scale.mean().item()
            else:
                rate = RATES['other'] * max(size, 0.1)
            groups.append({'params': [parameter], 'lr': rate, 'initial_lr': rate})
    return groups


@contextmanager
def _learning(blocks: Sequence[QBlock]) -> Iterator[None]:
    """Lets the quantizers of blocks learn, while nothing is dropped."""
    drops = [block.mlp.fc2.drop for block in blocks]
    for block in blocks:
        block.mlp.fc2.drop = 0.
        for _, quantizer in named_quantizers(block):
            quantizer.training = True
    try:
        yield
    finally:
        for block, drop in zip(blocks, drops, strict=True):
            block.mlp.fc2.drop = drop
            block.eval()


@torch.no_grad()
def _through(block: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([block(chunk) for chunk in x.split(CHUNK)])


class _Learner:
    """Blocks that learn, and how far they are.

    Args:
        images, epochs, batch_size, seed: how many there are, how often each is seen, and in what batches and order.
        rate: in units of RATES.

    Attributes:
        batches: indices of the images of each update.
        update: how many are done.
    """

    def __init__(self, blocks: Sequence[QBlock], images: int, epochs: int, batch_size: int, seed: int, rate: float = 1.,
                 ) -> None:
        groups = [group for block in blocks for group in _parameter_groups(block)]
        for group in groups:
            group['initial_lr'] *= rate
        generator = torch.Generator().manual_seed(seed)
        order = [torch.randperm(images, generator=generator) for _ in range(epochs)]
        self.batches = torch.cat(order).split(batch_size) if epochs else ()
        self.blocks, self.optimizer, self.update = blocks, torch.optim.Adam(groups, betas=(0.9, 0.99)), 0

    def learn(self, loss_of: Callable[[int, Tensor], Tensor], logger: MetricLogger, last: int) -> None:
        """Updates until `last` of them are done. loss_of: number of the update and indices of its images -> loss."""
        count = len(self.batches)
        with _learning(self.blocks), torch.enable_grad():
            while self.update < last:
                share = min(1., (self.update + 1) / 20) * (1 + math.cos(math.pi * self.update / count)) / 2
                for group in self.optimizer.param_groups:
                    group['lr'] = share * group['initial_lr']
                loss = loss_of(self.update, self.batches[self.update])
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                for block in self.blocks:
                    clamp_steps_(block)
                self.update += 1
                logger.update(error=loss.detach())
                if logger.end_batch() and self.update < count:
                    logger.read()
                    logger.print_line()
        self.optimizer.zero_grad()


@contextmanager
def _frozen(model: nn.Module, learner: _Learner) -> Iterator[None]:
    """Keeps all but what learns from asking for gradients."""
    learned = {parameter for group in learner.optimizer.param_groups for parameter in group['params']}
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in learned]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _keep_better(module: nn.Module, start: dict[str, Tensor], before: float, after: float, logger: MetricLogger,
                 ) -> None:
    """Takes back what was learned, unless the held-out images have less error for it; says so."""
    if not after < before:  # also where it is NaN
        module.load_state_dict(start)
        after = before
    logger.update(held_out_before=before, held_out_after=after)
    logger.read()
    logger.print_line()


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _refine(block: QBlock, x: Tensor, target: Tensor, root: Tensor, config: Reconstruction, seed: int,
            logger: MetricLogger) -> None:
    """Lets a block learn to turn x into the target, both (images, N, dim)."""
    split = _learned_from(len(x))

    def held_out_error() -> float:
        return weighted_error(_through(block, x[split:]) - target[split:], root).item()

    def loss_of(update: int, drawn: Tensor) -> Tensor:
        drawn = drawn.to(x.device)
        return weighted_error(block(x[drawn]) - target[drawn], root)

    start, before = _copied(block), held_out_error()
    learner = _Learner([block], split, config.epochs, config.batch_size, seed)
    learner.learn(loss_of, logger, len(learner.batches))
    _keep_better(block, start, before, held_out_error(), logger)


def _learned_from(images: int) -> int:
    """How many of the images are learned from; the others are held out."""
    return images - max(1, round(HELD_OUT * images))


# --- the network ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def reconstruct(model: QVisionTransformer, images: Tensor, config: Reconstruction = Reconstruction(),
                progress: Path | None = None) -> None:
    """Quantizes a network that holds full-precision weights, block by block.

    Ranks, modes and random state as for `calibrate_to_full_precision`: the result follows from weights, images and
    `config` alone.

    Args:
        model: the unwrapped network, on the device to compute on.
        images: (B, 3, H, W), 32 or more, on any device.
        progress: a file that keeps the finished blocks; an interrupted calibration continues from it. It is
            removed at the end.

    Raises:
        UserError: a network of another kind, or fewer images than a batch.
        ValueError: NaN or infinite values were met.
    """
    check_kind(model)
    if len(images) < 2 * config.batch_size:
        raise UserError(f'--calibration reconstruct needs at least {2 * config.batch_size} images, not {len(images)}: '
                        'raise --calibration-images, or choose --calibration mse')
    device = next(model.parameters()).device
    synchronize(model)
    was_training = model.training
    model.eval()
    key = '' if progress is None else _fingerprint(model, images, config)
    fitted = images[:FITTED].to(device)
    halve_attention_to_twins(model, fitted)
    full = FullPrecision(model)
    information = fisher_information(full, fitted, config.seed)
    kept = _Progress(model, progress, key)
    if not kept.blocks:
        fit_embedding(model, fitted)
    embedded = [(full.embed(chunk), model.embed(chunk))
                for chunk in (part.to(device) for part in images.split(CHUNK))]
    x_full, x = (torch.cat(parts) for parts in zip(*embedded, strict=True))
    updates = math.ceil(config.epochs * _learned_from(len(images)) / config.batch_size)
    logger = MetricLogger('Calibration:', full.depth * updates, max(1, updates // 4), device, kept.blocks * updates)
    merging = transitions(model)
    for index, block in enumerate(model.blocks):
        if index in merging:
            if index >= kept.blocks:
                fit_transition(merging[index], x_full[:FITTED], x[:FITTED])
            x_full = torch.cat([full.transition(index, chunk) for chunk in x_full.split(CHUNK)])
            x = _through(merging[index], x)
        target = torch.cat([full.block(index, chunk) for chunk in x_full.split(CHUNK)])
        if index >= kept.blocks:
            fit_block(block, x_full[:FITTED], x[:FITTED], full.has_irm)
            _refine(block, x, target, information_root(information[index], x.shape[1]), config,
                    config.seed * full.depth + index, logger)
            synchronize(block)
            if index == full.depth - 1:
                fit_heads(model, _through(block, x[:FITTED]))
            kept.keep(index + 1)
        x_full, x = target, _through(block, x)
    _tune(model, full, images, full.head(x_full[_learned_from(len(images)):]), config, kept)
    synchronize(model)
    model.train(was_training)
    kept.remove()


def _tune(model: QVisionTransformer, full: FullPrecision, images: Tensor, wanted: Tensor, config: Reconstruction,
          kept: _Progress) -> None:
    """Lets the later half of the blocks learn the full-precision network's class probabilities.

    Early blocks would lose more by the rates at which the later ones gain: what they give is used everywhere.

    Args:
        wanted: the full-precision network's logits of the held-out images.
    """
    split, device = _learned_from(len(images)), next(model.parameters()).device
    learner = _Learner(model.blocks[full.depth // 2:], split, config.tuning, 2 * config.batch_size, config.seed,
                       TUNING_RATE)
    count = len(learner.batches)
    if not count:
        return
    logger = MetricLogger('Tuning:', count, KEPT_EVERY, device, kept.update)

    def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
        return F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction='batchmean')

    def loss_of(update: int, drawn: Tensor) -> Tensor:
        views = view_of(images[drawn], config.seed * count + update).to(device)
        with torch.no_grad():
            target = full(views)
        return divergence(model(views), target)

    def held_out_error() -> float:
        return divergence(torch.cat([model(chunk.to(device)) for chunk in images[split:].split(CHUNK)]), wanted).item()

    start, before = _copied(model), held_out_error()
    kept.continue_learning(learner)
    with _frozen(model, learner):
        while learner.update < count:
            learner.learn(loss_of, logger, min(learner.update + KEPT_EVERY, count))
            kept.keep(full.depth, learner)
    _keep_better(model, start, before, held_out_error(), logger)


# --- an interrupted calibration ---------------------------------------------------------------------------------------


def _is_first() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _fingerprint(model: nn.Module, images: Tensor, config: Reconstruction) -> str:
    """What a calibration follows from."""
    found = hashlib.sha256(f'{config} {[quantizer.extra_repr() for _, quantizer in named_quantizers(model)]}'.encode())
    for tensor in (*model.state_dict().values(), images):
        found.update(tensor.detach().cpu().contiguous().numpy())
    return found.hexdigest()


class _Progress:
    """The file of an interrupted calibration, if any: finished blocks, then the updates of the later ones together.

    Attributes:
        blocks: how many are finished; the network then has their state, on all ranks.
        update: how many of the later blocks together are done.
    """

    def __init__(self, model: QVisionTransformer, path: Path | None, key: str) -> None:
        self.model, self.path, self.key = model, path, key
        self.finished, self.tuned = {}, {}
        place = torch.zeros(2, dtype=torch.int64, device=next(model.parameters()).device)
        if path is not None and _is_first() and path.is_file():
            held = read_checkpoint(path)
            if held.get('calibration') == key:
                self.finished, self.tuned = held['model'], held['tuned']
                model.load_state_dict(self.finished)
                place[0], place[1] = held['blocks'], self.tuned.get('update', 0)
                print(f'{path}: {held["blocks"]} of {len(model.blocks)} blocks are calibrated already')
        take_from_rank_0(place)
        synchronize(model)
        self.blocks, self.update = place.tolist()

    def keep(self, blocks: int, learner: _Learner | None = None) -> None:
        """Notes finished blocks, or the place of a learner of several."""
        if self.path is None or not _is_first():
            return
        if learner is None:
            self.finished = _copied(self.model)
        else:
            self.tuned = {'update': learner.update, 'model': self.model.state_dict(),
                          'optimizer': learner.optimizer.state_dict()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint({'calibration': self.key, 'blocks': blocks, 'model': self.finished, 'tuned': self.tuned},
                         self.path)

    def continue_learning(self, learner: _Learner) -> None:
        """Brings network and learner to where the file has them."""
        if self.tuned:
            self.model.load_state_dict(self.tuned['model'])
            learner.optimizer.load_state_dict(self.tuned['optimizer'])
        learner.update = self.update
        synchronize(self.model)

    def remove(self) -> None:
        if self.path is not None and _is_first():
            self.path.unlink(missing_ok=True)
