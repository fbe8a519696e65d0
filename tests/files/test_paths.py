"""What is no file to read, why reading failed, and what a terminal is shown of it."""

import errno
import io
import os
from contextlib import redirect_stderr

import pytest

from files.paths import check_file, fault, open_regular, parse_json, read_text
from utils import UserError, printable, report


def said(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_what_is_no_file_is_named(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'loop').symlink_to(tmp_path / 'loop')
    for name, line in (('absent', 'no such file'), ('', 'no such file, it is a folder'),
                       ('pipe', 'no such file, it is a pipe or a device'), ('absent/x', 'no such file'),
                       ('x\0y', 'no such file'), ('loop', 'cannot be read (Too many levels'),
                       ('x' * 300, 'cannot be read (File name too long)')):
        path = f'{tmp_path}/{name}'
        assert line in said(check_file, path)
        assert said(check_file, path, f'--resume {name}').startswith('--resume')
        assert 'cannot be read (' in said(read_text, path)
    (tmp_path / 'file').write_text('x')
    check_file(tmp_path / 'file')
    monkeypatch.setattr(os, 'access', lambda *_: False)
    assert said(check_file, tmp_path / 'file').endswith('file cannot be read (Permission denied)')


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    for path in (tmp_path, tmp_path / 'pipe', '/dev/zero', tmp_path / 'absent'):
        with pytest.raises(OSError):
            open_regular(path)
    (tmp_path / 'file').write_bytes(b'contents')
    with open_regular(tmp_path / 'file') as file:
        assert file.read() == b'contents'


def test_faults_outside_the_file_are_told_from_its_own():
    assert fault(PermissionError(errno.EACCES, 'Permission denied')) == 'Permission denied'
    assert fault(OSError(errno.EIO, 'Input/output error')) == 'Input/output error'
    assert 'not enough memory' in fault(MemoryError()) and 'not enough memory' in fault(
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert fault(OSError(errno.EINVAL, 'Invalid argument')) is None and fault(ValueError('x')) is None
    assert fault(OSError('image file is truncated')) is None


def test_text_and_json(tmp_path):
    (tmp_path / 'x').write_bytes(b'\xff\xfe')
    assert said(read_text, tmp_path / 'x', '--config x') == '--config x cannot be read (no text)'
    assert parse_json('{"a": [1]}') == {'a': [1]}
    for text in ('[' * 10 ** 5, '', '9' * 5000):
        with pytest.raises(ValueError):
            parse_json(text)


def test_control_characters_are_shown_and_not_sent():
    assert printable('\x1b[2J a\u202eb\n\udcff') == r'\x1b[2J a\u202eb\n\udcff'
    assert printable('é漢 ') == 'é漢 '
    assert str(UserError('no \x1b]0;x\x07 here')) == r'no \x1b]0;x\x07 here'
    for error, line in ((UserError('a\x1bb'), 'a\\x1bb'), (OSError('a\x07b'), 'a\\x07b'),
                        (UserError('Caught UserError in worker\nTraceback\n  x\nutils.UserError: why\n'), 'why')):
        with redirect_stderr(io.StringIO()) as err:
            report(error)
        assert err.getvalue() == f'error: {line}\n'


