"""Calibration by block-wise reconstruction: each block learns, without labels, to give what full precision gives.

After its closed forms (`calibration.closed_form`) all of a block learns by gradient: weights, biases, LayerNorms,
scales and zero points. Its inputs are those of the network that is quantized so far, its target is the full-precision
network's stream behind the block, so that it also makes up for what the blocks before it have lost (block-wise
reconstruction: Li et al., BRECQ, ICLR 2021, arXiv 2102.05426).

What an error costs is told by `calibration.importance`.
"""
from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from _quan_base import LinearQ, clamp_steps_, named_quantizers
from calibration.closed_form import check_kind, fit_block, fit_embedding, fit_heads, fit_transition, synchronize
from calibration.full_precision import FullPrecision, transitions
from calibration.importance import fisher_information, information_root, weighted_error
from calibration.twins import halve_attention_to_twins
from checkpoints.files import read_checkpoint, write_checkpoint
from quant_vision_transformer import QBlock, QVisionTransformer
from utils import MetricLogger, UserError, take_from_rank_0

__all__ = ['Reconstruction', 'reconstruct']

FITTED = 128  # images of the closed forms, and of the Fisher information
HELD_OUT = 1 / 8  # of the images: a block that gets no better on them keeps its closed forms
# Learning rates of Adam: of weights and scales in units of the mean scale of their quantizer, of zero points in codes,
# of biases and LayerNorms in units of their mean size, or 0.1.
RATES = {'weight': 0.01, 'scale': 0.005, 'zero_point': 0.01, 'other': 0.001}
CHUNK = 32  # images at a time where nothing is learned


@dataclass(frozen=True)
class Reconstruction:
    """How long and on what a block learns.

    Attributes:
        epochs: how often a block sees each image.
        batch_size: images of an update.
        seed: of the order of the images, and of the labels that the network draws.
    """
    epochs: int = 3
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
def _learning(block: QBlock) -> Iterator[None]:
    """Lets the quantizers of a block learn, while nothing is dropped."""
    drop, block.mlp.fc2.drop = block.mlp.fc2.drop, 0.
    for _, quantizer in named_quantizers(block):
        quantizer.training = True
    try:
        yield
    finally:
        block.mlp.fc2.drop = drop
        block.eval()


@torch.no_grad()
def _through(block: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([block(chunk) for chunk in x.split(CHUNK)])


def _refine(block: QBlock, x: Tensor, target: Tensor, root: Tensor, config: Reconstruction, seed: int,
            logger: MetricLogger) -> None:
    """Lets a block learn to turn x into the target, both (images, N, dim)."""
    split = _learned_from(len(x))
    start = {name: value.clone() for name, value in block.state_dict().items()}

    def held_out_error() -> float:
        return weighted_error(_through(block, x[split:]) - target[split:], root).item()

    before = held_out_error()
    optimizer = torch.optim.Adam(_parameter_groups(block), betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(split, generator=generator) for _ in range(config.epochs)])
    batches = order.split(config.batch_size)
    with _learning(block), torch.enable_grad():
        for update, drawn in enumerate(batches):
            share = min(1., (update + 1) / 20) * (1 + math.cos(math.pi * update / len(batches))) / 2
            for group in optimizer.param_groups:
                group['lr'] = share * group['initial_lr']
            drawn = drawn.to(x.device)
            loss = weighted_error(block(x[drawn]) - target[drawn], root)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clamp_steps_(block)
            logger.update(error=loss.detach())
            if logger.end_batch() and update < len(batches) - 1:
                logger.read()
                logger.print_line()
    optimizer.zero_grad()
    after = held_out_error()
    if not after < before:  # also where it is NaN
        block.load_state_dict(start)
        after = before
    logger.update(held_out_before=before, held_out_after=after)
    logger.read()
    logger.print_line()


def _learned_from(images: int) -> int:
    """How many of the images a block learns from; the others are held out."""
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
    done = _resume(model, progress, key)
    if not done:
        fit_embedding(model, fitted)
    embedded = [(full.embed(chunk), model.embed(chunk))
                for chunk in (part.to(device) for part in images.split(CHUNK))]
    x_full, x = (torch.cat(parts) for parts in zip(*embedded, strict=True))
    updates = math.ceil(config.epochs * _learned_from(len(images)) / config.batch_size)
    logger = MetricLogger('Calibration:', full.depth * updates, max(1, updates // 4), device, done * updates)
    merging = transitions(model)
    for index, block in enumerate(model.blocks):
        if index in merging:
            if index >= done:
                fit_transition(merging[index], x_full[:FITTED], x[:FITTED])
            x_full = torch.cat([full.transition(index, chunk) for chunk in x_full.split(CHUNK)])
            x = _through(merging[index], x)
        target = torch.cat([full.block(index, chunk) for chunk in x_full.split(CHUNK)])
        if index >= done:
            fit_block(block, x_full[:FITTED], x[:FITTED], full.has_irm)
            _refine(block, x, target, information_root(information[index], x.shape[1]), config,
                    config.seed * full.depth + index, logger)
            synchronize(block)
            _keep(model, progress, key, index + 1)
        x_full, x = target, _through(block, x)
    fit_heads(model, x[:FITTED])
    synchronize(model)
    model.train(was_training)
    if progress is not None and _is_first():
        progress.unlink(missing_ok=True)


# --- an interrupted calibration ---------------------------------------------------------------------------------------


def _is_first() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _fingerprint(model: nn.Module, images: Tensor, config: Reconstruction) -> str:
    """What a calibration follows from."""
    found = hashlib.sha256(f'{config} {[quantizer.extra_repr() for _, quantizer in named_quantizers(model)]}'.encode())
    for tensor in (*model.state_dict().values(), images):
        found.update(tensor.detach().cpu().contiguous().numpy())
    return found.hexdigest()


def _keep(model: nn.Module, progress: Path | None, key: str, blocks: int) -> None:
    if progress is not None and _is_first():
        progress.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint({'calibration': key, 'blocks': blocks, 'model': model.state_dict()}, progress)


def _resume(model: nn.Module, progress: Path | None, key: str) -> int:
    """How many blocks are finished; the network gets their state where there are any, on all ranks."""
    blocks = torch.zeros(1, dtype=torch.int64, device=next(model.parameters()).device)
    if progress is not None and _is_first() and progress.is_file():
        kept = read_checkpoint(progress)
        if kept.get('calibration') == key:
            model.load_state_dict(kept['model'])
            blocks.fill_(kept['blocks'])
            print(f'{progress}: {kept["blocks"]} of {len(model.blocks)} blocks are calibrated already')
    take_from_rank_0(blocks)
    synchronize(model)
    return int(blocks)
