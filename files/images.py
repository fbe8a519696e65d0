"""Image files and folders of them: which files there are, and what a file's pixels are."""

import os
import re
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from files.paths import open_regular
from utils import UserError

__all__ = ['FORMATS', 'images_of', 'is_no_class', 'keep_to_formats', 'load_image', 'subfolders']

# Raster formats that Pillow decodes by itself. Of a file's other kinds some start another program: EPS Ghostscript.
FORMATS = ('BMP', 'GIF', 'JPEG', 'PNG', 'PPM', 'TIFF', 'WEBP')
BACKGROUND = 'white'
LARGEST_LEVEL = 1e30  # of real grey levels; differences of larger ones have no number
NARROWEST = 1000  # the longer side in units of the shorter one, which becomes as long as the network asks for
_OF_SYSTEMS = {'$RECYCLE.BIN', '#recycle', '#snapshot', '@Recycle', '@eaDir', 'System Volume Information', '__MACOSX',
               'lost+found'}
_ORIENTATION = 0x0112  # of EXIF: how the camera was held
_TURNED = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}


def load_image(source: str | Path | BinaryIO, upright: bool = True) -> Image.Image:
    """The image as it is meant to be seen: RGB, 8 bits, of an animation the first picture, on white where it is clear.

    Args:
        source: path, or opened file, which is closed.
        upright: turned as EXIF says; otherwise as it is stored.

    Raises:
        UserError: it has so many pixels, or is so narrow, that it would need all memory there is.
        Exception: whatever opening or decoding the file raises; of a damaged file that can be nearly anything.
    """
    name = source if isinstance(source, str | Path) else getattr(source, 'name', 'the image')
    opened = open_regular(source) if isinstance(source, str | Path) else source
    with opened as file, warnings.catch_warnings():
        # Of damaged metadata, which is not looked at, and of images that are large, but not too large.
        warnings.simplefilter('ignore')
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError as error:
            pixels = re.search(r'\d+', str(error))
            raise UserError(f'{name} has {pixels[0] if pixels else "too many"} pixels, more than '
                            f'{2 * Image.MAX_IMAGE_PIXELS} are not read: scale it down') from error
        with image:
            if max(image.size) > NARROWEST * min(image.size):
                raise UserError(f'{name} has {image.width} x {image.height} pixels, one side more than {NARROWEST} '
                                'times the other')
            turn = _TURNED.get(_orientation(image)) if upright else None
            rgb = _as_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def keep_to_formats() -> None:
    """Lets whoever opens images with Pillow in this process open those of `FORMATS` only."""
    Image.init()
    Image.ID[:] = [name for name in Image.ID if name in FORMATS]


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith('I'):  # 16 bits, which Pillow would cut off at 255; older releases call them 32
        grey = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert('RGB')
    if image.mode == 'F':
        return Image.fromarray(_as_bytes(np.asarray(image, dtype=np.float64))).convert('RGB')
    if image.mode in ('LA', 'La', 'PA', 'RGBA', 'RGBa') or 'transparency' in image.info:
        over = image.convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', over.size, BACKGROUND), over).convert('RGB')
    return image.convert('RGB')


def _as_bytes(grey: np.ndarray) -> np.ndarray:
    """Real grey levels as uint8: from 0 to 1, of a wider range from its smallest to its largest; NaN is 0."""
    grey = np.nan_to_num(grey, nan=0., posinf=LARGEST_LEVEL, neginf=-LARGEST_LEVEL).clip(-LARGEST_LEVEL, LARGEST_LEVEL)
    low, high = float(grey.min()), float(grey.max())
    if 0 <= low and high <= 1 or low == high:
        low, high = 0., 1.
    return np.round((grey - low).clip(0, high - low) / (high - low) * 255).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """What EXIF says; 1, upright, where it says nothing or is damaged, which leaves the pixels as good as they are."""
    image.load()  # Pillow turns TIFF images by itself then, and forgets their orientation
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # its parser raises nearly anything, as decoders do
        return 1


def is_no_class(name: str) -> bool:
    """Whether a folder of that name is hidden, or one that systems and archives put beside those of their users."""
    return name.startswith('.') or name in _OF_SYSTEMS


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted, without those of `is_no_class` and links back to it or above it.

    Raises:
        UserError: the folder cannot be read.
    """
    real = Path(os.path.realpath(folder))
    above = {str(real), *map(str, real.parents)}
    try:
        return sorted(entry.name for entry in os.scandir(folder) if not is_no_class(entry.name)
                      and os.path.isdir(entry) and os.path.realpath(entry) not in above)
    except OSError as error:
        raise UserError(f'{folder} cannot be read ({error.strerror})') from error


def images_of(folder: Path) -> list[str]:
    """The paths of the image files in a folder and in those within it, links followed, each folder once.

    Hidden files are left out, as systems put them beside images (._1.jpg).

    Raises:
        UserError: a folder cannot be read.
    """
    def stop(error: OSError) -> None:
        raise UserError(f'{error.filename} cannot be read ({error.strerror})') from error

    real = Path(os.path.realpath(folder))
    seen, found = {str(real), *map(str, real.parents)}, []
    for root, names, files in os.walk(folder, followlinks=True, onerror=stop):
        names[:] = sorted(name for name in names if not is_no_class(name))
        for name in list(names):
            inner = os.path.realpath(os.path.join(root, name))
            if inner in seen:
                names.remove(name)
            seen.add(inner)
        found.append((root, sorted(name for name in files if name.lower().endswith(IMG_EXTENSIONS)
                                   and not name.startswith('.'))))
    return [os.path.join(root, name) for root, files in sorted(found) for name in files]
