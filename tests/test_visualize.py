"""The command line that draws, and what the figures show."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, require
from PIL import Image
from watched import SHAPE, STUDENT, TEACHER, build, images_of

import analysis
from analysis.codes import code_distribution, code_statistics
from analysis.images import to_pictures
from analysis.inspection import read_log, value_distribution
from checkpoints.files import write_checkpoint
from checkpoints.networks import ModelInfo
from visualize import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A folder with checkpoints of a student and a teacher, an image and a log."""
    folder = tmp_path_factory.mktemp('visualize')
    for file, name in (('student.pth', STUDENT), ('teacher.pth', TEACHER)):
        info = ModelInfo(name, SHAPE, 10, 16, [str(digit) for digit in range(10)], 'DIGITS')
        write_checkpoint({'model': build(name).state_dict(), 'qvit': info.to_dict()}, folder / file)
    info = ModelInfo(TEACHER, SHAPE | {'depth': 3}, 10, 16, None, 'DIGITS')
    write_checkpoint({'model': build(TEACHER, depth=3).state_dict(), 'qvit': info.to_dict()}, folder / 'deeper.pth')
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / 'image.png')
    (folder / 'broken.png').write_bytes(b'no image')
    run = folder / 'run'
    run.mkdir()
    (run / 'log.txt').write_text(''.join(
        json.dumps({'epoch': epoch, 'train_loss': 2 / (epoch + 1), 'test_acc1': 20. * epoch,
                    **({'teacher_acc1': 90.} if epoch == 0 else {})}) + '\n' for epoch in range(4)))
    return folder


def test_pictures_undo_the_normalization():
    pixels = torch.tensor([0., 0.5, 1.]).view(3, 1, 1).expand(1, 3, 2, 2)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    np.testing.assert_allclose(to_pictures((pixels - mean) / std)[0, 1, 1], [0, 0.5, 1], atol=1e-6)


# --- the command line -------------------------------------------------------------------------------------------------


def run(files, *flags: object) -> int:
    return main([str(files / flag) if str(flag).endswith(('.pth', 'image.png', 'broken.png')) else str(flag)
                 for flag in flags])


def assert_picture(path) -> np.ndarray:
    """The file is a picture with something on it; returns its pixels."""
    assert path.stat().st_size > 5000
    with Image.open(path) as image:
        pixels = np.asarray(image.convert('L'))
    assert min(pixels.shape) > 200 and (pixels < 128).mean() > 0.002 and (pixels > 250).mean() > 0.1
    return pixels


NETWORKS = ('--resume', 'student.pth', '--teacher-path', 'teacher.pth', '--num-images', '6')


@pytest.mark.parametrize('flags', [
    ('qk', *NETWORKS, '--heads', '1', '--blocks', '0', '-1'),
    ('attention', '--resume', 'student.pth', '--teacher-path', 'teacher.pth', '--images', 'image.png', 'image.png'),
    ('attention', '--resume', 'teacher.pth', '--per-head', '--num-images', '2'),
    ('distance', *NETWORKS),
    ('codes', '--resume', 'student.pth', '--num-images', '4'),
])
def test_commands_draw(files, tmp_path, capsys, flags):
    require('matplotlib')
    output = tmp_path / 'figure.png'
    assert run(files, *flags, '--output', output) == 0, capsys.readouterr().err
    assert_picture(output)
    assert list(tmp_path.iterdir()) == [output]
    said = capsys.readouterr().out
    assert f'-> {output}' in said
    if flags[0] == 'codes':
        assert len(said.splitlines()) == 1 + 30 + 1 and 'blocks.1.attn.attn_act ' in said


def test_a_figure_for_each_block(files, tmp_path):
    require('matplotlib')
    assert run(files, 'attention', '--resume', 'student.pth', '--num-images', '1', '--blocks', '0', '1', '--output',
               tmp_path / 'look.png') == 0
    first, second = (assert_picture(tmp_path / f'look_block{block}.png') for block in (0, 1))
    assert first.shape != second.shape or (first != second).any()


def test_curves_and_pdf_with_embedded_fonts(files, tmp_path):
    require('matplotlib')
    assert run(files, 'curves', files / 'run', files / 'run' / 'log.txt', '--output', tmp_path / 'curves.png') == 0
    assert_picture(tmp_path / 'curves.png')
    assert run(files, 'curves', files / 'run', '--output', tmp_path / 'curves.pdf') == 0
    written = (tmp_path / 'curves.pdf').read_bytes()
    assert written.startswith(b'%PDF') and b'/FontFile2' in written and b'/Type3' not in written


def test_what_the_figures_say(files):
    require('matplotlib')
    from analysis import figures

    codes = code_distribution(np.ones(16), 0)
    figure = figures.qk_figure({'q, block 0': {'after IRM': value_distribution(torch.linspace(0, 2, 6401)),
                                               'codes': codes}, 'k, block 0': {'codes': codes}})
    texts = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    assert texts == [['h = 1.00 bits'], ['H = 4.00 of 4 bits'], [], ['H = 4.00 of 4 bits']]
    assert [bar.get_height() for bar in figure.axes[1].patches] == [1 / 16] * 16

    figure = figures.distance_figure({'teacher': np.array([[1., 3.], [2., 6.]]),
                                      '4 bits': np.array([[0., 2.], [4., 4.]])})
    lines = figure.axes[0].lines
    assert [lines[i].get_ydata().tolist() for i in (0, 1, 2)] == [[1, 2], [3, 6], [2, 4]]
    assert [lines[i].get_ydata().tolist() for i in (3, 4, 5)] == [[0, 4], [2, 4], [1, 4]]

    log = read_log(files / 'run')
    figure = figures.curves_figure({'a': log, 'b': log})
    loss, accuracy = figure.axes
    assert [line.get_ydata().tolist() for line in loss.lines] == [[2, 1, 2 / 3, 0.5]] * 2
    assert accuracy.lines[1].get_ydata() == [90, 90]  # of the teacher
    assert len({line.get_linestyle() for line in loss.lines}) == 2  # told apart without colours

    pictures, maps = np.full((1, 16, 16, 3), 0.5), np.array([[[[0.1, 0.2], [0.3, 0.0]], [[0.3, 0.2], [0.1, 0.2]]]])
    figure = figures.attention_figure(pictures, {'4 bits': maps}, per_head=True, block='block 3')
    drawn = [ax.images[1].get_array().tolist() for ax in figure.axes[1:4]]
    assert np.allclose(drawn, [maps[0].mean(0), *maps[0]]) and figure.axes[1].images[1].norm.vmax == 0.3


def test_code_figure_shows_every_block(files):
    require('matplotlib')
    from analysis import figures

    usage = code_statistics(build(STUDENT), images_of(2))
    figure = figures.codes_figure(usage)
    panels = {ax.get_title(): ax for ax in figure.axes if ax.images}
    assert len(panels) == 12
    shown = panels['attention'].images[0].get_array()
    assert shown.shape == (2, 16) and np.allclose(shown.sum(1), 1)
    assert np.allclose(shown[1], usage['blocks.1.attn.attn_act'].distribution.heights)
    without = figures.codes_figure(code_statistics(build(STUDENT, quantize_attn=False), images_of(2)))
    assert sum(bool(ax.images) for ax in without.axes) == 8


@pytest.mark.parametrize('flags, line', [
    (('qk',), 'the following arguments are required: --resume (--help'),
    (('paint',), "invalid choice: 'paint'"),
    (('qk', '--resume', 'none.pth'), 'none.pth: no such file'),
    (('qk', '--resume', 'student.pth', '--blocks', '2'), '--blocks 2: there are 2, from 0 to 1'),
    (('qk', '--resume', 'student.pth', '--heads', '-3'), '--heads -3: there are 2, from 0 to 1'),
    (('attention', '--resume', 'student.pth', '--images', 'broken.png'), 'is not a readable image'),
    (('distance', '--resume', 'student.pth', '--num-images', '0'), '--num-images 0: choose a value of at least 1'),
    (('distance', '--resume', 'student.pth', '--teacher-path', 'deeper.pth'), 'has 2 blocks, the teacher 3'),
    (('codes', '--resume', 'teacher.pth'), 'has no codes: choose the checkpoint of a quantized network'),
    (('codes', '--resume', 'student.pth', '--data-set', 'IMNET'), '--data-set IMNET needs --data-path'),
    (('codes', '--resume', 'student.pth', '--model-kwargs', 'irm=False'), 'irm of --model-kwargs is not in'),
    (('codes', '--resume', 'student.pth', '--model-kwargs', 'num_classes=3'), '--model-kwargs num_classes: '),
    (('codes', '--resume', 'student.pth', '--input-size', '32'), 'input_size is 16 in'),
    (('codes', '--resume', 'student.pth', '--model', 'fivebits'), '--model fivebits is unknown'),
    (('codes', '--resume', 'student.pth', '--eval-crop-ratio', '0'), '--eval-crop-ratio 0.0: choose a value above 0'),
    (('codes', '--resume', 'student.pth', '--output', 'codes.gif'), '--output codes.gif: choose a name that ends in'),
    (('codes', '--resume', 'student.pth', '--output', 'no/such/codes.png'), 'there is no folder no/such'),
    (('curves', 'no/log.txt'), 'no/log.txt cannot be read (No such file or directory)'),
])
def test_mistakes_in_one_line(files, tmp_path, monkeypatch, capsys, flags, line):
    require('matplotlib')
    monkeypatch.chdir(tmp_path)
    assert run(files, *flags) == 2
    said = capsys.readouterr().err
    assert line in said and said.startswith('error: ') and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(files, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition('.')[0] == 'matplotlib']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.delitem(sys.modules, 'analysis.figures', raising=False)
    monkeypatch.delattr(analysis, 'figures', raising=False)  # what `from analysis import figures` would find first
    assert run(files, 'curves', files / 'run') == 2
    assert capsys.readouterr().err == 'error: figures need matplotlib: pip install matplotlib\n'


def test_the_example(files, tmp_path, monkeypatch, capsys):
    require('matplotlib')
    example = runpy.run_path(str(ROOT / 'examples' / 'predict_and_look.py'))['main']

    def call(image: str, checkpoint: str, *flags: str) -> int:
        monkeypatch.setattr(sys, 'argv', ['predict_and_look.py', str(files / image), '--resume',
                                          str(files / checkpoint), '--output', str(tmp_path / 'look.png'), *flags])
        return example()

    assert call('image.png', 'student.pth') == 0
    assert_picture(tmp_path / 'look.png')
    *lines, last = capsys.readouterr().out.splitlines()
    shares = [float(line.split('%')[0]) for line in lines]
    names = [line.split()[1] for line in lines]
    assert len(set(names)) == 5 and set(names) <= set('0123456789') and last == f'-> {tmp_path / "look.png"}'
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.3

    assert call('broken.png', 'student.pth') == 2 and 'is not a readable image' in capsys.readouterr().err
