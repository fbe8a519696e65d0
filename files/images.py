"""Image files and folders of them: which files there are, and what a file's pixels are."""

import os
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from files.paths import open_regular
from utils import UserError

__all__ = ['FORMATS', 'images_of', 'load_image', 'subfolders']

# Raster formats that Pillow decodes by itself. Of a file's other kinds some start another program: EPS Ghostscript.
FORMATS = ('BMP', 'GIF', 'JPEG', 'PNG', 'PPM', 'TIFF', 'WEBP')
NARROWEST = 1000  # the longer side in units of the shorter one, which becomes as long as the network asks for
_ORIENTATION = 0x0112  # of EXIF: how the camera was held
_TURNED = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}


def load_image(path: str | Path) -> Image.Image:
    """The image as it is meant to be seen: upright, RGB, 8 bits.

    Raises:
        UserError: it is so narrow that, resized to what networks take, it would need all memory there is.
        Exception: whatever opening or decoding the file raises; of a damaged file that can be nearly anything.
    """
    with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
        if max(image.size) > NARROWEST * min(image.size):
            raise UserError(f'{path} has {image.width} x {image.height} pixels, one side more than {NARROWEST} times '
                            'the other')
        turn = _TURNED.get(_orientation(image))
        if image.mode.startswith('I'):  # 16 bits, which Pillow would cut off at 255; older releases call them 32
            grey = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
            rgb = Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert('RGB')
        else:
            rgb = image.convert('RGB')
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """What EXIF says; 1, upright, where it says nothing or is damaged, which leaves the pixels as good as they are."""
    image.load()  # Pillow turns TIFF images by itself then, and forgets their orientation
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # its parser raises nearly anything, as decoders do
        return 1


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted, without hidden ones and links back to it or what it lies in.

    Raises:
        UserError: the folder cannot be read.
    """
    real = Path(os.path.realpath(folder))
    above = {str(real), *map(str, real.parents)}
    try:
        return sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith('.')
                      and os.path.isdir(entry) and os.path.realpath(entry) not in above)
    except OSError as error:
        raise UserError(f'{folder} cannot be read ({error.strerror})') from error


def images_of(folder: Path) -> list[str]:
    """The paths of the image files in a folder and in those within it, links followed, each folder once.

    Raises:
        UserError: a folder cannot be read.
    """
    def stop(error: OSError) -> None:
        raise UserError(f'{error.filename} cannot be read ({error.strerror})') from error

    real = Path(os.path.realpath(folder))
    seen, found = {str(real), *map(str, real.parents)}, []
    for root, names, files in os.walk(folder, followlinks=True, onerror=stop):
        names[:] = sorted(name for name in names if not name.startswith('.'))
        for name in list(names):
            inner = os.path.realpath(os.path.join(root, name))
            if inner in seen:
                names.remove(name)
            seen.add(inner)
        found.append((root, sorted(name for name in files if name.lower().endswith(IMG_EXTENSIONS))))
    return [os.path.join(root, name) for root, files in sorted(found) for name in files]
