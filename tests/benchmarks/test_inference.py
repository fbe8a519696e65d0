"""`deploy.py bench` on a small network: its contenders' processes, its table, and what it refuses."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers import require

import deploy
from benchmarks import inference
from benchmarks.contenders import CONTENDERS, Spec
from calibration.first_batch import calibrate
from checkpoints.networks import ModelInfo
from checkpoints.packed import write_packed
from deployment.integer import IntegerViT
from deployment.native import NativeUnavailable, NativeViT
from utils import UserError

pytestmark = pytest.mark.usefixtures('one_thread')
INFO = ModelInfo('fourbits_deit_tiny_patch16_224', {'depth': 2, 'patch_size': 8, 'embed_dim': 128, 'num_heads': 2},
                 10, 32)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(INFO.model, num_classes=INFO.num_classes, img_size=INFO.input_size, **INFO.kwargs)
    calibrate(model, torch.randn(4, 3, 32, 32), inference.uneven_rule)
    return model.eval()


@pytest.fixture(scope='module')
def packed(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('bench') / 'network.qvit.safetensors'
    write_packed(network(), INFO, path)
    return path


@pytest.mark.processes
def test_bench(packed, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'deployment.onnx_export', None)  # as where a package is missing
    try:
        name, note = 'native', NativeViT(IntegerViT(network())).instructions
    except NativeUnavailable:
        name, note = 'torch-int', ''
    paths = tmp_path / 'table.md', tmp_path / 'results.json'
    flags = ['--batch-sizes', '1', '3', '--runs', '6', '--threads', '1', '--contenders', name, 'ort-int8']
    assert deploy.main(['bench', str(packed), *flags, '--markdown', str(paths[0]), '--json', str(paths[1])]) == 0
    said, found = capsys.readouterr().out, json.loads(paths[1].read_text())
    integer, onnx = found['rows']
    assert [len(integer['ms'][count]) for count in ('1', '3')] == [6, 6] and min(integer['ms']['3']) > 0
    assert integer['file_bytes'] == packed.stat().st_size and 'logits' not in integer
    assert integer['note'].startswith(note) and 0 < integer['library_bytes'] <= integer['peak_bytes']
    assert onnx['error'].startswith(('ModuleNotFoundError: ', 'ImportError: ')) and 'file_bytes' not in onnx
    assert found['threads'] == 1 and 'torch' in found['versions']
    table = paths[0].read_text()
    assert table.strip() in said
    assert table.count('\n| ') == 3 and re.search(r'ONNX Runtime int8 \(QDQ\): not measured, \w+Error: ', table)


@pytest.mark.processes
def test_openvino_takes_part(packed, tmp_path):
    require('openvino')
    require('nncf')
    names = [name for name in CONTENDERS if name.startswith('ov-')]
    flags = ['--batch-sizes', '2', '--runs', '2', '--threads', '1', '--contenders', *names]
    assert deploy.main(['bench', str(packed), *flags, '--json', str(tmp_path / 'results.json')]) == 0
    rows = {row['contender']: row for row in json.loads((tmp_path / 'results.json').read_text())['rows']}
    assert set(rows) == set(names) and not any('error' in row for row in rows.values())
    assert all('products executed in' in row['note'] for row in rows.values())
    assert rows['ov-float32']['difference'] < 1e-4 and rows['ov-nncf']['difference'] > 1e-4
    assert rows['ov-nncf']['file_bytes'] < rows['ov-float32']['file_bytes']


@pytest.mark.processes
def test_bench_runs_from_anywhere(packed, tmp_path):
    """The repository in a folder with spaces, and in the current directory modules that have names of its own."""
    copy, here = tmp_path / 'a copy' / 'of it', tmp_path / 'here'
    shutil.copytree(Path(deploy.__file__).parent, copy,
                    ignore=shutil.ignore_patterns('.*', 'docs', 'tests', 'out', '__pycache__', '*.pth'))
    (here / 'benchmarks').mkdir(parents=True)
    for name in ('utils.py', 'benchmarks/__init__.py', 'benchmarks/contenders.py'):
        (here / name).write_text('raise SystemExit("the wrong module")')
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    subprocess.run([sys.executable, str(copy / 'deploy.py'), 'bench', str(packed), '--batch-sizes', '1', '--runs', '1',
                    '--threads', '1', '--contenders', 'simulated', '--json', 'results.json'],
                   cwd=here, env=env, check=True, timeout=200)
    row, = json.loads((here / 'results.json').read_text())['rows']
    assert 'error' not in row and len(row['ms']['1']) == 1


SPEC = Spec(2, 'cpu', [1], 32, 10, 1, 'deit_tiny_distilled_patch16_224', {})


@pytest.mark.processes
def test_bench_survives_a_contender_that_dies(packed, tmp_path, monkeypatch):
    code = 'import sys; print(sys.argv[1], flush=True); input(); sys.exit("dies of this")'
    real = subprocess.Popen

    def start(command, env, **options):
        assert {env[f'{name}_NUM_THREADS'] for name in ('OMP', 'MKL', 'OPENBLAS')} == {'2'}
        return real([sys.executable, '-c', code, '{"note": ""}'], **options)

    monkeypatch.setattr(subprocess, 'Popen', start)
    row, = inference.measure(SPEC, {'packed': packed}, ['torch-int'], 1, tmp_path)
    assert row['error'] == 'its process ended with status 1: dies of this'


@pytest.mark.processes
def test_bench_says_what_a_contender_complains_of(tmp_path):
    row, = inference.measure(SPEC, {'packed': tmp_path / 'nowhere.safetensors'}, ['simulated'], 1, tmp_path)
    assert row['error'].startswith('UserError: ') and 'nowhere.safetensors: no such' in row['error']


@pytest.mark.parametrize(('options', 'message'), [
    ({'runs': 0}, '--runs: choose values of at least 1'), ({'batch_sizes': [1, 0]}, '--batch-sizes, --threads'),
    ({'threads': -1}, 'choose values of at least 1')])
def test_conditions_of_the_bench(options, message):
    with pytest.raises(UserError, match=message):
        inference.Conditions(**options)


def test_bench_on_a_gpu_leaves_out_what_runs_on_the_cpu_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    conditions = inference.Conditions(device='cuda')
    assert 'float32' in conditions.wanted and not {'native', 'ort-int8'} & set(conditions.wanted)
    with pytest.raises(UserError, match='--device cuda: native, ort-int8 run on the CPU only'):
        inference.Conditions(device='cuda', contenders=['native', 'ort-int8'])


def test_bench_table():
    rows = [{'label': 'one', 'ms': {2: [10., 20., 40.]}, 'note': 'said', 'difference': 0.00123, 'library_bytes': 1e6,
             'running_bytes': None, 'peak_bytes': 2.4e6, 'file_bytes': 3.14e6},
            {'label': 'two', 'ms': {2: []}, 'error': 'no such thing'}]
    assert inference.table(rows, [2]).splitlines() == [
        '| | batch 2: images/s | batch 2: ms, median (p99) | memory (MB): libraries | running | peak | file (MB) |',
        '|---|--:|--:|--:|--:|--:|--:|',
        '| one | 100.0 | 20.0 (39.6) | 1 | - | 2 | 3.1 |',  # p99: 98 % of the way from the second to the third of 3
        '| two | - | - | - | - | - | - |', '',
        '- one: said; logits within 1.2e-03 of the largest', '- two: not measured, no such thing']


def test_bench_measures_how_far_full_precision_is_off():
    full = torch.nn.Flatten()  # its logits are the images
    images = torch.tensor([[[1., -4.], [2., 0.]]])
    rows = [{'contender': 'ort-dynamic', 'logits': [[1., -4.5, 2., 0.25]]}, {'contender': 'native', 'logits': [[9.]]},
            {'contender': 'bf16', 'error': 'none'}]
    inference.add_differences(rows, full, images.numpy())
    assert rows == [{'contender': 'ort-dynamic', 'difference': 0.125}, {'contender': 'native'},
                    {'contender': 'bf16', 'error': 'none'}]


def test_random_networks_of_the_bench_have_uneven_scales():
    x = torch.tensor([[1., -1.], [3., -5.]])
    scale, zero = inference.uneven_rule(x, -8, 7)
    torch.testing.assert_close(scale, torch.tensor([2 * 1 / 7 ** .5, 2 * 4 / 7 ** .5]))
    torch.testing.assert_close(zero, 0.1 * (torch.tensor([-1., -5.]) + 8 * scale))


def test_every_contender_loads_a_file_that_is_written():
    assert {contender.file for contender in CONTENDERS.values()} == {
        'packed', 'float32', 'onnx_float32', 'onnx_int8', 'onnx_dynamic', 'openvino_int8'}
