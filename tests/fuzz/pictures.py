"""Campaigns on images and on folders of them."""
from __future__ import annotations

import os
import random
import socket
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from datasets import ImageList, build_dataset, build_transform
from deployment.predictor import read_picture

from . import mutations

TRANSFORM = build_transform(False, 16, 'IMNET')
EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n'


def _pixels(rng: random.Random, *shape: int) -> np.ndarray:
    return np.frombuffer(rng.randbytes(int(np.prod(shape))), np.uint8).reshape(shape)


def _huge_png() -> bytes:
    """A file of a few bytes that claims to be 60000 x 60000 pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 60000, 60000, 8, 2, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(bytes(10 ** 6))) + chunk(b'IEND', b''))


def _bomb_png(side: int = 12000) -> bytes:
    """A small file whose pixels are all there, and many."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 1, 0, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(bytes(side * (side // 8 + 1)))) + chunk(b'IEND', b''))


def write_picture(rng: random.Random, path: Path) -> str:
    """An image of some kind under this name; says of which."""
    modes = {'RGB': (8, 9, 3), 'L': (8, 9), 'RGBA': (8, 9, 4), 'CMYK': (8, 9, 4), 'LA': (8, 9, 2)}
    kind = rng.choice([*modes, 'P', '1', '16 bit', 'float', 'exif', 'tiny', 'long', 'huge', 'bomb', 'eps', 'text',
                       'nothing', 'transparent', 'animated', 'pdf'])
    form = rng.choice(['PNG', 'JPEG', 'TIFF', 'WEBP', 'GIF', 'BMP', 'PPM'])
    if kind in modes:
        image = Image.fromarray(_pixels(rng, *modes[kind]), kind)
    elif kind == '16 bit':
        image = Image.fromarray(_pixels(rng, 8, 9, 2).view(np.uint16)[..., 0])
    elif kind == 'float':
        image, form = Image.fromarray(np.full((5, 5), rng.choice([np.nan, 1e30, -1., 0.5]), np.float32)), 'TIFF'
    elif kind in ('tiny', 'long'):
        image = Image.new('RGB', (1, 1) if kind == 'tiny' else rng.choice([(1, 9000), (9000, 1)]))
    elif kind in ('P', '1', 'transparent', 'exif', 'animated'):
        image = Image.fromarray(_pixels(rng, 8, 9, 3)).convert(kind if kind in 'P1' else 'P' if kind == 'transparent'
                                                              else 'RGB')
    else:
        path.write_bytes({'huge': _huge_png, 'bomb': _bomb_png, 'eps': lambda: EPS, 'pdf': lambda: b'%PDF-1.4\n',
                          'text': lambda: b'no image', 'nothing': lambda: b''}[kind]())
        return kind
    options = {}
    if kind == 'exif':
        options['exif'] = Image.Exif()
        options['exif'][0x0112] = rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 255])
    if kind == 'transparent':
        options['transparency'] = rng.choice([3, bytes(range(200))])
    try:
        image.save(path, form, **options)
    except (OSError, ValueError, TypeError, KeyError):  # the format lacks the mode
        image.convert('RGB').save(path, 'PNG')
    return f'{kind} as {form}'


def images(rng: random.Random, folder: Path) -> tuple[str, Callable[[], object]]:
    """An image file of any kind, whole or damaged, under any suffix; or something that is no file."""
    path = folder / f'x{rng.choice([".jpg", ".png", ".tif", ".webp", ""])}'
    said = write_picture(rng, path)
    kind = rng.random()
    if kind < 0.5 and path.stat().st_size:
        data, what = mutations.altered_bytes(rng, path.read_bytes())
        path.write_bytes(data)
        said += f', {what}'
    elif kind > 0.93:
        path.unlink()
        special(rng, path)
        said = 'no file'
    reader = rng.choice(['predict', 'training', 'evaluation'])

    def read() -> None:
        if reader == 'predict':
            assert TRANSFORM(read_picture(path)).shape == (3, 16, 16)
        else:
            image, _ = ImageList([(str(path), 0)], ['x'], TRANSFORM, skip_unreadable=reader == 'training')[0]
            assert image.shape == (3, 16, 16) and image.isfinite().all()

    return f'{reader} of {said}', read


def special(rng: random.Random, path: Path) -> None:
    """A folder, a link to itself or to nothing, a fifo, a socket, a device at this path."""
    def listen() -> None:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))

    rng.choice([path.mkdir, lambda: path.symlink_to(path), lambda: path.symlink_to('/dev/zero'), lambda:
                os.mkfifo(path), listen, lambda: path.symlink_to('nowhere')])()


def folders(rng: random.Random, root: Path) -> tuple[str, Callable[[], object]]:
    """A folder of a data set with something odd in it."""
    root = root / 'data'
    for split in ('train', 'val'):
        for name in ('one', 'two'):
            (root / split / name).mkdir(parents=True)
            Image.fromarray(_pixels(rng, 8, 9, 3)).save(root / split / name / '0.png')
    said = []
    for _ in range(rng.randint(1, 2)):
        at = rng.choice([root, root / 'train', root / 'val', root / 'train' / 'one', root / 'val' / 'two'])
        if not at.is_dir():
            continue
        what = rng.choice(['loop', 'parent', 'fifo', 'device', 'empty', 'file', 'gone', 'closed', 'special', 'name',
                           'deep', 'hidden', 'links'])
        said.append(f'{what} in {at.relative_to(root)}')
        if what in ('loop', 'parent'):
            (at / f'link{len(said)}').symlink_to(at if what == 'loop' else root)
        elif what in ('fifo', 'special', 'device'):
            new = at / f'odd{len(said)}.png'
            make = {'fifo': os.mkfifo, 'special': partial(special, rng), 'device': partial(os.symlink, '/dev/zero')}
            make[what](new)
        elif what == 'empty':
            (at / f'empty{len(said)}').mkdir()
        elif what == 'file':
            (at / f'file{len(said)}').write_text('x')
        elif what == 'gone':
            at.rename(root.parent / f'gone{len(said)}')
            at.write_text('a file in its place') if rng.random() < 0.5 else None
        elif what == 'closed':
            at.chmod(0)
        elif what == 'name':
            new = at / rng.choice(['\x1b[2J', 'a\nb', 'é漢', ' ', '\udcff', 'a' * 200])
            new.mkdir(exist_ok=True)
            Image.new('RGB', (4, 4)).save(new / '0.png')
        elif what == 'deep':
            at.joinpath(*['d'] * 300).mkdir(parents=True, exist_ok=True)
        elif what == 'links':
            for number in range(12):
                (at / f'l{number}').symlink_to(at)
        else:
            (at / '.ipynb_checkpoints').mkdir(exist_ok=True)
            Image.new('RGB', (4, 4)).save(at / '.ipynb_checkpoints' / '0.png')

    def read() -> None:
        for is_train in (True, False):
            dataset, classes = build_dataset(is_train, 'IMNET', root, TRANSFORM, num_classes=2)
            assert len(dataset) < 20 and not any(name.startswith('.') for name in dataset.classes), len(dataset)
            for index in range(len(dataset)):
                dataset[index]
            print(dataset.samples[0][1], classes)

    return ', '.join(said), read


CAMPAIGNS = {'images': images, 'folders of a data set': folders}
