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
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import safetensors.torch
import torch

from files.paths import check_file, fault
from utils import RunError, UserError, write_whole

__all__ = ['local_file', 'read_checkpoint', 'write_checkpoint']

# A checkpoint's entries lie some 5 levels deep. A few bytes can name one list in many places, each within the one
# before, and whatever copies or prints such a value would never end.
DEEPEST, MOST_VALUES = 32, 2 * 10 ** 6
_NESTING = (dict, list, tuple, set, argparse.Namespace)


def read_checkpoint(path: str | Path) -> dict:
    """The contents of a checkpoint file (or URL, or .safetensors file), on the CPU.

    Raises:
        UserError: the file is missing, truncated, of another kind, or would run code.
    """
    file = local_file(path)
    is_safetensors = file.suffix == '.safetensors'
    check_file(file, kind='file' if is_safetensors else 'checkpoint file')
    if is_safetensors:
        return _load(lambda: safetensors.torch.load_file(file), path)

    def load() -> Any:
        _check_archive(file)
        return torch.load(file, map_location='cpu', weights_only=True)

    return _load(load, path)


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


def _check_archive(path: str | Path) -> None:
    """Compares the contents of a checkpoint with their checksums, at which torch.load does not look.

    Raises:
        UserError: they differ, or the archive is not one that PyTorch writes.
        Exception: of `zipfile`, where it is damaged elsewhere.
    """
    if not zipfile.is_zipfile(path):  # the form from before PyTorch 1.6, which has no checksums, or no checkpoint
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise UserError(f'{path}: refused, it is compressed within, as PyTorch never writes it: save it anew')
        if not any(member.CRC for member in members):  # written with torch.serialization.set_crc32_options(False)
            return
        for member in members:
            with archive.open(member) as contents:
                while contents.read(2 ** 20):  # compares the checksum at the end
                    pass


def _load(load: Callable[[], Any], path: str | Path) -> dict:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Detected pickle protocol')  # what cannot be read is said below
            checkpoint = load()
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r'GLOBAL ([\w.]+)', str(error))
        raise UserError(f'{path}: refused, loading it would import {refused[1]}; only tensors and plain values are read'
                        if refused else f'{path}: not a PyTorch checkpoint, or damaged') from error
    except Exception as error:  # a damaged file can raise nearly any, from struct.error to SafetensorError
        if reason := fault(error):
            raise UserError(f'{path} cannot be read ({reason})') from error
        if 'Bad CRC-32' in str(error):
            raise UserError(f'{path}: damaged, its contents differ from their checksum: copy it again') from error
        raise UserError(f'{path}: truncated or damaged, or not a PyTorch checkpoint') from error
    if not isinstance(checkpoint, dict):
        raise UserError(f'{path}: holds a {type(checkpoint).__name__}, not a checkpoint')
    _check_nesting(checkpoint, path)
    return checkpoint


def _check_nesting(checkpoint: dict, path: str | Path) -> None:
    """Refuses values nested so deeply, or named in so many places, that nothing can go through them."""
    level, values = {id(checkpoint): (checkpoint, 1)}, 0  # each with how often it is named
    for _ in range(DEEPEST):
        values += sum(count * len(_items(value)) for value, count in level.values())
        if values > MOST_VALUES:
            break
        inner: dict[int, tuple[Any, int]] = {}
        for value, count in level.values():
            for item in _items(value):
                if isinstance(item, _NESTING):
                    inner[id(item)] = item, count + inner.get(id(item), (None, 0))[1]
        if not inner:
            return
        level = inner
    raise UserError(f'{path}: refused, its entries are nested too deeply')


def _items(value: Any) -> Collection:
    value = vars(value) if isinstance(value, argparse.Namespace) else value
    return value.values() if isinstance(value, dict) else value


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
