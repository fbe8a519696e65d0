"""Compiles a C++ source once and loads it: for the kernels of integer inference and of quantizers in training.

The library lies in the user's cache folder ($XDG_CACHE_HOME or ~/.cache, under qvit), named by a checksum of the
source, the compiler and this processor.
"""
from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

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
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        beside = Path(folder) / library.name
        for tried in (flags + wide, flags, [flag for flag in flags if flag != '-march=native']):  # not all know all
            command = [*compiler, *tried, str(source), '-o', str(beside)]
            result = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if result.returncode == 0:
                os.replace(beside, library)
                return
    reason = next((line for line in result.stderr.splitlines() if 'error' in line), 'no message')
    raise NativeUnavailable(f'{compiler[0]} cannot compile {source.name} ({reason.strip()})')


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
    key = '\n'.join([source.read_text(), processor(), *compiler, *FLAGS, *flags])
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'qvit'
    path = cache / f'{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so'
    try:
        if not path.is_file():
            _compile(compiler, source, flags, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f'{path} cannot be made or loaded ({" ".join(str(error).split())})') from error
