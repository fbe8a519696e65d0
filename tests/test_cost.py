"""The command that reports what networks cost."""

import csv
import io
import json

import pytest
import torch
from toys import SMALL, TINY, create

import cost
from analysis.cost import summary
from calibration.first_batch import calibrate

pytestmark = pytest.mark.usefixtures('one_thread')

TOY = ('--model-kwargs', 'embed_dim=48', 'depth=2', 'num_heads=3', '--input-size', '48', '--num-classes', '10')


def said(capsys, *flags) -> str:
    assert cost.main([str(flag) for flag in flags]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize('report', [(), ('--per-layer',), ('--manifest',), ('--countings',)])
def test_formats_hold_the_same_rows(report, capsys):
    flags = ('--model', TINY, 'deit_tiny_distilled_patch16_224', *TOY, *report, '--format')
    rows = json.loads(said(capsys, *flags, 'json'))
    assert {row['model'] for row in rows} == {TINY, 'deit_tiny_distilled_patch16_224'}
    parsed = list(csv.DictReader(io.StringIO(said(capsys, *flags, 'csv'))))
    assert parsed == [{key: '' if value is None else str(value) for key, value in row.items()} for row in rows]
    table, markdown = said(capsys, *flags, 'table'), said(capsys, *flags, 'markdown')
    assert table.count('\n') == len(rows) + 1 and markdown.count('\n') == len(rows) + 2
    assert len({line.count('|') for line in markdown.splitlines()}) == 1


def test_units(capsys):
    heading, line = said(capsys, '--model', SMALL).splitlines()
    assert 'MACs (G)' in heading and line.split()[:6] == [SMALL, '4', '4', '224', '22.55', '12.69']
    assert line.split()[-3:] == ['0.585', '4.624', '7.90']


def test_bits_size_and_output_file(tmp_path, capsys):
    file, packed = tmp_path / 'report.json', tmp_path / 'packed'
    packed.write_bytes(bytes(1234))
    assert said(capsys, '--model', TINY, *TOY, '--weight-bits', 3, '--act-bits', 8, '--packed', packed, '--format',
                'json', '--output', file) == ''
    row, = json.loads(file.read_text())
    assert (row['weight_bits'], row['act_bits'], row['input_size'], row['packed_bytes']) == (3, 8, 48, 1234)
    assert row['packed_ratio'] == row['full_precision_size_bytes'] / 1234
    assert sorted(path.name for path in tmp_path.iterdir()) == ['packed', 'report.json']


def test_checkpoints(tmp_path, capsys):
    full = create('deit_tiny_patch16_224')
    torch.save({'model': full.state_dict()}, tmp_path / 'full.pth')
    kwargs = {'embed_dim': 48, 'depth': 2, 'num_heads': 3}
    model = create()
    calibrate(model, torch.randn(2, 3, 48, 48))
    torch.save({'model': model.state_dict(), 'qvit': {
        'format_version': 1, 'model': TINY, 'kwargs': kwargs, 'num_classes': 10, 'input_size': 48}}, tmp_path / 'q.pth')
    row, = json.loads(said(capsys, '--checkpoint', tmp_path / 'q.pth', '--format', 'json'))
    assert row == summary(TINY, model)
    named = ('--checkpoint', tmp_path / 'full.pth', '--model', 'deit_tiny_patch16_224', *TOY[:-2], '--format', 'json')
    row, = json.loads(said(capsys, *named))
    assert row == summary('deit_tiny_patch16_224', full)
    assert cost.main(['--checkpoint', str(tmp_path / 'q.pth'), '--model', TINY]) == 2
    assert cost.main(['--checkpoint', str(tmp_path / 'full.pth')]) == 2
    assert 'does not say which network it holds' in capsys.readouterr().err


@pytest.mark.parametrize('flags, message', [
    (('--model', 'fourbit_deit_tiny_patch16_224'), 'did you mean fourbits_deit_tiny_patch16_224'),
    (('--model', 'resnet18'), 'ResNet is no DeiT, ViT or Swin'),
    (('--model', TINY, '--weight-bits', '9'), '9'),
    (('--model', TINY, '--input-size', '50'), '50'),
    (('--model', 'deit_tiny_patch16_224', '--act-bits', '4'), 'act_bits'),
    (('--model', TINY, '--num-classes', '0'), '--num-classes 0'),
    (('--model', TINY, '--packed', 'missing.safetensors'), 'missing.safetensors: no such file'),
    (('--model', TINY, TINY, '--packed', __file__), '--packed adds a column to the row of one network'),
    (('--model', TINY, '--output', '/nowhere/report.txt'), '/nowhere/report.txt cannot be written'),
    (('--checkpoint', 'missing.pth'), 'missing.pth: no such checkpoint file'),
    ((), 'name networks with --model')])
def test_mistakes_are_one_line(flags, message, capsys):
    assert cost.main(list(flags)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith('error: ') and captured.err.count('\n') == 1 and message in captured.err
    assert captured.out == ''


def test_help_states_the_convention(capsys):
    with pytest.raises(SystemExit) as exit_:
        cost.main(['--help'])
    said_ = capsys.readouterr().out
    assert exit_.value.code == 0 and '1/32, 1/16, 1/8, 1/4 of the 2-, 3-, 4-, 8-bit multiplications' in said_
