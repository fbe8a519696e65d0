"""Campaigns on files of networks: training checkpoints, packed files, stored labels."""
from __future__ import annotations

import argparse
import functools
import io
import json
import math
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch

import cost
import hubconf
import main
from _quan_base import clamp_steps_
from analysis.model_card import write_model_card
from calibration.first_batch import calibrate
from checkpoints import packed
from checkpoints.files import read_checkpoint
from checkpoints.full_precision import load_full_precision
from checkpoints.networks import ModelInfo, load_quantized, network_info, open_network
from datasets import Digits
from deployment import packing, predictor
from losses import SoftLabels
from model_card import write_card_of
from training.data import DataSource, build_train_dataset
from training.methods.oscillation import OscillationConfig, Oscillations
from training.methods.soft_labels import StoredLabels, fingerprint, raw_image
from training.networks import build_teacher
from training.optimizer import OptimizerConfig
from training.resumption import Position, resume
from training.schedule import ScheduleConfig
from training.state import Averaging, Training, build_training
from utils import Ranks, pick

from . import mutations

CPU = torch.device('cpu')
NAME = 'fourbits_deit_tiny_patch16_224'
SHAPE = {'embed_dim': 24, 'depth': 1, 'num_heads': 2, 'patch_size': 8}
INFO = ModelInfo(NAME, SHAPE, 10, 16, Digits.classes, 'DIGITS')
FLAGS = {'opt': 'adamw', 'epochs': 3, 'warmup_epochs': 0, 'seed': 0, 'batch_size': 2, 'world_size': 1,
         'grad_accum_steps': 1, 'repeated_aug': True, 'data_set': 'DIGITS', 'lr_noise': None}


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def new_network() -> torch.nn.Module:
    model = timm.create_model(NAME, img_size=16, num_classes=10, **SHAPE)
    calibrate(model, images())
    return model


def new_training(model: torch.nn.Module) -> Training:
    return build_training(model, CPU, pick(OptimizerConfig, FLAGS), pick(ScheduleConfig, FLAGS), Averaging(True),
                          [Oscillations(model, OscillationConfig(0.1))])


def update(training: Training) -> None:
    """An update and what follows it, which meets whatever was taken from a file."""
    outputs = training.model.train()(images())
    (sum(output.square().sum() for output in outputs)).backward()
    training.update(None, 0.5)
    clamp_steps_(training.model)
    training.end_epoch()


@functools.cache
def sound() -> bytes:
    """The file of a run after two updates."""
    torch.manual_seed(0)
    training = new_training(new_network())
    update(training)
    update(training)
    flags = vars(main.plain(main.parse_args([]))) | FLAGS | SHAPE
    buffer = io.BytesIO()
    torch.save(training.checkpoint(argparse.Namespace(**flags), INFO), buffer)
    return buffer.getvalue()


@functools.cache
def sound_contents() -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(io.BytesIO(sound()), weights_only=True)


# --- training checkpoints ---------------------------------------------------------------------------------------------


def _resume(path: Path) -> None:
    checkpoint = read_checkpoint(path)
    network_info(path, checkpoint)
    model = new_network()
    load_quantized(model, checkpoint)
    training = new_training(model)
    resume(training, checkpoint, pick(Position, FLAGS), pick(OptimizerConfig, FLAGS), pick(ScheduleConfig, FLAGS),
           Ranks(), batches=4)
    update(training)
    buffer = io.BytesIO()
    torch.save(training.checkpoint(argparse.Namespace(), INFO), buffer)


def _predict(path: Path) -> None:
    opened = predictor.open_quantized(path)
    predictor.likeliest(opened.model, images()[0], predictor.class_names(opened.info), 3)
    for _, name in predictor.likeliest(opened.model, images()[0], predictor.class_names(opened.info), 3):
        print(name)


def _finetune(path: Path) -> None:
    for note in load_full_precision(new_network(), read_checkpoint(path)):
        print(note)


def _teacher(path: Path) -> None:
    build_teacher(None, str(path), 10, 16, 'DIGITS').eval()(images())


def _command(call: Callable, *flags: object) -> Callable[[], None]:
    """A command line, whose status is 0, or 2 with one line that says why."""
    def run() -> None:
        status = call(list(map(str, flags)))
        assert status in (0, 1, 2), status
    return run


def _hub(path: Path) -> None:
    getattr(hubconf, NAME)(checkpoint=str(path))


READERS: dict[str, Callable[[Path], Any]] = {
    'resume': _resume, 'predict': _predict, 'finetune': _finetune, 'teacher': _teacher, 'card': lambda path:
    write_card_of(path, 10), 'pack': lambda path: packing.pack(str(path)), 'hub': _hub,
    'cost': lambda path: cost.rows(cost.get_args_parser().parse_args(['--checkpoint', str(path)]))}


def checkpoints(rng: random.Random, folder: Path) -> tuple[str, Callable[[], object]]:
    """An entry of a training checkpoint is missing or another value."""
    parts = ['qvit', 'optimizer', 'scaler', 'args', 'epoch', 'rng', 'model', 'model', 'step', 'max_accuracy',
             'lr_scheduler', 'model_ema', 'oscillations']
    state, said = sound_contents(), []
    for _ in range(rng.choice([1, 1, 2])):
        part = rng.choice([part for part in parts if part in state])
        state, what = mutations.mutated(rng, state, (part,))
        said.append(what)
    reader = rng.choice(['resume', *READERS])
    path = folder / 'file.pth'
    try:
        torch.save(state, path)
    except (RecursionError, UnicodeEncodeError, NotImplementedError, RuntimeError):
        torch.save({'model': mutations.deep(list, 100)}, path)
    return f'{reader} of {", ".join(said)}', lambda: READERS[reader](path)


def _rezipped(data: bytes, pickled: bytes | None, method: int) -> bytes:
    """The archive with another pickle, or compressed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, 'w', method) as new:
        for name in old.namelist():
            new.writestr(name, pickled if pickled is not None and name.endswith('data.pkl') else old.read(name))
    return out.getvalue()


def nested_pickle(levels: int) -> bytes:
    """A dict of lists that are nested so many times."""
    return b'\x80\x02}X\x05\x00\x00\x00model' + b']' * levels + b'a' * (levels - 1) + b's.'


def _same(path: Path) -> None:
    """A damaged file that is taken holds what the sound one held."""
    state = read_checkpoint(path)['model']
    open_network(path)
    for name, value in sound_contents()['model'].items():
        assert torch.equal(state[name], value), f'{name} is another and was taken'


def checkpoint_bytes(rng: random.Random, folder: Path) -> tuple[str, Callable[[], object]]:
    """The bytes of a training checkpoint are damaged, or its archive is a forged one."""
    path, kind = folder / 'file.pth', rng.random()
    if kind < 0.05:
        levels = rng.choice([100, 5000, 10 ** 5])
        data, said = _rezipped(sound(), nested_pickle(levels), 0), f'{levels} levels'
    elif kind < 0.08:
        bomb = b'\x80\x02}X\x05\x00\x00\x00model' + b'X' + (2 ** 31 - 1).to_bytes(4, 'little') + b'a' * 2 ** 20 + b's.'
        data, said = _rezipped(sound(), bomb, zipfile.ZIP_DEFLATED), 'a long text'
    elif kind < 0.1:
        out = io.BytesIO(_rezipped(sound(), None, zipfile.ZIP_DEFLATED))
        with zipfile.ZipFile(out, 'a', zipfile.ZIP_DEFLATED) as archive:
            archive.writestr('archive/data/999', bytes(2 ** 28))
        data, said = out.getvalue(), 'compressed'
    else:
        data, said = mutations.altered_bytes(rng, sound())
    path.write_bytes(data)
    return said, lambda: _same(path)


# --- packed files -----------------------------------------------------------------------------------------------------


@functools.cache
def sound_packed(folder: Path = Path('/tmp')) -> bytes:
    path = folder / f'fuzz.{id(folder)}.safetensors'
    model = new_network()
    model.load_state_dict(sound_contents()['model'])
    packed.write_packed(model, INFO, path)
    data = path.read_bytes()
    path.unlink()
    return data


def packed_files(rng: random.Random, folder: Path) -> tuple[str, Callable[[], object]]:
    """The description or a tensor of a packed file is another, with the checksum that belongs to it; or its bytes."""
    path = folder / 'file.qvit.safetensors'
    reader = rng.choice(['predict', 'inspect', 'integer', 'teacher', 'finetune', 'hub', 'cost'])
    if rng.random() < 0.3:
        data, said = mutations.altered_bytes(rng, sound_packed())
        path.write_bytes(data)
    else:
        data = sound_packed()
        start = 8 + int.from_bytes(data[:8], 'little')
        header = json.loads(json.loads(data[8:start])['__metadata__'][packed.ENTRY])
        header.pop(packed.CHECKSUM)
        tensors = safetensors.torch.load(data)
        if rng.random() < 0.6:
            header, said = mutations.mutated(rng, header, values=mutations.plain_value)
        else:
            tensors, said = mutations.mutated(rng, tensors, values=mutations.tensor)
        write_packed_as(path, header, tensors)
    calls = {**READERS, 'inspect': lambda path: packing.inspection_text(packing.inspect(str(path))),
             'integer': lambda path: predictor.build_predictor(predictor.open_quantized(path).model, backend='torch')(
                 images())}
    return f'{reader} of {said}', lambda: calls[reader](path)


def write_packed_as(path: Path, header: Any, tensors: dict[str, torch.Tensor]) -> None:
    """A file with the right checksum of whatever it holds."""
    try:
        tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
        if isinstance(header, dict):
            header[packed.CHECKSUM] = packed._checksum(header, tensors)
        safetensors.torch.save_file(tensors, path, {packed.ENTRY: packed._json(header)})
    except (TypeError, ValueError, RuntimeError, RecursionError, NotImplementedError, AttributeError,
            safetensors.SafetensorError):  # what no such file can hold
        path.write_bytes(b'')


# --- stored labels ----------------------------------------------------------------------------------------------------


@functools.cache
def digits() -> Digits:
    return Digits(True, raw_image)


def soft_labels(rng: random.Random, folder: Path) -> tuple[str, Callable[[], object]]:
    """A tensor or a word of a file of soft labels is another, or its bytes are damaged."""
    path, count = folder / 'labels.safetensors', len(digits())
    indices = torch.arange(3, dtype=torch.int32).expand(count, 2, 3).contiguous()
    tensors = {'boxes': torch.tensor([0, 0, 8, 8], dtype=torch.int32).expand(count, 2, 4).contiguous(),
               'flips': torch.zeros(count, 2, dtype=torch.bool), 'indices': indices,
               'values': torch.tensor([0.5, 0.3, 0.1]).half().expand(count, 2, 3).contiguous()}
    metadata = {'format': 'soft labels 1', 'input_size': '16', 'interpolation': 'bicubic', 'teacher': 'x',
                'fingerprint': fingerprint(digits())}
    kind = rng.random()
    if kind < 0.4:
        tensors, said = mutations.mutated(rng, tensors, values=mutations.tensor)
    elif kind < 0.7:
        metadata, said = mutations.mutated(rng, metadata, values=lambda rng: rng.choice(mutations.TEXTS[:6]))
    else:
        name, at = rng.choice(list(tensors)), tuple(rng.randrange(size) for size in (1, 1, 3))
        tensors[name][at[:tensors[name].ndim]] = rng.choice([-1, 9, 99, 2, 2 ** 31 - 1, 1e4]) if name in (
            'boxes', 'indices') else rng.choice([math.nan, math.inf, -0.5, 2.])
        said = f'a value of {name}'
    try:
        safetensors.torch.save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    except (TypeError, ValueError, RuntimeError, NotImplementedError, UnicodeEncodeError, safetensors.SafetensorError):
        path.write_bytes(b'x')
    if rng.random() < 0.15:
        data, said = mutations.altered_bytes(rng, path.read_bytes())
        path.write_bytes(data)

    def read() -> None:
        dataset = build_train_dataset(DataSource('DIGITS', None, 16), main.Augmentation(), str(path))
        _, crop = dataset[0, 1]
        labels = SoftLabels(None, crop.indices[None], crop.values[None])
        probabilities = labels.probabilities(10)
        assert probabilities.isfinite().all() and (probabilities >= 0).all() and abs(probabilities.sum() - 1) < 0.01
        assert isinstance(StoredLabels.read(path), StoredLabels)

    return said, read


def warm_up() -> None:
    """Makes what all inputs change, before the processes are forked."""
    sound_contents(), sound_packed(), digits()


CAMPAIGNS = {'training checkpoints': checkpoints, 'bytes of checkpoints': checkpoint_bytes,
             'packed files': packed_files, 'soft labels': soft_labels}
__all__ = ['CAMPAIGNS', 'INFO', 'images', 'new_network', 'sound', 'sound_contents', 'warm_up', 'write_model_card']
