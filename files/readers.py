"""Data sets that timm's readers read: of the Hugging Face hub, webdataset, TensorFlow, torchvision, tar archives.

`--data-set hfds/NAME`, `hfids/NAME`, `tfds/NAME`, `wds/NAME` and `torch/NAME` are names of `timm.data.create_dataset`.
What is opened here is read by packages that this project does not require, whatever they raise becomes one line.
"""

import contextlib
import importlib.machinery
import importlib.util
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from timm.data import create_dataset

from files.paths import read_text
from utils import UserError

__all__ = ['READERS', 'Labels', 'ReaderSource', 'is_reader', 'is_stream', 'open_reader', 'read_class_map',
           'read_labels', 'their_datasets', 'without_place']

# By prefix of the name, the module that reads it, and what installs that.
READERS = {'hfds': ('datasets', 'datasets'), 'hfids': ('datasets', 'datasets'),
           'tfds': ('tensorflow_datasets', 'tensorflow tensorflow-datasets'), 'wds': ('webdataset', 'webdataset'),
           'torch': ('torchvision', 'torchvision')}
_STREAMS = ('hfids', 'tfds', 'wds')
_ROOT = Path(__file__).resolve().parent.parent
_loaded: dict[str, ModuleType] = {}


@dataclass(frozen=True)
class ReaderSource:
    """What is to be read.

    Attributes:
        name: as `--data-set` names it; '' for a tar archive.
        root: its folder, for some readers that of their downloads; the archive.
        split: the reader's name of the part.
        input_key, target_key: its names of the image and of the label; None for its defaults.
        is_train: whether a stream is shuffled.
        batch_size: images of a stream come in multiples of it in training.
        seed: of the order of a stream.
    """
    name: str
    root: str | None
    split: str
    input_key: str | None = None
    target_key: str | None = None
    is_train: bool = False
    batch_size: int = 1
    seed: int = 0


def is_reader(name: Any) -> bool:
    """Whether `--data-set NAME` names one of timm's readers, and what it is to read."""
    return isinstance(name, str) and re.fullmatch(rf'({"|".join(READERS)})/\S(.*\S)?', name) is not None


def without_place(name: str) -> str:
    """The name of a data set without the folder that it lies in here."""
    prefix, slash, rest = name.partition('/')
    return f'{prefix}/{Path(rest).name}' if slash and rest.startswith(('/', '.', '~')) else name


def is_stream(name: str) -> bool:
    """Whether the reader gives images in its own order only: none can be asked for by its number."""
    return name.partition('/')[0] in _STREAMS


def open_reader(source: ReaderSource) -> Any:
    """What `timm.data.create_dataset` makes of it.

    Raises:
        UserError: a package is missing, or the data is, or it is not what the reader reads.
    """
    prefix, slash, name = source.name.partition('/')
    if prefix in READERS:
        module, installed_by = READERS[prefix]
        if _find(module) is None:
            raise UserError(f'--data-set {source.name} is read by the package {module}: pip install {installed_by}')
    options = {'input_key': source.input_key, 'target_key': source.target_key}
    if prefix == 'torch':
        options = {}
    elif not source.name:
        options['cache_tarfiles'] = False  # processes that share an open file would move each other's place in it
    # timm prints what it misses.
    with _refusing(source), their_datasets(prefix), contextlib.redirect_stdout(io.StringIO()):
        return create_dataset(f'{prefix}{slash}{os.path.expanduser(name)}', root=source.root, split=source.split,
                              is_training=source.is_train, batch_size=source.batch_size, seed=source.seed,
                              search_split=False, **options)


def read_labels(source: ReaderSource, opened: Any) -> tuple[list[tuple[str, Any]], list[str]]:
    """Of every image that `open_reader` has opened what to call it, and its label; and the names of the labels.

    Labels are numbers where they have names, else what the data has for them. Not for streams.

    Raises:
        UserError: they cannot be read.
    """
    reader = getattr(opened, 'reader', None)
    with _refusing(source), their_datasets(source.name.partition('/')[0]):
        if reader is None:  # one of torchvision
            names = getattr(opened, 'classes', [])
            labels = [int(label) for label in opened.targets]
        elif hasattr(reader, 'class_name_to_idx'):  # a tar archive
            names = sorted(reader.class_name_to_idx, key=reader.class_name_to_idx.get)
            return [(f'{source.root}:{sample[0].name}', int(label))
                    for sample, label in zip(reader.samples, reader.targets, strict=True)], names
        else:
            names = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
            labels = list(reader.dataset[source.target_key or 'label'])
    return [(f'{source.name}, {source.split}, image {number}', label) for number, label in enumerate(labels)], names


class Labels:
    """What the labels of a data set are numbered by, and the names of its classes.

    Args:
        names: of the labels, by their numbers; none where the data does not name them.
        classes: the names in the order that counts, of --class-map; None for that of the data.
        said: begins the messages.

    Raises:
        UserError: nobody names the classes.
    """

    def __init__(self, names: Sequence[str], classes: Sequence[str] | None, said: str) -> None:
        if classes is None and not names:
            raise UserError(f'{said} does not name its classes: list them with --class-map FILE, a name a line, in the '
                            'order of the labels')
        self.names, self.is_listed, self.said = names, classes is not None, said
        self.classes = list(names if classes is None else classes)
        number_of = {name: number for number, name in enumerate(self.classes)}
        # Labels are numbers, of names or by the list, or names themselves.
        self._number_of = number_of | {label: number_of[name] for label, name in enumerate(names or self.classes)
                                       if name in number_of}

    def number(self, label: Any) -> int:
        """The class that a label is of.

        Raises:
            UserError: none.
        """
        if label in self._number_of:
            return self._number_of[label]
        name = self.names[label] if isinstance(label, int) and 0 <= label < len(self.names) else label
        where = ' of --class-map: add it there' if self.is_listed else ': choose another part of it'
        raise UserError(f'{self.said} has label {str(name)[:60]!r}, none of the {len(self.classes)} classes{where}')


def read_class_map(path: str) -> list[str]:
    """The names of classes in a text file, a line each, in the order of their labels.

    Raises:
        UserError: it cannot be read, is empty, or names a class twice.
    """
    names = [line.strip() for line in read_text(Path(path).expanduser(), f'--class-map {path}').splitlines()]
    while names and not names[-1]:
        names.pop()
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if not names or '' in names or twice:
        raise UserError(f'--class-map {path} ' + (f'names class {twice[0]!r} twice' if twice and twice[0] else
                                                  'has an empty line' if names else 'is empty')
                        + ': write one name a line')
    return names


@contextlib.contextmanager
def _refusing(source: ReaderSource) -> Iterator[None]:
    """Makes one line of whatever the packages within raise."""
    try:
        yield
    except Exception as error:  # of whichever package reads it, which may wrap what went wrong
        first = error.__cause__ or error
        reason = ' '.join(f'{type(first).__name__}: {first}'.split())[:200]
        raise UserError(
            f'--data-set {source.name}: {source.split} cannot be read ({reason}): see to the name, --data-path, '
            '--train-split and --val-split' if source.name else f'{source.root} cannot be read ({reason}): pack it '
            'again') from error


@contextlib.contextmanager
def their_datasets(prefix: str) -> Iterator[None]:
    """Within, `datasets` is the package of that name, which timm's readers and it itself import, not our module."""
    if READERS.get(prefix, ('',))[0] != 'datasets':
        yield
        return
    ours = sys.modules.pop('datasets', None)
    try:
        sys.modules['datasets'] = _loaded.get('datasets') or _load('datasets')
        yield
    finally:
        sys.modules.pop('datasets', None)
        if ours is not None:
            sys.modules['datasets'] = ours


def _find(name: str) -> importlib.machinery.ModuleSpec | None:
    """The package of that name outside this project."""
    if name in _loaded:
        return _loaded[name].__spec__
    places = [place for place in sys.path if Path(place or '.').resolve() != _ROOT]
    return importlib.machinery.PathFinder.find_spec(name, places)


def _load(name: str) -> ModuleType:
    spec = _find(name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its parts find it by its name while it is loaded
    spec.loader.exec_module(module)
    _loaded[name] = module
    return module
