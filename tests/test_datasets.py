"""Data sets on small trees written by the tests: labels, transforms, users' mistakes, damaged files."""

import json
import os
import pickle
import re
import shutil
import warnings
from collections import Counter
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100

import datasets
from datasets import (
    DATASETS,
    IMAGENET,
    Augmentation,
    ImageList,
    Normalization,
    Reading,
    build_transform,
    choose_data_set,
    normalization,
)
from utils import UserError


def build(is_train, data_set='IMNET', data_path=None, input_size=48, num_classes=None, **reading):
    """The data set with DeiT's augmentation, and its number of classes."""
    transform = build_transform(is_train, input_size, data_set)
    return datasets.build_dataset(is_train, data_set, data_path, transform, num_classes=num_classes,
                                  reading=Reading(**reading))


def write_image(path, seed=0, size=(60, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def user_error(call, *words):
    """`call` raises a UserError of one line that contains all of `words`."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert '\n' not in message
    for word in words:
        assert str(word) in message


@pytest.fixture
def imnet(tmp_path):
    for label, name in enumerate(('ant', 'bee', 'cat')):
        for number in range(2):
            write_image(tmp_path / 'train' / name / f'{number}.png', seed=10 * label + number)
        write_image(tmp_path / 'val' / name / '0.png', seed=label)
    return tmp_path


def test_unknown_data_set_names_the_choices():
    user_error(lambda: build(True, 'MNIST'), "'MNIST'", *DATASETS)


def test_the_data_set_is_that_of_the_flag_or_of_the_file():
    assert choose_data_set('INAT', 'here', 'CIFAR10', 'f') == 'INAT'
    assert choose_data_set(None, 'here', 'CIFAR10', 'f') == 'CIFAR10'
    assert choose_data_set(None, 'here', None, 'f') == choose_data_set(None, 'here') == 'IMNET'
    assert choose_data_set(None, None, None, 'f') == choose_data_set(None, None) == 'DIGITS'
    assert choose_data_set('hfds/beans', None, 'DIGITS') == 'hfds/beans'
    for asked, described, line in (
            (None, 'CIFAR10', 'f is of CIFAR10: pass its --data-path'), ('INAT', 'DIGITS', 'INAT needs --data-path'),
            (None, 'hfds/beans', 'f is of hfds/beans: pass its --data-set'), ('wds/a', None, 'wds/a needs --data-path'),
            ('hfds/', None, "--data-set 'hfds/' is unknown: choose one of"), ('imnet', None, 'is unknown')):
        user_error(lambda asked=asked, described=described: choose_data_set(asked, None, described, 'f'), line)


# ImageNet folders


def test_imnet_items_and_classes(imnet):
    for is_train, length in ((True, 6), (False, 3)):
        dataset, nb_classes = build(is_train, 'IMNET', imnet)
        assert (len(dataset), nb_classes, dataset.classes) == (length, 3, ['ant', 'bee', 'cat'])
        image, label = dataset[length - 1]
        assert (image.shape, image.dtype, label) == ((3, 48, 48), torch.float32, 2)


def test_imnet_val_takes_the_labels_of_train(imnet):
    shutil.rmtree(imnet / 'val' / 'ant')
    (imnet / 'val' / 'bee' / '0.png').unlink()
    dataset, nb_classes = build(False, 'IMNET', imnet)
    assert (nb_classes, [label for _, label in dataset.samples]) == (3, [2])


def test_imnet_val_with_unknown_classes(imnet):
    write_image(imnet / 'val' / 'dog' / '0.png')
    write_image(imnet / 'val' / 'eel' / '0.png')
    user_error(lambda: build(False, 'IMNET', imnet), "'dog' (and 1 more)", imnet / 'train')
    assert len(build(True, 'IMNET', imnet)[0]) == 6


def test_imnet_without_train_counts_the_classes_of_val(imnet):
    shutil.rmtree(imnet / 'train')
    for expected in (None, 3):
        dataset, nb_classes = build(False, 'IMNET', imnet, num_classes=expected)
        assert (nb_classes, dataset.classes) == (3, ['ant', 'bee', 'cat'])
    user_error(lambda: build(False, 'IMNET', imnet, num_classes=4), 'has 3 class folders, not 4', imnet / 'train')
    user_error(lambda: build(True, 'IMNET', imnet), imnet / 'train')


def test_imnet_missing_or_empty_folders(imnet):
    user_error(lambda: build(True, 'IMNET', imnet / 'nowhere'), f'--data-path {imnet / "nowhere"} is not a folder')
    (imnet / 'train' / 'dog').mkdir()
    (imnet / 'train' / 'eel').mkdir()
    user_error(lambda: build(True, 'IMNET', imnet), imnet / 'train' / 'dog', '1 more')
    assert build(False, 'IMNET', imnet)[1] == 5
    for path in (imnet / 'val').glob('*/*'):
        path.unlink()
    user_error(lambda: build(False, 'IMNET', imnet), f'no images in {imnet / "val"}')
    shutil.rmtree(imnet / 'val')
    user_error(lambda: build(False, 'IMNET', imnet), f'{imnet / "val"} is missing')
    (imnet / 'val').mkdir()
    write_image(imnet / 'val' / 'flat.png')
    user_error(lambda: build(False, 'IMNET', imnet), imnet / 'val', 'class folders')


# Damaged files


def test_damaged_image_is_skipped_in_training_and_counted(imnet):
    (imnet / 'train' / 'bee' / '0.png').write_bytes(b'no image')
    whole = (imnet / 'train' / 'cat' / '1.png').read_bytes()
    (imnet / 'train' / 'cat' / '1.png').write_bytes(whole[: len(whole) // 2])
    dataset, _ = build(True, 'IMNET', imnet)
    with pytest.warns(UserWarning, match=r'number 1: .*bee.0\.png'):
        assert dataset[2][1] == 1
    with pytest.warns(UserWarning, match=r'number 2: .*cat.1\.png'):
        assert dataset[5][1] == 0  # past the end, the first one follows
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert dataset[3][1] == 1


def test_damaged_image_stops_evaluation(imnet):
    bad = imnet / 'val' / 'bee' / '0.png'
    bad.write_bytes(b'no image')
    dataset, _ = build(False, 'IMNET', imnet)
    assert dataset[0][1] == 0
    user_error(lambda: dataset[1], bad)
    bad.unlink()
    user_error(lambda: dataset[1], bad)


def test_only_so_many_damaged_images_in_a_row(tmp_path):
    samples = [(str(tmp_path / f'{number}.png'), 0) for number in range(60)]
    write_image(tmp_path / '50.png')
    dataset = ImageList(samples, ['only'], transforms.ToTensor(), skip_unreadable=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert dataset[1][1] == 0
        user_error(lambda: dataset[0], tmp_path / '49.png', '50')


# Transforms


def parts(is_train, **changes) -> list:
    return build_transform(is_train, **changes).transforms


def test_evaluation_transform():
    resize, crop, *rest = parts(False, input_size=224)
    assert (resize.size, resize.interpolation) == (256, transforms.InterpolationMode.BICUBIC)
    assert crop.size == (224, 224)
    assert [type(part) for part in rest] == [transforms.ToTensor, transforms.Normalize]
    np.testing.assert_allclose(rest[1].mean, (0.485, 0.456, 0.406))
    np.testing.assert_allclose(rest[1].std, (0.229, 0.224, 0.225))
    assert parts(False, input_size=384)[0].size == 438
    assert parts(False, input_size=224, eval_crop_ratio=1.0)[0].size == 224


def test_small_images_are_evaluated_whole():
    transform = build_transform(False, 32)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    untouched = transforms.Compose(transform.transforms[-2:])(image)
    assert torch.equal(transform(image), untouched)
    assert transform(image.resize((50, 40))).shape == (3, 32, 32)


def test_training_transform_has_the_published_augmentation():
    crop, *rest = parts(True, input_size=224)
    assert isinstance(crop, RandomResizedCropAndInterpolation)
    assert crop.size == (224, 224)
    assert crop.interpolation == transforms.InterpolationMode.BICUBIC
    assert [type(part).__name__ for part in rest] == [
        'RandomHorizontalFlip', 'RandAugment', 'MaybeToTensor', 'Normalize', 'RandomErasing',
    ]  # fmt: skip
    erasing = rest[-1]
    assert (erasing.probability, erasing.per_pixel, erasing.max_count) == (0.25, True, 1)


def test_training_transform_without_policy_jitters_colours():
    for off in (None, '', 'none'):
        jittering = Augmentation(aa=off, reprob=0.0)
        names = [type(part).__name__ for part in parts(True, input_size=48, augmentation=jittering)]
        assert 'ColorJitter' in names
        assert 'RandAugment' not in names
        assert 'RandomErasing' not in names


def test_training_transform_without_random_crop():
    resize, crop, flip, *_, erasing = parts(
        True, input_size=224, augmentation=Augmentation(random_resized_crop=False))
    assert (resize.size, crop.size) == (256, (224, 224))
    assert isinstance(flip, transforms.RandomHorizontalFlip)
    assert isinstance(erasing, RandomErasing)


def test_small_training_transform_pads_and_crops():
    transform = build_transform(True, 32)
    crop = transform.transforms[1]
    assert isinstance(crop, transforms.RandomCrop)
    assert (crop.size, crop.padding) == ((32, 32), 4)
    for size in ((32, 32), (50, 40), (20, 10)):
        assert transform(Image.new('RGB', size)).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ('flag', 'value'),
    [('aa', 'nonsense'), ('aa', 'rand-m9-x5'), ('remode', 'stripes'), ('train_interpolation', 'nearestish')],
)
def test_wrong_augmentation_flags(flag, value):
    augmentation = Augmentation(**{flag: value})
    user_error(lambda: build_transform(True, 48, augmentation=augmentation), f'--{flag.replace("_", "-")} {value!r}')
    build_transform(False, 48, augmentation=augmentation)


# Normalization


def test_normalization_by_flags():
    assert normalization() == IMAGENET == Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert normalization([0.5], [0.2, 0.3, 0.4]) == Normalization((0.5,) * 3, (0.2, 0.3, 0.4))
    grey = normalization(in_chans=1)
    np.testing.assert_allclose((*grey.mean, *grey.std),  # by the weights of a grey level
                               (.299 * .485 + .587 * .456 + .114 * .406, .299 * .229 + .587 * .224 + .114 * .225),
                               atol=5e-5)
    assert normalization([0.5], None, 1) == Normalization((0.5,), grey.std)
    user_error(lambda: normalization([0.5, 0.4]), '--mean 0.5 0.4: choose one value, or one for each of 3 colours')
    user_error(lambda: normalization(None, [0.5] * 3, 1), '--std 0.5 0.5 0.5: choose one value, images are grey')
    user_error(lambda: normalization(in_chans=4), 'the network takes 4 channels')


@pytest.mark.parametrize('data_set', ['IMNET', 'DIGITS'])
@pytest.mark.parametrize('by', [Normalization((0.5, 0.4, 0.3), (0.1, 0.2, 0.4)), Normalization((0.5,), (0.25,))])
def test_images_are_normalized_as_told(data_set, by):
    """A picture of one colour, which neither crops nor the policy of no augmentation change."""
    picture, plain = Image.new('RGB', (60, 50), (200, 100, 50)), Augmentation(aa=None, color_jitter=0, reprob=0.)
    colour = (200, 100, 50) if by.in_chans == 3 else (round(.299 * 200 + .587 * 100 + .114 * 50),)
    expected = [(level / 255 - mean) / std for level, mean, std in zip(colour, by.mean, by.std, strict=True)]
    for is_train in (False, True):
        image = build_transform(is_train, 40, data_set, augmentation=plain, normalization=by)(picture)
        assert image.shape == (by.in_chans, 40, 40)
        np.testing.assert_allclose(image[:, 20, 20], expected, atol=1e-5)


def test_all_augmentations_take_grey_images():
    transform = build_transform(True, 40, augmentation=Augmentation(reprob=1.), normalization=normalization(in_chans=1))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    for _ in range(30):
        assert transform(picture).shape == (1, 40, 40)


# Digits


def test_digits_are_split_once_and_completely():
    train, nb_classes = build(True, 'DIGITS', input_size=16)
    val, _ = build(False, 'DIGITS', input_size=16)
    assert nb_classes == 10
    assert train.classes == val.classes == list('0123456789')
    assert len(train) + len(val) == 1797
    everyone = Counter(train.targets) + Counter(val.targets)
    assert Counter(val.targets) == Counter({digit: count // 5 for digit, count in everyone.items()})
    assert train.images.max() == 255
    again, _ = build(True, 'DIGITS', input_size=16)
    assert np.array_equal(train.images, again.images)
    assert train.targets == again.targets


def test_digits_items_and_transforms():
    val, _ = build(False, 'DIGITS', input_size=32)
    image, label = val[3]
    assert (image.shape, label) == ((3, 32, 32), val.targets[3])
    assert torch.equal(image, val[3][0])
    train, _ = build(True, 'DIGITS', input_size=32)
    assert train[0][0].shape == (3, 32, 32)
    assert not torch.equal(train[0][0], train[0][0])
    kinds = {type(part).__name__ for part in train.transform.transforms}
    assert kinds == {'Resize', 'RandomAffine', 'ToTensor', 'Normalize'}


# CIFAR


def fake_cifar(monkeypatch, root, source, names):
    """Write a data set of 4 training and 2 test images in the format of `source`, and lift the check of the hashes."""
    fine = source is CIFAR100
    folder = root / source.base_folder
    folder.mkdir()
    for file, count in (('a', 4), ('b', 2)):
        entry = {
            'data': np.arange(count * 3072, dtype=np.uint32).astype(np.uint8).reshape(count, 3072),
            'fine_labels' if fine else 'labels': list(range(count)),
        }
        (folder / file).write_bytes(pickle.dumps(entry))
    (folder / 'meta').write_bytes(pickle.dumps({'fine_label_names' if fine else 'label_names': names}))
    monkeypatch.setattr(source, 'train_list', [['a', None]])
    monkeypatch.setattr(source, 'test_list', [['b', None]])
    monkeypatch.setattr(source, 'meta', dict(source.meta, filename='meta', md5=None))


def no_network(monkeypatch, source):
    def download(self):
        raise URLError('no\nroute')

    monkeypatch.setattr(source, 'download', download)


@pytest.mark.parametrize(('name', 'source', 'nb_classes'), [('CIFAR', CIFAR100, 100), ('CIFAR10', CIFAR10, 10)])
def test_cifar_reads_present_files_without_network(monkeypatch, tmp_path, name, source, nb_classes):
    fake_cifar(monkeypatch, tmp_path, source, [f'class {number}' for number in range(nb_classes)])
    no_network(monkeypatch, source)
    for is_train, length in ((True, 4), (False, 2)):
        dataset, found = build(is_train, name, tmp_path, input_size=32)
        assert (found, len(dataset.classes), len(dataset)) == (nb_classes, nb_classes, length)
        image, label = dataset[1]
        assert (image.shape, label) == ((3, 32, 32), 1)


@pytest.mark.parametrize(('name', 'source'), [('CIFAR', CIFAR100), ('CIFAR10', CIFAR10)])
def test_cifar_that_cannot_be_had(monkeypatch, tmp_path, name, source):
    no_network(monkeypatch, source)
    folder = tmp_path / source.base_folder
    user_error(lambda: build(True, name, tmp_path), folder, 'no route', source.filename)
    folder.mkdir()
    user_error(lambda: build(True, name, tmp_path), folder, 'incomplete')


@pytest.mark.parametrize('what', ['folder', 'file'])
def test_cifar_that_may_not_be_read_is_not_called_damaged(what, monkeypatch, tmp_path):
    fake_cifar(monkeypatch, tmp_path, CIFAR10, [f'class {number}' for number in range(10)])
    at = tmp_path / CIFAR10.base_folder / ('a' if what == 'file' else '')
    real = {'folder': os.scandir, 'file': open}[what]

    def refuse(path, *rest):
        if Path(path) == at:
            raise PermissionError(13, 'Permission denied', str(path))
        return real(path, *rest)

    monkeypatch.setattr(*((os, 'scandir', refuse) if what == 'folder' else ('builtins.open', refuse)))
    user_error(lambda: build(True, 'CIFAR10', tmp_path), f'{at} cannot be read (Permission denied)')


def test_a_folder_behind_one_that_may_not_be_entered(monkeypatch, imnet):
    def refuse(path, **_):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr(os, 'stat', refuse)
    for name in ('IMNET', 'INAT', 'CIFAR'):
        user_error(lambda name=name: build(True, name, imnet), 'cannot be read (Permission denied)')


# iNaturalist


@pytest.fixture
def inat(tmp_path):
    """Three categories, of which number 2 comes first in training; 0 and 2 share a kingdom."""
    ranks = [rank for rank in datasets.INAT_CATEGORIES if rank not in ('kingdom', 'name')]
    kingdoms = ('Fungi', 'Plants', 'Fungi')
    (tmp_path / 'categories.json').write_text(json.dumps([
        {'id': number, 'kingdom': kingdom, 'name': f'species {number}', **{rank: f'{rank} {number}' for rank in ranks}}
        for number, kingdom in enumerate(kingdoms)
    ]))  # fmt: skip
    for year in (2018, 2019):
        for part, numbers in (('train', (2, 1, 0, 2)), ('val', (0, 1))):
            files = [f'tv{year}/{kingdoms[number]}/{number}/{part}{i}.png' for i, number in enumerate(numbers)]
            for file in files:
                write_image(tmp_path / file)
            (tmp_path / f'{part}{year}.json').write_text(json.dumps({
                'images': [{'file_name': file} for file in files],
                'annotations': [{'category_id': number} for number in numbers],
            }))  # fmt: skip
    return tmp_path


@pytest.mark.parametrize(('name', 'year'), [('INAT', 2018), ('INAT19', 2019)])
@pytest.mark.parametrize('flat', [False, True])
def test_inat_numbers_labels_by_first_appearance(inat, name, year, flat):
    if flat:  # DeiT's layout has no folders of kingdoms
        for number, kingdom in enumerate(('Fungi', 'Plants', 'Fungi')):
            shutil.move(inat / f'tv{year}' / kingdom / str(number), inat / f'tv{year}' / str(number))
    train, nb_classes = build(True, name, inat)
    assert (nb_classes, train.classes) == (3, ['species 2', 'species 1', 'species 0'])
    assert [train[index][1] for index in range(4)] == [0, 1, 2, 0]
    val, _ = build(False, name, inat)
    assert val.classes == train.classes
    assert [val[index][1] for index in range(2)] == [2, 1]


def test_inat_categories(inat):
    for category in datasets.INAT_CATEGORIES:
        dataset, nb_classes = build(True, 'INAT', inat, inat_category=category)
        assert nb_classes == len(dataset.classes) == (2 if category == 'kingdom' else 3)
    dataset, _ = build(True, 'INAT', inat, inat_category='kingdom')
    assert [label for _, label in dataset.samples] == [0, 1, 0, 0]
    user_error(lambda: build(True, 'INAT', inat, inat_category='tribe'), "'tribe'", 'supercategory')


def test_inat_names_are_text_that_a_checkpoint_holds(inat):
    entries = json.loads((inat / 'categories.json').read_text())
    entries[1]['name'] = 'a\x1b[2J\nb'
    (inat / 'categories.json').write_text(json.dumps(entries))
    assert build(True, 'INAT', inat)[0].classes == ['species 2', r'a\x1b[2J\nb', 'species 0']
    entries[1]['name'] = 'x' * 201
    (inat / 'categories.json').write_text(json.dumps(entries))
    user_error(lambda: build(True, 'INAT', inat), "class 'xxxx", 'a name of 201 characters, at most 200 can be kept')


def test_inat_mistakes(inat):
    user_error(lambda: build(True, 'INAT', inat / 'nowhere'), inat / 'nowhere')
    (inat / 'val2018.json').write_text('{')
    user_error(lambda: build(False, 'INAT', inat), inat / 'val2018.json')
    (inat / 'val2018.json').unlink()
    user_error(lambda: build(False, 'INAT', inat), inat / 'val2018.json')
    (inat / 'train2018.json').write_text('{"images": [{"file_name": "a/b/9/c.png"}], "annotations": []}')
    user_error(lambda: build(True, 'INAT', inat), inat, '2018')


def test_inat_damaged_image(inat):
    bad = inat / 'tv2018' / 'Fungi' / '2' / 'train0.png'
    bad.write_bytes(b'')
    with pytest.warns(UserWarning, match=re.escape(str(bad))):
        assert build(True, 'INAT', inat)[0][0][1] == 1
    bad = inat / 'tv2018' / 'Fungi' / '0' / 'val0.png'
    bad.write_bytes(b'')
    user_error(lambda: build(False, 'INAT', inat)[0][0], bad)


@pytest.mark.parametrize('name', ['Posterize', 'PosterizeIncreasing', 'PosterizeOriginal'])
def test_posterizing_to_any_number_of_bits(name):
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    posterize = auto_augment.NAME_TO_OP[name]
    for bits in range(9):
        mask = 256 - 2 ** (8 - bits)
        assert np.array_equal(np.asarray(posterize(image, bits)), np.asarray(image) & mask)
