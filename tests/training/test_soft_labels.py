"""Stored answers of a teacher: they are its own, for the crops that training shows."""

import json

import pytest
import safetensors.torch
import torch
from helpers import TINY, run
from PIL import Image
from torch import nn

import soft_labels
from _quan_base import is_calibrated
from checkpoints.networks import open_network
from datasets import Augmentation, Digits, SeededSamples, build_transform
from losses import Distillation, DistillationLoss, SoftLabels
from models import Teacher
from training.data import DataSource, build_train_dataset, calibration_images
from training.methods.soft_labels import StoredCrops, StoredLabels, fingerprint, raw_image, take_crop, top_k
from utils import UserError

pytestmark = pytest.mark.usefixtures('one_thread')
DIGITS = DataSource('DIGITS', None, 16)


def write(path, teacher_path, *flags) -> int:
    return soft_labels.main([str(part) for part in (
        '--teacher-path', teacher_path, '--input-size', 16, '--num_workers', 0, '--device', 'cpu', '--crops-per-image',
        2, '--batch-size', 512, '--output', path, *flags)])


@pytest.fixture(scope='module')
def all_classes(teacher_path, tmp_path_factory):
    """Of every class, for two crops of each training digit."""
    path = tmp_path_factory.mktemp('labels') / 'labels.safetensors'
    torch.set_num_threads(1)
    assert write(path, teacher_path, '--top-k', 10) == 0
    return path


@pytest.mark.slow
def test_with_all_classes_the_labels_are_the_teachers_softmax(all_classes, teacher_path):
    stored = StoredLabels.read(all_classes)
    assert stored.values.shape == stored.indices.shape == (1442, 2, 10) and stored.boxes.shape == (1442, 2, 4)
    teacher, base = open_network(teacher_path).model, Digits(True, raw_image)
    for first in (0, 256):  # in the batches of the command: those of another size differ in the last digit
        crops = torch.stack([take_crop(base[i][0], stored.boxes[i, m].tolist(), bool(stored.flips[i, m]), 16, 'bicubic')
                             for i in range(first, first + 256) for m in (0, 1)])
        with torch.no_grad():
            expected = teacher(crops).softmax(1).half()
        of_batch = slice(first, first + 256)
        labels = SoftLabels(None, stored.indices[of_batch].flatten(0, 1), stored.values[of_batch].flatten(0, 1))
        assert torch.equal(labels.probabilities(10), expected.float())
    areas = stored.boxes[..., 2:].prod(-1) / 64
    assert areas.min() < 0.3 and areas.max() > 0.9 and not stored.flips.any()  # a mirrored digit is another


def test_the_rest_is_spread_evenly():
    probabilities = torch.tensor([[0.5, 0.0625, 0.25, 0.125, 0.0625]])
    labels = SoftLabels(torch.tensor([3]), *top_k(probabilities, 2))
    assert labels.indices.tolist() == [[0, 2]] and labels.values.dtype == torch.half
    torch.testing.assert_close(labels.probabilities(5), torch.tensor([[0.5, 1 / 12, 0.25, 1 / 12, 1 / 12]]))
    torch.testing.assert_close(labels.logits(5).softmax(1), labels.probabilities(5))
    sure = SoftLabels(torch.tensor([0]), *top_k(torch.tensor([[1., 0., 0.]]), 3))
    assert sure.logits(3).isfinite().all() and sure.probabilities(3).tolist() == [[1., 0., 0.]]


@pytest.mark.parametrize('kind', ['soft', 'both', 'hard'])
def test_the_loss_is_that_of_the_teacher(kind):
    torch.manual_seed(0)
    model, images, labels = nn.Sequential(nn.Flatten(), nn.Linear(12, 6)), torch.randn(5, 3, 2, 2), torch.arange(5)
    outputs = torch.randn(5, 6), torch.randn(5, 6)
    distillation = Distillation(kind, 0.7, 2.)
    expected = DistillationLoss(nn.CrossEntropyLoss(), Teacher(model), distillation)(images, outputs, labels)
    with torch.no_grad():
        stored = SoftLabels(labels, *top_k(model(images).softmax(1), 6))
    criterion = DistillationLoss(nn.CrossEntropyLoss(), None, distillation, stored_labels=True)
    found = criterion(images, outputs, stored)
    assert found.keys() == expected.keys() == {'loss', 'loss_cls', 'loss_distill'}
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)
    with pytest.raises(UserError, match='needs a teacher'):
        DistillationLoss(nn.CrossEntropyLoss(), None, distillation)


def test_items_are_stored_crops_with_their_own_labels(all_classes):
    stored = StoredLabels.read(all_classes)
    dataset, base = SeededSamples(StoredCrops(Digits(True, raw_image), stored, 16)), Digits(True, raw_image)
    assert len(dataset) == 1442 and dataset.classes == Digits.classes
    drawn = set()
    for seed in range(8):
        pixels, labels = dataset[7, seed]
        assert labels.labels == base.targets[7]
        crop, = (m for m in (0, 1) if torch.equal(labels.values, stored.values[7, m]))
        assert torch.equal(pixels, take_crop(base[7][0], stored.boxes[7, crop].tolist(), False, 16, 'bicubic'))
        assert torch.equal(pixels, dataset[7, seed][0])
        drawn.add(crop)
    assert drawn == {0, 1}


def test_training_shows_crops_and_calibration_whole_images(all_classes, capsys):
    dataset = build_train_dataset(DIGITS, Augmentation(), str(all_classes))
    said = f'--soft-labels {all_classes}: 2 crops of 1442 images, 10 classes each, by best_checkpoint.pth; without'
    assert capsys.readouterr().out.startswith(said)
    whole = Digits(True, build_transform(False, 16, 'DIGITS'))
    drawn = torch.randperm(1442, generator=torch.Generator().manual_seed(3))[:5].tolist()
    images = calibration_images(dataset, DIGITS, 5, seed=3)
    assert torch.equal(images, torch.stack([whole[index][0] for index in drawn]))
    assert isinstance(dataset[drawn[0], 0][1], SoftLabels)  # and crops again afterwards


def test_a_crop_is_what_its_box_says():
    image = Image.new('RGB', (8, 6))
    image.putpixel((5, 2), (255, 255, 255))
    crop = take_crop(image, [1, 4, 4, 4], False, 4, 'bilinear')  # rows 1 to 4, columns 4 to 7
    assert (crop[0] > 1).nonzero().tolist() == [[1, 1]]
    assert (take_crop(image, [1, 4, 4, 4], True, 4, 'bilinear')[0] > 1).nonzero().tolist() == [[1, 2]]


@pytest.mark.whole_run
def test_a_run_without_a_teacher(all_classes, teacher_path, tmp_path, capsys):
    for calibration in ('published', 'mse'):
        assert run(*TINY, '--epochs', 1, '--soft-labels', all_classes, '--distillation-type', 'both', '--finetune',
                   teacher_path, '--calibration', calibration, '--output_dir', tmp_path) == 0
        said = capsys.readouterr().out
        assert f'--soft-labels {all_classes}: 2 crops of 1442 images, 10 classes each' in said
        assert 'Accuracy of the teacher' not in said
        log = json.loads((tmp_path / 'log.txt').read_text().splitlines()[-1])
        assert log['train_loss_distill'] > 0 and log['test_acc1'] > 15
        assert is_calibrated(open_network(tmp_path / 'checkpoint.pth').model)


def test_other_images_or_sizes_are_refused(all_classes, tmp_path):
    stored = StoredLabels.read(all_classes)
    with pytest.raises(UserError, match='for --input-size 16, not 32'):
        StoredCrops(Digits(True, raw_image), stored, 32)
    with pytest.raises(UserError, match='1442 other images than the 355 here'):
        StoredCrops(Digits(False, raw_image), stored, 16)
    shuffled = Digits(True, raw_image)
    shuffled.targets = shuffled.targets[::-1]
    with pytest.raises(UserError, match='other images'):
        StoredCrops(shuffled, stored, 16)


def test_what_is_no_file_of_soft_labels_is_refused(tmp_path):
    path = tmp_path / 'x.safetensors'
    with pytest.raises(UserError, match='cannot be read .*: write it with soft_labels.py'):
        StoredLabels.read(path)
    path.write_bytes(b'no such format')
    with pytest.raises(UserError, match='cannot be read .*: write it with soft_labels.py'):
        StoredLabels.read(path)
    safetensors.torch.save_file({'x': torch.zeros(1)}, path)
    with pytest.raises(UserError, match='holds no soft labels'):
        StoredLabels.read(path)


@pytest.mark.parametrize(('flags', 'line'), [
    (('--top-k', 11), '--top-k 11: DIGITS has 10 classes'),
    (('--crops-per-image', 0), '--crops-per-image 0: choose a value of at least 1'),
    (('--crop-scale', 0.5, 0.2), '--crop-scale 0.5 0.2: choose two rising values up to 1'),
    (('--data-set', 'IMNET'), '--data-set IMNET needs --data-path'),
    (('--output', 'nowhere/labels.safetensors'), '--output nowhere/labels.safetensors: there is no such folder'),
    (('--crops', 3), 'unrecognized arguments'),
])
def test_refused_in_one_line(flags, line, teacher_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert write(tmp_path / 'labels.safetensors', teacher_path, *flags) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and line in err
    assert soft_labels.main(['--output', 'x']) == 2
    assert 'name it with --teacher-model or --teacher-path' in capsys.readouterr().err


# --- damaged files ----------------------------------------------------------------------------------------------------


def sound_labels() -> tuple[dict, dict]:
    """Tensors and words of a file of two crops of each training digit."""
    base = Digits(True, raw_image)
    count = len(base)
    tensors = {'boxes': torch.tensor([0, 0, 8, 8], dtype=torch.int32).repeat(count, 2, 1),
               'flips': torch.zeros(count, 2, dtype=torch.bool),
               'indices': torch.arange(3, dtype=torch.int32).repeat(count, 2, 1),
               'values': torch.tensor([0.5, 0.3, 0.2]).half().repeat(count, 2, 1)}
    return tensors, {'format': 'soft labels 1', 'input_size': '16', 'interpolation': 'bicubic',
                     'fingerprint': fingerprint(base), 'teacher': 'deit\x1b[2J'}


def test_a_sound_file_is_taken_and_its_teacher_is_shown_escaped(tmp_path, capsys):
    tensors, words = sound_labels()
    safetensors.torch.save_file(tensors, tmp_path / 'x', words)
    dataset = build_train_dataset(DIGITS, Augmentation(), str(tmp_path / 'x'))
    assert 'by deit\\x1b[2J;' in capsys.readouterr().out and dataset[0, 1][1].indices.tolist() == [0, 1, 2]


@pytest.mark.parametrize(('name', 'at', 'value', 'line'), [
    ('values', (0, 0, 0), float('nan'), 'no probabilities from 0 to 1'),
    ('values', (0, 0, 0), 1.5, 'no probabilities'), ('values', (0, 0, 2), -0.1, 'no probabilities'),
    ('values', (0, 0, 1), 0.6, 'falling order'), ('values', (0, 0), torch.tensor([.9, .9, .9]).half(), 'more than 1'),
    ('indices', (0, 0, 0), -1, 'are negative'), ('indices', (0, 0, 0), 2, 'name a class twice'),
    ('indices', (5, 1, 0), 10, '--soft-labels name class 10, the data set has 10'),
    ('boxes', (0, 0, 0), -1, 'outside of any image'), ('boxes', (0, 0, 2), 0, 'outside of any image'),
    ('boxes', (0, 0, 0), 2 ** 30, 'outside of any image')], ids=str)
def test_values_that_are_no_labels_are_refused(name, at, value, line, tmp_path):
    tensors, words = sound_labels()
    tensors[name][at] = value
    safetensors.torch.save_file(tensors, tmp_path / 'x', words)
    with pytest.raises(UserError, match=line):
        build_train_dataset(DIGITS, Augmentation(), str(tmp_path / 'x'))


def test_a_crop_outside_of_its_image_is_refused(tmp_path):
    tensors, words = sound_labels()
    tensors['boxes'][7] = torch.tensor([4, 4, 5, 4])
    safetensors.torch.save_file(tensors, tmp_path / 'x', words)
    dataset = build_train_dataset(DIGITS, Augmentation(), str(tmp_path / 'x'))
    with pytest.raises(UserError, match='crop outside of image 7'):
        dataset[7, 0]


@pytest.mark.parametrize(('name', 'change', 'line'), [
    ('boxes', lambda tensor: tensor[..., :3].contiguous(), 'boxes have not 4 numbers'),
    ('boxes', lambda tensor: tensor.long(), 'boxes are of type torch.int64'),
    ('flips', lambda tensor: tensor[:, 0].contiguous(), 'boxes are of type'),
    ('indices', lambda tensor: tensor[..., :2].contiguous(), 'as many indices as values'),
    ('values', lambda tensor: tensor.float(), 'values are of type torch.float32'),
    ('values', lambda tensor: tensor[..., :0].contiguous(), 'values are of type')])
def test_tensors_of_another_form_are_refused(name, change, line, tmp_path):
    tensors, words = sound_labels()
    safetensors.torch.save_file(tensors | {name: change(tensors[name])}, tmp_path / 'x', words)
    with pytest.raises(UserError, match=line):
        StoredLabels.read(tmp_path / 'x')


@pytest.mark.parametrize(('name', 'value', 'line'), [
    ('input_size', None, 'its input_size is missing'), ('input_size', 'x', "its input_size is 'x'"),
    ('interpolation', 'lanczos', 'its interpolation'), ('fingerprint', '\x1b', 'its fingerprint'),
    ('teacher', None, 'its teacher is missing')])
def test_words_that_are_missing_or_wrong_are_refused(name, value, line, tmp_path):
    tensors, words = sound_labels()
    words = {key: item for key, item in (words | {name: value}).items() if item is not None}
    safetensors.torch.save_file(tensors, tmp_path / 'x', words)
    with pytest.raises(UserError, match=line):
        StoredLabels.read(tmp_path / 'x')
