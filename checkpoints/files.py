"""Checkpoint files: reading them safely and writing them whole.

A file has the form that DeiT and Q-ViT release: a dict with `model`, `optimizer`, `lr_scheduler`, `epoch`, `scaler`
and `args` (an argparse.Namespace). Files of this project add `qvit`, which says what network they hold. Nothing but
tensors, plain values and that Namespace is ever unpickled.
"""
from __future__ import annotations

import argparse
import hashlib
import http.client
import pickle
import re
import warnings
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import safetensors.torch
import torch

from utils import RunError, UserError, write_whole

__all__ = ['local_file', 'read_checkpoint', 'write_checkpoint']


def read_checkpoint(path: str | Path) -> dict:
    """The contents of a checkpoint file (or URL, or .safetensors file), on the CPU.

    Raises:
        UserError: the file is missing, truncated, of another kind, or would run code.
    """
    file = local_file(path)
    is_safetensors = file.suffix == '.safetensors'
    if not file.is_file():
        raise UserError(f'{path}: no such {"" if is_safetensors else "checkpoint "}file')
    if is_safetensors:
        return _load(lambda: safetensors.torch.load_file(file), path)
    return _load(lambda: torch.load(file, map_location='cpu', weights_only=True), path)


def local_file(path: str | Path) -> Path:
    """The file itself, or what is behind an https:// address: downloaded once, into PyTorch's hub folder.

    The copy is named by the whole address, since runs call all of their files alike.

    Raises:
        UserError: it cannot be downloaded.
    """
    address = str(path)
    if not address.startswith('https://'):
        return Path(path)
    name = PurePosixPath(unquote(urlsplit(address).path)).name or 'checkpoint'
    folder = Path(torch.hub.get_dir()) / 'checkpoints' / 'qvit'
    copy = folder / f'{hashlib.sha256(address.encode()).hexdigest()[:16]}-{name}'
    if not copy.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, str(copy))  # writes beside the copy and renames
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UserError(f'{address} cannot be downloaded ({error or type(error).__name__}): give a file') from error
    return copy


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
