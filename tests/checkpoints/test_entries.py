"""Entries of training in a checkpoint, and damage that the reader has to find before any of it is used."""

import argparse
import io
import math
import zipfile

import pytest
import torch
from torch import nn

from checkpoints.entries import check_entries, check_moments
from checkpoints.files import read_checkpoint
from checkpoints.states import check_steps
from utils import UserError, rng_states

CPU = torch.device('cpu')


def refused(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400
    return str(caught.value)


def deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def entries() -> dict:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {'epoch': 3, 'step': 0, 'max_accuracy': 71.5, 'args': argparse.Namespace(lr=1e-3, opt_betas=[0.9, 0.99]),
            'optimizer': optimizer.state_dict(), 'scaler': {'scale': 65536., '_growth_tracker': 0}, 'rng':
            rng_states(CPU), 'model_ema': model.state_dict(), 'oscillations': {'a': {'codes': torch.zeros(2)}}}


def test_what_training_writes_is_taken():
    check_entries(entries(), 'x.pth')
    check_entries({}, 'x.pth')
    check_entries({'epoch': 0, 'optimizer': None, 'scaler': {}, 'args': {'lr': 1}, 'model': 'anything'}, 'x.pth')


@pytest.mark.parametrize(('name', 'value'), [
    ('epoch', -2), ('epoch', 1.), ('epoch', '3'), ('epoch', 10 ** 5000), ('epoch', True), ('epoch', torch.tensor(3)),
    ('step', -1), ('step', None), ('max_accuracy', math.nan), ('max_accuracy', math.inf), ('max_accuracy', 101),
    ('args', argparse.Namespace(lr=torch.ones(2))), ('args', 3j), ('args', {1: 2}), ('optimizer', []),
    ('optimizer', {'state': {}, 'param_groups': [{'params': [-1]}]}), ('optimizer', {'state': [], 'param_groups': []}),
    ('optimizer', {'state': {0: 3}, 'param_groups': []}), ('scaler', {'scale': 0.}), ('scaler', {'scale': math.nan}),
    ('optimizer', {'state': {}, 'param_groups': [{'params': [], 'step': -1}]}), ('scaler', 'x'), ('rng', [None]),
    ('rng', {}), ('rng', [{}]), ('model_ema', [1]), ('model_ema', {'a': 3}), ('oscillations', {'a': 3}),
    ('oscillations', {'a': {'codes': None}})], ids=lambda value: str(value)[:30] if not isinstance(value, int) else '')
def test_entries_of_another_kind_are_refused(name, value):
    assert refused(check_entries, entries() | {name: value}, 'x.pth').startswith(f'x.pth: its entry {name} is ')


@pytest.mark.parametrize('change', [
    lambda state: state.pop('numpy'), lambda state: state.update(python=(3, (1, 2), None)),
    lambda state: state.update(python=(10 ** 5000, *state['python'][1:])), lambda state: state.update(torch=None),
    lambda state: state.update(torch=torch.zeros(3, dtype=torch.uint8)), lambda state: state['numpy'][1].append(3),
    lambda state: state['numpy'][1].__setitem__(0, -1), lambda state: state.update(numpy=('X', *state['numpy'][1:]))])
def test_random_states_that_no_generator_has(change):
    damaged = entries()
    change(damaged['rng'][0])
    assert 'its entry rng' in refused(check_entries, damaged, 'x.pth')


@pytest.mark.parametrize('change', [
    lambda state: state[0].update(exp_avg=torch.zeros(7)), lambda state: state[0]['exp_avg'].fill_(math.nan),
    lambda state: state[1].update(exp_avg_sq=torch.zeros(1).expand(2)), lambda state: state[1].update(step=-1.),
    lambda state: state[0].update(step=torch.tensor(math.inf)), lambda state: state[0].update(exp_avg='x')])
def test_moments_that_are_not_those_of_the_parameters(change):
    model = nn.Linear(3, 2)
    saved = entries()['optimizer']
    check_moments(torch.optim.Adam(model.parameters()), saved, 'x.pth')
    change(saved['state'])
    said = refused(check_moments, torch.optim.Adam(model.parameters()), saved, 'x.pth')
    assert said.startswith('x.pth: its optimizer has ') and 'for parameter' in said


def test_a_moment_that_others_have_is_missed():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    del saved['state'][2]['exp_avg']
    assert 'has exp_avg missing' in refused(check_moments, optimizer, saved, 'x.pth')
    del saved['state'][2]  # a parameter that never had a gradient
    check_moments(optimizer, saved, 'x.pth')


@pytest.mark.parametrize('value', [0., -0.1])
def test_steps_of_own_files_are_positive(value):
    state = {'a.alpha': torch.tensor([1., value]), 'a.init_state': torch.ones(1)}
    assert refused(check_steps, state, 'x.pth').startswith('x.pth: the quantizers of a.alpha have steps that are not')
    assert 'a.signed' in refused(check_steps, {'a.signed': torch.tensor([0.5])}, 'x.pth')
    check_steps({'a.alpha': torch.tensor([1e-8]), 'a.signed': torch.zeros(1)}, 'x.pth')


# --- archives ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    torch.save({'model': {'a': torch.randn(1000)}, 'epoch': 3}, tmp_path / 'x.pth')
    return tmp_path / 'x.pth'


def test_flipped_bits_are_found(path):
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member.header_offset for member in archive.infolist()}
    start = whole.index(b'FB', members[next(name for name in members if name.endswith('data/0'))]) + 2000
    for at in (start, start + 1500, whole.index(b'epoch')):
        data = bytearray(whole)
        data[at] ^= 4
        path.write_bytes(data)
        assert refused(read_checkpoint, path) == (
            f'{path}: damaged, its contents differ from their checksum: copy it again')
    path.write_bytes(whole)
    assert read_checkpoint(path)['epoch'] == 3


def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({'model': {'a': torch.arange(9)}}, tmp_path / 'x.pth')
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / 'x.pth')['model']['a'].tolist() == list(range(9))


def test_compressed_archives_are_refused(path):
    """A few bytes would become any number of them."""
    whole = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert 'compressed within' in refused(read_checkpoint, path)


def test_values_nested_without_end_are_refused(path):
    doubling: list = []
    for _ in range(28):
        doubling = [doubling, doubling]
    cycle: list = []
    cycle.append(cycle)
    for value in (deep(40), doubling, cycle, argparse.Namespace(a=deep(40))):
        torch.save({'model': {}, 'args': value}, path)
        assert refused(read_checkpoint, path) == f'{path}: refused, its entries are nested too deeply'
    torch.save({'model': {}, 'args': deep(20), 'rng': [1] * 10 ** 5}, path)
    assert read_checkpoint(path)


def test_why_a_file_cannot_be_read_is_said(path, monkeypatch):
    for error, line in ((PermissionError(13, 'Permission denied'), 'Permission denied'),
                        (OSError(5, 'Input/output error'), 'Input/output error'), (MemoryError(), 'not enough memory')):
        def fail(*_, error=error, **__):
            raise error
        monkeypatch.setattr(torch, 'load', fail)
        assert line in refused(read_checkpoint, path)


def test_an_address_that_cannot_be_fetched(monkeypatch, tmp_path, path):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))

    def fail(*_):
        raise OSError('no network')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', fail)
    address = 'https://example.org/a.pth'
    assert refused(read_checkpoint, address) == f'{address} cannot be downloaded (no network): give a file'
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda _, target: path.rename(target))
    assert read_checkpoint(address)['epoch'] == 3 and read_checkpoint(address)['epoch'] == 3
