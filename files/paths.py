"""Paths that a user names: what is no file to read is refused in one line, before a reader opens it or waits for it."""

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from console.mistakes import UserError

__all__ = ['check_file', 'checksum', 'fault', 'is_folder', 'open_regular', 'parse_json', 'read_text']

# What goes wrong outside the file that is read; other errors of the system follow from what stands in it.
_OUTSIDE = {errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT, errno.EISDIR, errno.ENOSPC, errno.EDQUOT, errno.EROFS,
            errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE}


def check_file(path: str | Path, said: str = '', kind: str = 'file') -> None:
    """Refuses what is no regular file that this user may read.

    Args:
        said: begins the message, as '--resume out.pth'; the path unless given.
        kind: what the file is to be, for the message.

    Raises:
        UserError: it is missing, a folder, a fifo or a device, or not to be read.
    """
    said = said or str(path)
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a name with a null character
        raise UserError(f'{said}: no such {kind}') from error
    except OSError as error:
        raise UserError(f'{said} cannot be read ({error.strerror})') from error
    if not stat.S_ISREG(mode):
        raise UserError(f'{said}: no such {kind}, it is a {"folder" if stat.S_ISDIR(mode) else "pipe or a device"}')
    if not os.access(path, os.R_OK):
        raise UserError(f'{said} cannot be read ({os.strerror(errno.EACCES)})')


def is_folder(path: str | Path) -> bool:
    """Whether there is a folder at the path.

    Raises:
        UserError: that cannot be found out, because a folder above it may not be entered.
    """
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name with a null character
        return False
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from error


def open_regular(path: str | Path) -> BinaryIO:
    """The regular file at the path, opened to be read.

    Raises:
        OSError: it cannot be opened, or is a pipe, a device or a folder.
    """
    # Opening a pipe would wait for a writer; Windows would translate ends of lines.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0))
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return open(descriptor, 'rb')
    os.close(descriptor)
    raise OSError('not a regular file')


def checksum(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(2 ** 20):
            digest.update(piece)
    return digest.hexdigest()


def fault(error: BaseException) -> str | None:
    """What kept a file from being read, where that was memory, permission or disk; None where it is the file itself."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return 'there is not enough memory for what it says it holds'
    return error.strerror if isinstance(error, OSError) and error.errno in _OUTSIDE else None


def read_text(path: str | Path, said: str = '') -> str:
    """The text of a file.

    Raises:
        UserError: there is no such file, or it is no text.
    """
    try:
        with open_regular(path) as file:
            return file.read().decode('utf-8')
    except OSError as error:
        raise UserError(f'{said or path} cannot be read ({error.strerror or error})') from error
    except ValueError as error:  # of the path, which has a null character, or of the text
        raise UserError(f'{said or path} cannot be read (no text)') from error


def parse_json(text: str) -> Any:
    """What JSON text says.

    Raises:
        ValueError: it is not JSON, or nested so deeply that nobody meant it.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError('nested too deeply') from error
