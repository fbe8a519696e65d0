"""Checkpoint files: reading them safely and writing them whole.

A file has the form that DeiT and Q-ViT release: a dict with `model`, `optimizer`, `lr_scheduler`, `epoch`, `scaler`
and `args` (an argparse.Namespace). Files of this project add `qvit`, which says what network they hold. Nothing but
tensors, plain values and that Namespace is ever unpickled.
"""
from __future__ import annotations

import argparse
import pickle
import re
import warnings
from pathlib import Path

import safetensors.torch
import torch

from utils import RunError, UserError, write_whole

__all__ = ['read_checkpoint', 'write_checkpoint']


def read_checkpoint(path: str | Path) -> dict:
    """The contents of a checkpoint file (or URL, or .safetensors file), on the CPU.

    Raises:
        UserError: the file is missing, truncated, of another kind, or would run code.
    """
    if str(path).startswith('https://'):
        return _load(lambda: torch.hub.load_state_dict_from_url(str(path), map_location='cpu', weights_only=True), path)
    is_safetensors = Path(path).suffix == '.safetensors'
    if not Path(path).is_file():
        raise UserError(f'{path}: no such {"" if is_safetensors else "checkpoint "}file')
    if is_safetensors:
        return _load(lambda: safetensors.torch.load_file(path), path)
    return _load(lambda: torch.load(path, map_location='cpu', weights_only=True), path)


def _load(load, path: str | Path) -> dict:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Detected pickle protocol')  # what cannot be read is said below
            checkpoint = load()
    except pickle.UnpicklingError as error:
        refused = re.search(r'GLOBAL ([\w.]+)', str(error))
        raise UserError(f'{path}: refused, loading it would import {refused[1]}; only tensors and plain values are read'
                        if refused else f'{path}: not a PyTorch checkpoint, or damaged') from error
    except Exception as error:  # a damaged file can raise nearly any, from struct.error to SafetensorError
        raise UserError(f'{path}: truncated or damaged, or not a PyTorch checkpoint') from error
    if not isinstance(checkpoint, dict):
        raise UserError(f'{path}: holds a {type(checkpoint).__name__}, not a checkpoint')
    return checkpoint


def write_checkpoint(state: dict, path: str | Path) -> None:
    """Writes `state` so that `path` is always a whole file.

    Raises:
        RunError: it cannot be written; what was at `path` before is still there.
    """
    try:
        write_whole(path, lambda beside: torch.save(state, beside))
    except (OSError, RuntimeError) as error:
        reason = getattr(error, 'strerror', None)
        if reason is None and 'inline_container' not in str(error):
            raise
        # PyTorch's writer does not tell why the system refused to write.
        raise RunError(f'{path} cannot be written ({reason or "no room on the disk, or in the quota"}), an earlier '
                       'file is still there: make room') from error
