"""Image files as they are meant to be seen, and the folders that they lie in."""

import os
import subprocess
import warnings

import numpy as np
import pytest
from PIL import Image

from datasets import ImageList, build_dataset
from deployment.predictor import read_picture
from files.images import FORMATS, images_of, load_image, subfolders
from utils import UserError


def picture() -> Image.Image:
    """6 wide and 4 high, without any symmetry."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.mode == other.mode and np.array_equal(np.asarray(one), np.asarray(other))


# By EXIF's number, how a camera that was held so stores the upright picture.
STORED = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
          4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
          7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}


@pytest.mark.parametrize('suffix', ['png', 'tif', 'webp'])
@pytest.mark.parametrize('number', [*STORED, 0, 9, 255])
def test_the_orientation_of_exif_is_applied_once(number, suffix, tmp_path):
    upright, path, exif = picture(), tmp_path / f'x.{suffix}', Image.Exif()
    exif[0x0112] = number
    turn = STORED.get(number)
    stored = upright if turn is None else upright.transpose(turn)
    stored.save(path, exif=exif, **({'lossless': True} if suffix == 'webp' else {}))
    assert same(load_image(path), upright)


@pytest.mark.filterwarnings('ignore:Corrupt EXIF data')
def test_damaged_exif_leaves_the_pixels(tmp_path):
    picture().save(tmp_path / 'x.png', exif=b'Exif\x00\x00MM\x00*\xff\xff\xff\xff')
    assert same(load_image(tmp_path / 'x.png'), picture())


def test_every_reader_uses_the_one_loader(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().transpose(Image.Transpose.ROTATE_90).save(tmp_path / 'x.png', exif=exif)
    for skip in (True, False):
        for upright, expected in ((True, picture()), (False, picture().transpose(Image.Transpose.ROTATE_90))):
            images = ImageList([(str(tmp_path / 'x.png'), 0)], ['x'], lambda image: image, skip, upright)
            assert same(images[0][0], expected)
    assert same(read_picture(tmp_path / 'x.png'), picture())


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_16_bits_of_grey_are_scaled_to_8(suffix, tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / f'x.{suffix}')
    found = np.asarray(load_image(tmp_path / f'x.{suffix}'))
    assert found.shape == (16, 16, 3) and np.array_equal(found, np.stack([grey] * 3, -1))


@pytest.mark.parametrize('mode', ['L', 'LA', 'P', 'RGBA', '1'])
def test_other_modes_are_those_of_pillow(mode, tmp_path):
    picture().convert(mode).save(tmp_path / 'x.png')
    assert same(load_image(tmp_path / 'x.png'), Image.open(tmp_path / 'x.png').convert('RGB'))


@pytest.mark.parametrize(('levels', 'expected'), [
    ([[0., .2, 1.]], [[0, 51, 255]]), ([[0., 100., 200.]], [[0, 128, 255]]), ([[-1., 0., 3.]], [[0, 64, 255]]),
    ([[.2, .4, .4]], [[51, 102, 102]]), ([[float('nan'), 1., .2]], [[0, 255, 51]]), ([[7., 7., 7.]], [[255, 255, 255]]),
    ([[-3e38, 0., float('inf')]], [[0, 128, 255]])])
def test_real_grey_levels_are_scaled(levels, expected, tmp_path):
    Image.fromarray(np.array(levels, dtype=np.float32)).save(tmp_path / 'x.tif')
    assert np.asarray(load_image(tmp_path / 'x.tif'))[..., 1].tolist() == expected


def transparent(kind: str) -> tuple[Image.Image, dict]:
    """A red pixel, beside one that is clear, and one that is half so where the kind has it."""
    rgba = Image.fromarray(np.array([[[255, 0, 0, 255], [0, 0, 0, 0], [255, 0, 0, 128]]], dtype=np.uint8))
    if kind == 'RGBA':
        return rgba, {}
    if kind == 'LA':
        return rgba.convert('LA'), {}
    if kind == 'RGB':  # one colour stands for clear
        return rgba.convert('RGB'), {'transparency': (0, 0, 0)}
    palette = Image.fromarray(np.array([[0, 1, 0]], dtype=np.uint8), 'P')
    palette.putpalette([255, 0, 0, 0, 0, 255])
    return palette, {'transparency': 1}


@pytest.mark.filterwarnings('ignore:.*mode.*:DeprecationWarning')
@pytest.mark.parametrize('kind', ['RGBA', 'LA', 'RGB', 'P'])
def test_what_is_clear_is_white(kind, tmp_path):
    image, options = transparent(kind)
    image.save(tmp_path / 'x.png', **options)
    red, clear, half = np.asarray(load_image(tmp_path / 'x.png'))[0].tolist()
    assert clear == [255, 255, 255] and red == ([76] * 3 if kind == 'LA' else [255, 0, 0])
    assert half == {'RGBA': [255, 127, 127], 'LA': [165] * 3}.get(kind, red)


@pytest.mark.parametrize('suffix', ['gif', 'webp', 'tif', 'png'])
def test_of_an_animation_the_first_picture_counts(suffix, tmp_path):
    first, *others = (Image.new('RGB', (6, 4), colour) for colour in ('red', 'blue', 'white'))
    first.save(tmp_path / f'x.{suffix}', save_all=True, append_images=others,
               **({'lossless': True} if suffix == 'webp' else {}))
    assert same(load_image(tmp_path / f'x.{suffix}'), first)


def test_images_of_too_many_pixels_are_refused_and_large_ones_are_read(tmp_path, monkeypatch):
    Image.new('RGB', (30, 20)).save(tmp_path / 'x.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 299)
    with pytest.raises(UserError, match='x.png has 600 pixels, more than 598 are not read: scale it down'):
        read_picture(tmp_path / 'x.png')
    with pytest.raises(UserError, match='x.png has 600 pixels'):
        ImageList([(str(tmp_path / 'x.png'), 0)], ['x'], lambda image: image, False)[0]
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 300)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert load_image(tmp_path / 'x.png').size == (30, 20)


def test_an_opened_file_is_read_and_closed(tmp_path):
    picture().save(tmp_path / 'x.png')
    with open(tmp_path / 'x.png', 'rb') as file:
        assert same(load_image(file), picture()) and file.closed


def test_only_raster_formats_are_opened(tmp_path, monkeypatch):
    """Pillow would start Ghostscript for an EPS, whatever its suffix."""
    (tmp_path / 'x.jpg').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n')
    for name in ('Popen', 'check_call', 'run'):
        monkeypatch.setattr(subprocess, name, lambda *_, **__: pytest.fail('started a program'))
    with pytest.raises(UserError, match=r'x.jpg is not a readable image \(UnidentifiedImageError\)'):
        read_picture(tmp_path / 'x.jpg')
    assert not {'EPS', 'PDF', 'WMF'} & set(FORMATS)


@pytest.mark.parametrize(('make', 'line'), [
    (os.mkfifo, 'is not a readable image'), (os.mkdir, 'Is a directory|not a readable image'),
    (lambda path: path.symlink_to(path), 'not a readable image'), (lambda _: None, 'No such file'),
    (lambda path: path.symlink_to('/dev/zero'), 'is not a readable image')])
def test_what_is_no_file_is_refused_without_waiting(make, line, tmp_path):
    make(tmp_path / 'x.png')
    with pytest.raises(UserError, match=line):
        read_picture(tmp_path / 'x.png')
    with pytest.raises(UserError, match='x.png is not a readable image'):
        ImageList([(str(tmp_path / 'x.png'), 0)], ['x'], lambda image: image, False)[0]


def test_images_that_are_next_to_a_line_are_refused(tmp_path):
    """Resized so that the shorter side has 256 pixels, the longer one would have millions."""
    for size in ((9000, 1), (1, 9000)):
        Image.new('RGB', size).save(tmp_path / 'x.png')
        with pytest.raises(UserError, match=f'x.png has {size[0]} x {size[1]} pixels, one side more than 1000 times'):
            read_picture(tmp_path / 'x.png')
    Image.new('RGB', (900, 1)).save(tmp_path / 'x.png')
    assert load_image(tmp_path / 'x.png').size == (900, 1)


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    for split in ('train', 'val'):
        for name in ('one', 'two'):
            (tmp_path / split / name).mkdir(parents=True)
            picture().save(tmp_path / split / name / '0.png')
    return tmp_path


def build(data):
    return build_dataset(True, 'IMNET', data, lambda image: image)[0]


@pytest.mark.parametrize('name', ['.ipynb_checkpoints', '@eaDir', '__MACOSX', '$RECYCLE.BIN'])
def test_hidden_folders_are_no_classes(name, data):
    for place in ('train', 'val', 'train/one'):
        (data / place / name).mkdir()
        picture().save(data / place / name / '0.png')
    for name in ('train/.DS_Store', 'train/one/.DS_Store', 'train/one/._0.png'):
        (data / name).write_bytes(b'no image')
    dataset = build(data)
    assert dataset.classes == ['one', 'two'] and len(dataset) == 2


def test_links_are_followed_and_loops_are_not(data):
    (data / 'elsewhere').mkdir()
    picture().save(data / 'elsewhere' / '1.png')
    (data / 'train/one/more').symlink_to(data / 'elsewhere')
    before = build(data).samples
    assert [label for _, label in before] == [0, 0, 1]
    for number in range(8):
        (data / f'train/one/loop{number}').symlink_to(data / 'train/one')
    (data / 'train/two/up').symlink_to(data)
    (data / 'train/itself').symlink_to(data / 'train')
    (data / 'train/endless').symlink_to(data / 'train/endless')
    assert build(data).samples == before


def test_images_come_in_the_order_of_their_folders(data):
    for name in ('b/1.png', 'a/2.JPG', 'a/c/3.png', 'notes.txt'):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).touch()
    assert [path.removeprefix(f'{data}/') for path in images_of(data)] == [
        'a/2.JPG', 'a/c/3.png', 'b/1.png', 'train/one/0.png', 'train/two/0.png', 'val/one/0.png', 'val/two/0.png']


def test_folders_that_cannot_be_read_are_named(data, monkeypatch):
    def refuse(path='.'):
        raise PermissionError(13, 'Permission denied', os.fspath(path))

    monkeypatch.setattr(os, 'scandir', refuse)
    for call in (images_of, subfolders):
        with pytest.raises(UserError, match=r'one cannot be read \(Permission denied\)'):
            call(data / 'train/one')


@pytest.mark.parametrize('name', ['\x1b[2J', 'a\nb', 'x' * 201])
def test_class_names_that_no_checkpoint_could_hold(name, data):
    (data / 'train' / name).mkdir()
    with pytest.raises(UserError, match='rename it') as caught:
        build(data)
    assert str(caught.value).isprintable()
