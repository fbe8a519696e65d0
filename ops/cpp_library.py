"""Compiles a C++ source once and loads it: for the kernels of integer inference and of quantizers in training.

The library lies in the user's cache folder ($XDG_CACHE_HOME or ~/.cache, under qvit), named by a checksum of the
source, the compiler and this processor. What is in the cache is run, so nobody else may write there, and a library that
is not what was compiled is compiled anew.
"""
from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from utils import write_whole

__all__ = ['NativeUnavailable', 'load', 'processor']

# Rounding may be moved and traps are off, so that loops vectorize; infinities and NaN keep their meaning.
FLAGS = ['-std=c++17', '-O3', '-march=native', '-shared', '-fPIC', '-fno-math-errno', '-fno-trapping-math',
         '-fno-signed-zeros']
WIDE = ['-mprefer-vector-width=512']  # x86: compilers choose 256 bits by themselves


class NativeUnavailable(RuntimeError):
    """The kernels cannot be compiled here, or not run this network; the message is one line that says why."""


def processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return platform.machine() + ''.join(sorted({line for line in lines if line.startswith(('flags', 'model name',
                                                                                           'Features'))}))


def _compile(compiler: list[str], source: Path, flags: list[str], library: Path) -> None:
    flags = [*FLAGS, *flags]
    wide = WIDE if platform.machine().lower() in ('x86_64', 'amd64') else []
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        beside = Path(folder) / library.name
        for tried in (flags + wide, flags, [flag for flag in flags if flag != '-march=native']):  # not all know all
            command = [*compiler, *tried, str(source), '-o', str(beside)]
            result = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if result.returncode == 0:
                _keep(beside, library)
                return
    reason = next((line for line in result.stderr.splitlines() if 'error' in line), 'no message')
    raise NativeUnavailable(f'{compiler[0]} cannot compile {source.name} ({reason.strip()})')


def _keep(compiled: Path, library: Path) -> None:
    """Moves what was compiled to its place in the cache, its checksum before it."""
    checksum = hashlib.sha256(compiled.read_bytes()).hexdigest()
    write_whole(library.with_suffix('.sha256'), lambda path: path.write_text(checksum))
    os.replace(compiled, library)


def _cache_folder() -> Path:
    """A folder of this user's own for compiled libraries: what lies in it is run.

    Raises:
        NativeUnavailable: it belongs to somebody else, or others may write into it.
    """
    uid = os.getuid() if hasattr(os, 'getuid') else None
    try:
        root = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'qvit'
    except RuntimeError:  # a container's user may have neither a home nor a name
        root = Path(tempfile.gettempdir()) / f'qvit-{uid}'
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = root.stat()
    if uid is not None and (state.st_uid != uid or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise NativeUnavailable(f'{root} may be written by others, and compiled code in it would be run: remove it, or '
                                f'name another folder in $XDG_CACHE_HOME')
    return root


def _is_whole(library: Path) -> bool:
    """Whether the library is as it was compiled: loading half a file can end the process."""
    try:
        return hashlib.sha256(library.read_bytes()).hexdigest() == library.with_suffix('.sha256').read_text()
    except OSError:
        return False


def load(source: Path, flags: list[str]) -> ctypes.CDLL:
    """The library of `source`, from the cache or compiled now with $CXX, g++ or clang++.

    Args:
        flags: of the compiler, beside `FLAGS`.

    Raises:
        NativeUnavailable: there is no compiler, or it refuses, or the library cannot be kept or loaded.
    """
    compiler = shlex.split(os.environ.get('CXX', '')) or [shutil.which('g++') or shutil.which('clang++') or '']
    if not shutil.which(compiler[0]):
        raise NativeUnavailable(f'no C++ compiler ({compiler[0] or "g++"}) was found: install one, or name it in $CXX')
    key = '\n'.join([source.read_text(encoding='utf-8'), processor(), *compiler, *FLAGS, *flags])
    try:
        path = _cache_folder() / f'{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so'
        if not _is_whole(path):
            _compile(compiler, source, flags, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f'the library of {source.name} cannot be made or loaded '
                                f'({" ".join(str(error).split())})') from error
