"""What all entry points share: how they end, which text they can say, and how they write files."""

import ast
import importlib
import io
import os
import signal
import stat
import sys

import pytest
from test_architecture import FILES

import utils

COMMANDS = ('main', 'deploy', 'cost', 'visualize', 'soft_labels', 'model_card')


# --- how a command ends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('error', 'status', 'line'), [
    (utils.UserError('--lr 0: choose a value above 0'), 2, '--lr 0: choose a value above 0'),
    (utils.DivergedError('the loss is not finite'), 1, 'the loss is not finite'),
    (OSError(28, 'No space left on device', 'out/log.txt'), 1, "[Errno 28] No space left on device: 'out/log.txt'"),
    (KeyboardInterrupt(), 130, 'stopped by Ctrl-C')])
def test_what_ends_a_command_is_one_line(error, status, line, capsys):
    @utils.entry_point
    def command():
        raise error

    assert command() == status
    assert capsys.readouterr().err == f'error: {line}\n'


def test_errors_of_the_program_keep_their_traceback():
    @utils.entry_point
    def command():
        raise RuntimeError('gloo is not to blame')

    with pytest.raises(RuntimeError):
        command()


@pytest.mark.parametrize('name', COMMANDS)
def test_variables_of_a_launcher_are_no_matter_of_other_commands(name, monkeypatch, capsys):
    """main.py, which has ranks, says which of them is malformed."""
    for variable in ('RANK', 'WORLD_SIZE', 'SLURM_PROCID', 'SLURM_STEP_NUM_TASKS'):
        monkeypatch.setenv(variable, 'first')
    assert importlib.import_module(name).main(['--no-such-flag']) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and ('WORLD_SIZE=first' in err) == (name == 'main'), err


# --- text -------------------------------------------------------------------------------------------------------------


def test_a_name_that_the_terminal_cannot_show_is_escaped(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding='ascii', write_through=True)
    monkeypatch.setattr(sys, 'stdout', terminal)
    assert utils.entry_point(lambda: print('naïve'))() == 0
    assert terminal.buffer.getvalue() == b'na\\xefve\n'


def test_names_of_folders_in_any_encoding_are_text():
    names = [name.decode('ascii', 'surrogateescape') for name in ('naïve'.encode(), b'na\xefve', b'plain')]
    assert utils.readable([*names, 'naïve']) == ['naïve', 'na\\xefve', 'plain', 'naïve']


def text_files_without_encoding(name: str) -> list[str]:
    """Calls that read or write text as the locale has it."""
    found = []
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding='utf-8'))):
        called = getattr(node, 'func', None)
        what = getattr(called, 'attr', getattr(called, 'id', None))
        owner = getattr(getattr(called, 'value', None), 'id', None)
        if what not in ('read_text', 'write_text', 'open') or owner in ('Image', 'os', 'PIL', 'archive', 'webbrowser'):
            continue
        if getattr(called, 'id', None) == 'read_text':  # that of `files.paths`, which is of one encoding itself
            continue
        modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        if not any('b' in mode for mode in modes[-1:] if what == 'open') and 'encoding' not in {
                keyword.arg for keyword in node.keywords}:
            found.append(f'{name}, line {node.lineno}')
    return found


@pytest.mark.parametrize('name', [name for name in FILES if name.partition('.')[0] not in ('ops', 'benchmarks')])
def test_text_files_have_one_encoding_everywhere(name):
    assert not text_files_without_encoding(name)


@pytest.mark.parametrize('name', [*COMMANDS, 'run_with_submitit'])
def test_help_needs_no_docstrings(name, monkeypatch, capsys):
    """python -OO leaves them out."""
    module = importlib.import_module(name)
    monkeypatch.setattr(module, '__doc__', None)
    with pytest.raises(SystemExit) as end:
        (module.parse_args if name == 'run_with_submitit' else module.get_args_parser().parse_args)(['--help'])
    said = capsys.readouterr().out
    assert end.value.code == 0 and 'None\n' not in said


# --- files ------------------------------------------------------------------------------------------------------------


def test_two_processes_of_one_number_write_beside_each_other(tmp_path):
    """As in two containers, where each is process 1."""
    path, beside = tmp_path / 'file', []

    def write_in_between(first):
        utils.write_whole(path, lambda second: (beside.extend([first, second]), second.write_text('second')))
        first.write_text('first')

    utils.write_whole(path, write_in_between)
    assert beside[0] != beside[1] and path.read_text() == 'first' and os.listdir(tmp_path) == ['file']
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda file: (done.append(stat.S_ISDIR(os.fstat(file).st_mode)), sync(file)))
    monkeypatch.setattr(os, 'replace', lambda *paths: (done.append('named'), replace(*paths)))
    utils.write_whole(tmp_path / 'file', lambda beside: beside.write_text('text'))
    assert done == [False, 'named', True]


def test_files_in_folders_that_cannot_be_flushed_are_written(tmp_path, monkeypatch):
    flush = utils._flush_to_disk
    monkeypatch.setattr(utils, '_flush_to_disk', lambda path: flush(path / 'nowhere' if path == tmp_path else path))
    utils.write_whole(tmp_path / 'file', lambda beside: beside.write_text('text'))
    assert (tmp_path / 'file').read_text() == 'text'
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # a full quota is an OSError, not the end
