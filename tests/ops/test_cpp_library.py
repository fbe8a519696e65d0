"""The cache of compiled libraries: what is in it is run."""
import shutil
from pathlib import Path

import pytest

from ops import cpp_library
from ops.cpp_library import NativeUnavailable, load

pytestmark = pytest.mark.skipif(shutil.which('g++') is None, reason='no C++ compiler')


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    path = tmp_path / 'answer.cpp'
    path.write_text('extern "C" int answer() { return 42; }')
    return path


def libraries(tmp_path: Path) -> list[Path]:
    return list((tmp_path / 'cache' / 'qvit').glob('*.so'))


def test_a_library_is_compiled_once_into_a_folder_of_the_users_own(source, tmp_path, monkeypatch):
    assert load(source, []).answer() == 42
    library, = libraries(tmp_path)
    assert library.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(cpp_library, '_compile', lambda *_: pytest.fail('compiled again'))
    assert load(source, []).answer() == 42


@pytest.mark.parametrize('damage', [lambda code: code[:100], lambda code: b'', lambda code: code[:-1] + b'x'])
def test_a_damaged_library_is_compiled_anew(source, tmp_path, damage):
    load(source, [])
    library, = libraries(tmp_path)
    whole = library.read_bytes()
    library.unlink()  # the loaded one stays as it is
    library.write_bytes(damage(whole))
    assert load(source, []).answer() == 42
    assert library.read_bytes() == whole


def test_a_library_in_a_folder_that_others_may_write_is_refused(source, tmp_path):
    load(source, [])
    (tmp_path / 'cache' / 'qvit').chmod(0o777)
    with pytest.raises(NativeUnavailable, match='may be written by others'):
        load(source, [])


def test_a_folder_of_another_users_is_refused(source, monkeypatch):
    load(source, [])
    monkeypatch.setattr(cpp_library.os, 'getuid', lambda: 12345)
    with pytest.raises(NativeUnavailable, match='may be written by others'):
        load(source, [])


def test_a_user_without_a_home_has_a_cache_all_the_same(source, tmp_path, monkeypatch):
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setattr(cpp_library.Path, 'home', lambda: (_ for _ in ()).throw(RuntimeError('no home')))
    monkeypatch.setattr(cpp_library.tempfile, 'tempdir', str(tmp_path))
    assert load(source, []).answer() == 42
    assert list(tmp_path.glob('qvit-*/answer-*.so'))


def test_what_the_compiler_says_is_said_in_a_line(source):
    source.write_text('nonsense')
    with pytest.raises(NativeUnavailable, match=r'cannot compile answer.cpp \(.*error') as caught:
        load(source, [])
    assert '\n' not in str(caught.value)
