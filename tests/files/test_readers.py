"""Data sets that timm's readers read, tar archives among them: the same images, labels and classes as from folders."""

import io
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, assert_same, resume_after_an_epoch, run
from PIL import Image
from timm.data.dataset import IterableImageDataset
from torch.utils.data import DataLoader

import datasets
from checkpoints.files import read_checkpoint
from datasets import Reading, build_dataset
from files import readers
from files.readers import Labels, ReaderSource, is_reader, is_stream, read_class_map, without_place
from files.samples import StreamedImages, first_images, seeded
from utils import UserError


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def build(is_train, data_set, path, **reading):
    return build_dataset(is_train, data_set, path, as_tensor, reading=Reading(**reading))[0]


@pytest.fixture
def folders(tmp_path):
    """Classes whose names sort in another way by their numbers, val/ without one of them, and what is no class."""
    make = np.random.default_rng(0)
    for part, names in (('train', ('10', '9', 'ant')), ('val', ('10', 'ant'))):
        for name in (*names, '.hidden', '__MACOSX', '@eaDir'):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(3):
                pixels = make.integers(0, 256, (6, 5, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f'{number}.png')
            (tmp_path / part / name / '._0.png').write_bytes(b'no image')
    return tmp_path


@pytest.fixture
def archives(folders, tmp_path_factory):
    place = tmp_path_factory.mktemp('archives')
    for part in ('train', 'val'):
        with tarfile.open(place / f'{part}.tar', 'w') as archive:
            archive.add(folders / part, arcname=part)
    return place


def items(dataset):
    return [dataset[index] for index in range(len(dataset))]


def assert_same_data(one, other):
    assert one.classes == other.classes and len(one) == len(other)
    for (image, label), (expected, number) in zip(items(one), items(other), strict=True):
        assert torch.equal(image, expected) and label == number


# --- archives and folders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('is_train', [True, False])
def test_an_archive_is_its_folder(is_train, folders, archives):
    expected = build(is_train, 'IMNET', folders)
    assert expected.classes == ['10', '9', 'ant'] and len(expected) == (9 if is_train else 6)
    found = build(is_train, 'IMNET', archives)
    assert_same_data(found, expected)
    assert_same_data(pickle.loads(pickle.dumps(found)), expected)  # as a worker that is no fork gets it


@pytest.mark.processes
def test_workers_read_an_archive_that_was_read_before(folders, archives):
    found, expected = build(True, 'IMNET', archives), build(True, 'IMNET', folders)
    assert torch.equal(found[0][0], expected[0][0])
    loaded = [image for image, _ in DataLoader(found, batch_size=None, num_workers=2)]
    assert all(torch.equal(image, expected[index][0]) for index, image in enumerate(loaded)) and len(loaded) == 9


@pytest.mark.parametrize('place', ['folders', 'archives'])
def test_a_class_list_orders_and_chooses(place, request, tmp_path, capsys):
    path, listed = request.getfixturevalue(place), tmp_path / 'classes.txt'
    listed.write_text('ant\n10\n')
    for is_train, count in ((True, 6), (False, 6)):
        dataset = build(is_train, 'IMNET', path, class_map=str(listed))
        assert dataset.classes == ['ant', '10']
        assert [label for _, label in dataset.samples] == [0] * 3 + [1] * 3 or place == 'archives'
        assert sorted(label for _, label in dataset.samples) == [0] * 3 + [1] * 3 and len(dataset) == count
        assert all(('ant' in name.split('/')) == (label == 0) for name, label in dataset.samples)
    assert 'leaves out 1 class folders' in capsys.readouterr().out


@pytest.mark.parametrize(('text', 'line'), [
    ('', 'is empty'), ('a\n\nb\n', 'has an empty line'), ('a\nb\na\n', "names class 'a' twice")])
def test_class_lists_that_are_none(text, line, tmp_path):
    (tmp_path / 'c.txt').write_text(text)
    with pytest.raises(UserError, match=f'--class-map .*c.txt {line}: write one name a line'):
        read_class_map(str(tmp_path / 'c.txt'))


def test_archives_that_cannot_be_read(folders, archives, tmp_path):
    (archives / 'train.tar').write_bytes(b'no archive')
    with pytest.raises(UserError, match=r'train.tar cannot be read \(ReadError'):
        build(True, 'IMNET', archives)
    (archives / 'train.tar').rename(archives / 'train.zip')
    with pytest.raises(UserError, match=r'train.zip is to be unpacked: archives of images are read in .tar'):
        build(True, 'IMNET', archives)


def test_class_lists_are_of_folders_and_readers(tmp_path):
    with pytest.raises(UserError, match='--class-map is of folders and of hfds, .*, DIGITS names its classes itself'):
        build(True, 'DIGITS', None, class_map='classes.txt')


# --- names and labels -------------------------------------------------------------------------------------------------


def test_names_of_readers():
    for name in ('hfds/beans', 'hfds//home/me/flowers', 'wds/x', 'tfds/mnist', 'torch/mnist', 'hfids/org/name'):
        assert is_reader(name)
        assert is_stream(name) == name.startswith(('wds', 'tfds', 'hfids'))
    for name in ('hfds', 'hfds/', 'hfds/ ', 'IMNET', 'ftp/x', None, 7, 'a\nhfds/x'):
        assert not is_reader(name)
    assert without_place('hfds//home/me/flowers') == without_place('hfds/./flowers') == 'hfds/flowers'
    assert without_place('hfds/org/name') == 'hfds/org/name' and without_place('IMNET') == 'IMNET'


def test_labels_are_numbered_by_names_or_by_the_list():
    named = Labels(['ant', 'bee'], None, 'it')
    assert (named.classes, [named.number(label) for label in (0, 1, 'bee')]) == (['ant', 'bee'], [0, 1, 1])
    turned = Labels(['ant', 'bee'], ['bee', 'ant'], 'it')
    assert (turned.classes, [turned.number(label) for label in (0, 1)]) == (['bee', 'ant'], [1, 0])
    bare = Labels([], ['ant', 'bee'], 'it')
    assert [bare.number(label) for label in (1, 0, 'ant')] == [1, 0, 0]
    for labels, label, line in ((named, -1, "it has label '-1', none of the 2 classes: choose another part"),
                                (Labels(['ant', 'bee'], ['bee'], 'it'), 0, "label 'ant', none .* --class-map: add it"),
                                (bare, 'cat', "label 'cat', none of the 2 classes of --class-map")):
        with pytest.raises(UserError, match=line):
            labels.number(label)
    with pytest.raises(UserError, match='it does not name its classes: list them with --class-map FILE'):
        Labels([], None, 'it')


# --- the package `datasets`, which has the name of a module of this project -------------------------------------------


STAND_IN = '''
from pathlib import Path
import datasets.parts  # finds itself, not the module of the same name that was imported before

class Image:
    def __init__(self, decode):
        self.decode = decode

class ClassLabel:
    names = ['ant', 'bee']

class Info:
    features, splits = {'label': ClassLabel(), 'text': None}, {}

class Dataset(list):
    info = Info()
    def cast_column(self, key, kind):
        assert not kind.decode
        return self
    def __getitem__(self, at):
        import datasets
        assert datasets.parts.WHOLE
        return [item[at] for item in self] if isinstance(at, str) else list.__getitem__(self, at)

def load_dataset(name, split, cache_dir, **_):
    if name != 'insects':
        raise ConnectionError(f"Couldn't reach {name}\\non the hub")
    files = sorted(Path(__file__).with_name(split).glob('*.png'))
    return Dataset({'image': {'bytes': None, 'path': str(path)}, 'label': number % 2, 'text': 'ant'}
                   for number, path in enumerate(files))
'''


@pytest.fixture
def hugging_face(tmp_path, monkeypatch):
    """A package `datasets` as timm's reader asks of it, with 5 images of two classes in either part."""
    package = tmp_path / 'site' / 'datasets'
    for part in ('train', 'validation'):
        (package / part).mkdir(parents=True)
        for number in range(5):
            Image.new('RGB', (6, 6), (50 * number, 0, 0)).save(package / part / f'{number}.png')
    (package / '__init__.py').write_text(STAND_IN)
    (package / 'parts.py').write_text('WHOLE = True')
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(readers, '_loaded', {})
    before = {name: module for name, module in sys.modules.items() if name.startswith('datasets.')}
    for name in [*before, 'timm.data.readers.reader_hfds']:
        sys.modules.pop(name, None)
    yield package
    for name in [name for name in sys.modules if name.startswith('datasets.')]:
        del sys.modules[name]
    sys.modules.pop('timm.data.readers.reader_hfds', None)
    sys.modules.update(before)


def test_a_data_set_of_the_hub(hugging_face, tmp_path):
    train = build(True, 'hfds/insects', None)
    assert (train.classes, [label for _, label in items(train)]) == (['ant', 'bee'], [0, 1, 0, 1, 0])
    assert [int(image[0, 0, 0]) for image, _ in items(train)] == [0, 50, 100, 150, 200]
    assert sys.modules['datasets'] is datasets
    assert_same_data(pickle.loads(pickle.dumps(train)), train)
    assert len(build(False, 'hfds/insects', None)) == 5
    (tmp_path / 'c.txt').write_text('bee\nant\n')
    turned = build(True, 'hfds/insects', None, class_map=str(tmp_path / 'c.txt'))
    assert (turned.classes, [label for _, label in items(turned)]) == (['bee', 'ant'], [1, 0, 1, 0, 1])
    by_name = build(True, 'hfds/insects', None, class_map=str(tmp_path / 'c.txt'), target_key='text')
    assert [label for _, label in items(by_name)] == [1] * 5


@pytest.mark.parametrize(('name', 'reading', 'line'), [
    ('hfds/birds', {}, r"hfds/birds: train cannot be read \(ConnectionError: Couldn't reach birds on the hub\): see"),
    ('hfds/insects', {'target_key': 'fine'}, r"cannot be read \(KeyError: 'fine'\)"),
    ('hfds/insects', {'target_key': 'text'}, 'hfds/insects does not name its classes: list them with --class-map'),
    ('hfds/insects', {'train_split': 'test'}, 'hfds/insects: test has no images')])
def test_a_data_set_of_the_hub_that_cannot_be_had(name, reading, line, hugging_face):
    with pytest.raises(UserError, match=line) as caught:
        build(True, name, None, **reading)
    assert str(caught.value).isprintable() and sys.modules['datasets'] is datasets


def test_an_unreadable_image_of_the_hub(hugging_face):
    (hugging_face / 'validation' / '1.png').write_bytes(b'no image')
    with pytest.raises(UserError, match='hfds/insects, validation, image 1 is not a readable image'):
        build(False, 'hfds/insects', None)[1]
    (hugging_face / 'train' / '1.png').write_bytes(b'no image')
    with pytest.warns(UserWarning, match='hfds/insects, train, image 1 is'):
        assert build(True, 'hfds/insects', None)[1][1] == 0


@pytest.mark.parametrize(('name', 'installed_by'), [
    ('hfds/x', 'datasets'), ('hfids/x', 'datasets'), ('wds/x', 'webdataset'),
    ('tfds/x', 'tensorflow tensorflow-datasets')])
def test_a_missing_package_is_named_with_what_installs_it(name, installed_by, monkeypatch):
    monkeypatch.setattr(readers, '_find', lambda name: None)
    with pytest.raises(UserError, match=f'--data-set {name} is read by the package .*: pip install {installed_by}$'):
        build(True, name, '.', class_map=None)


@pytest.mark.slow
@pytest.mark.whole_run
def test_a_run_on_a_data_set_of_the_hub_resumes(hugging_face, tmp_path):
    flags = (*TINY, '--data-set', 'hfds/insects', '--batch-size', 2, '--epochs', 2, '--no-native-kernels')
    resumed, whole = resume_after_an_epoch(tmp_path, *flags)
    assert_same(*(read_checkpoint(folder / 'checkpoint.pth')['model'] for folder in (resumed, whole)))
    assert read_checkpoint(whole / 'checkpoint.pth')['qvit']['data_set'] == 'hfds/insects'


# --- torchvision ------------------------------------------------------------------------------------------------------


def test_a_data_set_of_torchvision(folders):
    for part in ('train', 'val'):
        for name in ('.hidden', '__MACOSX', '@eaDir'):
            for path in (folders / part / name).iterdir():
                path.unlink()
            (folders / part / name).rmdir()
        for path in folders.glob(f'{part}/*/._0.png'):
            path.unlink()
    found = build(True, 'torch/image_folder', str(folders / 'train'))
    assert_same_data(found, build(True, 'IMNET', folders))


# --- streams ----------------------------------------------------------------------------------------------------------


class Reader:
    """24 images in an order of the epoch's, in pieces as webdataset's reader gives them to workers."""
    class_to_idx = {}
    num_workers, dist_rank, ds = 1, 0, None

    def __init__(self) -> None:
        self.epoch = 0

    def __len__(self) -> int:
        return 24

    def __iter__(self):
        for number in range(24):
            value = (7 * number + 5 * self.epoch) % 24
            yield Image.fromarray(np.full((8, 8, 3), 10 * value, np.uint8)), value % 2

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def set_loader_cfg(self, num_workers: int) -> None:
        self.num_workers = num_workers


@pytest.fixture
def stream(monkeypatch, tmp_path):
    (tmp_path / 'classes.txt').write_text('even\nodd\n')
    monkeypatch.setattr(readers, '_find', lambda name: name)
    monkeypatch.setattr(readers, 'create_dataset', lambda *_, **__: IterableImageDataset('', Reader()))
    return ('--data-set', 'wds/x', '--data-path', tmp_path, '--class-map', tmp_path / 'classes.txt')


def test_images_of_a_stream(stream):
    noisy = StreamedImages(ReaderSource('wds/x', '.', 'train', is_train=True), ['even', 'odd'],
                           lambda image: as_tensor(image)[0, 0, 0].float() + torch.rand(()))
    before = torch.get_rng_state()
    noisy.set_epoch(1)
    found = list(noisy)
    assert torch.equal(torch.get_rng_state(), before)
    assert [label for _, label in found] == [(7 * number + 5) % 24 % 2 for number in range(24)]
    assert [image.item() for image, _ in noisy] == [image.item() for image, _ in found]
    noisy.set_epoch(1, is_over=True)
    assert len(noisy) == 0 and list(noisy) == []
    assert first_images(noisy, 3).shape == (3,)
    noisy.set_epoch(2)
    assert len(noisy) == 24 and [image.item() for image, _ in noisy] != [image.item() for image, _ in found]
    with seeded(3), pytest.raises(UserError, match='wds/x does not name its classes'):
        StreamedImages(noisy.source, None, as_tensor)


def test_a_stream_without_a_count(stream, monkeypatch):
    monkeypatch.setattr(Reader, '__len__', lambda self: 0)
    with pytest.raises(UserError, match='wds/x does not say how many images val has: add their number'):
        StreamedImages(ReaderSource('wds/x', '.', 'val'), ['a', 'b'], as_tensor)


@pytest.mark.slow
@pytest.mark.whole_run
def test_a_run_on_a_stream_resumes_and_says_where(stream, tmp_path, capsys):
    flags = (*TINY, *stream, '--batch-size', 8, '--epochs', 2, '--no-native-kernels')
    resumed, whole = resume_after_an_epoch(tmp_path, *flags)
    said = capsys.readouterr().out
    assert 'a run that is resumed within an epoch begins it anew' in said and 'on the 24 test images' in said
    assert_same(*(read_checkpoint(folder / 'checkpoint.pth')['model'] for folder in (resumed, whole)))
    # The evaluation of epoch 0 was due: no image is seen twice.
    assert run(*flags, '--resume', whole / '0-3.pth') == 0
    assert 'continuing at epoch 0, batch 3' in capsys.readouterr().out
    state = torch.load(whole / '0-3.pth', weights_only=False)
    torch.save(state | {'step': 2}, whole / 'within.pth')
    assert run(*flags, '--resume', whole / 'within.pth') == 0
    said = capsys.readouterr().out
    assert 'step: 2 batches of epoch 0 were done, which begins anew: its images cannot be skipped' in said
    assert 'continuing at epoch 0, batch 0' in said


@pytest.mark.parametrize(('flags', 'line'), [
    (('--exif-orientation',), '--exif-orientation: wds/x gives its images decoded'),
    (('--dist-eval',), '--dist-eval: wds/x is read whole by every process')])
def test_what_streams_cannot_do(flags, line, stream, capsys):
    assert run(*TINY, *stream, '--batch-size', 8, '--epochs', 1, *flags) == 2
    assert line in capsys.readouterr().err


def test_shards_of_webdataset(tmp_path):
    """With the package itself, where it is installed: an evaluation sees every image once, by several workers, too."""
    pytest.importorskip('webdataset')
    for shard in range(2):
        with tarfile.open(tmp_path / f'val-{shard}.tar', 'w') as archive:
            for number in range(5):
                png = io.BytesIO()
                Image.new('RGB', (4, 4), (50 * number, shard, 0)).save(png, 'PNG')
                for suffix, contents in (('png', png.getvalue()), ('cls', b'%d' % (number % 2))):
                    entry = tarfile.TarInfo(f'{shard}{number}.{suffix}')
                    entry.size = len(contents)
                    archive.addfile(entry, io.BytesIO(contents))
    source = ReaderSource('wds/x', str(tmp_path), 'val-{0..1}.tar|10')
    for workers in (0, 2):
        stream = StreamedImages(source, ['even', 'odd'], as_tensor)
        stream.set_workers(workers)
        found = sorted((*image[0, 0].tolist()[:2], label)
                       for image, label in DataLoader(stream, batch_size=None, num_workers=workers))
        assert found == sorted((50 * number, shard, number % 2) for shard in range(2) for number in range(5))


def test_the_package_itself_reads_folders(folders, monkeypatch):
    """With the package itself, where it is installed."""
    if readers._find('datasets') is None:
        pytest.skip('the package datasets is not installed')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(folders / 'cache'))
    for part in ('train', 'val'):
        for path in [*Path(folders / part).glob('@eaDir/*'), *Path(folders / part).glob('*/._0.png')]:
            path.unlink(missing_ok=True)
    found = build(False, f'hfds/{folders}', None)
    assert [name for name in found.classes if len(name) < 4] == ['10', '9', 'ant'] and len(found) >= 6
