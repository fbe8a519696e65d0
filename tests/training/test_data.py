"""The data of a run: what its data sets, loaders and mixing give for the values they are built from."""

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from datasets import Augmentation, Digits, build_transform
from training.data import (
    DataSource,
    Loading,
    Mixing,
    build_eval_dataset,
    build_eval_loader,
    build_mixup,
    build_train_dataset,
    build_train_loader,
    calibration_images,
    first_batch_images,
    rank_0_first,
)
from utils import Ranks, UserError

DIGITS = DataSource('DIGITS', None, 16)
CPU = torch.device('cpu')
PLAIN = Augmentation(aa=None, color_jitter=0., reprob=0.)


@pytest.fixture
def folder(tmp_path) -> DataSource:
    """Two classes of ImageNet's layout, with 3 images each to train on and one to evaluate."""
    make = np.random.default_rng(0)
    for part, number in (('train', 3), ('val', 1)):
        for name in ('ant', 'bee'):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(number):
                pixels = make.integers(0, 256, (70, 60, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f'{i}.png')
    return DataSource('IMNET', str(tmp_path), 48, eval_crop_ratio=0.75)


# Data sets


def test_training_images_are_augmented_by_their_seed(folder):
    dataset = build_train_dataset(folder, Augmentation(reprob=1.))
    assert (dataset.classes, len(dataset)) == (['ant', 'bee'], 6)
    image, label = dataset[4, 7]
    assert (image.shape, label) == ((3, 48, 48), 1)
    assert torch.equal(image, dataset[4, 7][0])
    assert not torch.equal(image, dataset[4, 8][0])


def test_the_augmentation_reaches_the_images(folder):
    fixed = build_train_dataset(folder, replace(PLAIN, random_resized_crop=False))
    crop = build_transform(False, 48, eval_crop_ratio=0.75)
    for seed in range(8):
        path, _ = fixed.base.samples[1]
        expected = crop(Image.open(path).convert('RGB'))
        image = fixed[1, seed][0]
        assert any(torch.allclose(image, either, atol=1e-6) for either in (expected, expected.flip(2)))
    moved = build_train_dataset(folder, PLAIN)
    assert not any(torch.allclose(moved[1, seed][0], either, atol=1e-6)
                   for seed in range(8) for either in (expected, expected.flip(2)))


def test_evaluation_images_take_the_crop_of_the_source(folder):
    dataset = build_eval_dataset(folder)
    for source, same in ((folder, True), (replace(folder, eval_crop_ratio=1.), False)):
        transform = build_transform(False, 48, eval_crop_ratio=source.eval_crop_ratio)
        image = transform(Image.open(dataset.samples[1][0]).convert('RGB'))
        assert torch.equal(dataset[1][0], image) is same


def test_expected_classes_reach_a_folder_without_a_training_part(folder):
    (Path(folder.data_path) / 'train').rename(Path(folder.data_path) / 'elsewhere')
    assert len(build_eval_dataset(folder, 2).classes) == 2
    with pytest.raises(UserError, match='has 2 class folders, not 3'):
        build_eval_dataset(folder, 3)


# Mixing


@pytest.mark.parametrize(('mixing', 'active'), [
    (Mixing(), False), (Mixing(smoothing=0.1), False), (Mixing(mixup=0.8), True), (Mixing(cutmix=1.), True),
    (Mixing(cutmix_minmax=(0.2, 0.8)), True),
])
def test_mixing_is_active_where_images_are_mixed(mixing, active):
    assert mixing.active is active
    assert (build_mixup(mixing, 10) is not None) is active


def test_mixed_labels_are_smoothed_distributions():
    np.random.seed(0)
    images, labels = build_mixup(Mixing(mixup=1., smoothing=0.1), 5)(torch.randn(4, 3, 2, 2), torch.arange(4))
    assert images.shape == (4, 3, 2, 2)
    torch.testing.assert_close(labels.sum(1), torch.ones(4))
    assert labels.min() == pytest.approx(0.1 / 5)
    assert (labels > 0.1 / 5).sum(1).tolist() == [2] * 4  # the image's own class and its partner's
    untouched = torch.randn(4, 3, 2, 2)
    mixed, _ = build_mixup(Mixing(mixup=1., mixup_prob=0.), 5)(untouched.clone(), torch.arange(4))
    assert torch.equal(mixed, untouched)


# Loaders


@pytest.mark.parametrize('repeated_aug', [False, True])
def test_a_training_loader_gives_full_batches_of_this_rank(repeated_aug):
    dataset, loading = build_train_dataset(DIGITS, Augmentation()), Loading(100, repeated_aug=repeated_aug, seed=3)
    seen = []
    for rank in (0, 1):
        loader, sampler = build_train_loader(dataset, loading, Ranks(rank, 2), CPU)
        seen += [index for index, _ in sampler]
        assert len(sampler) == (640 if repeated_aug else 721) and len(loader) == len(sampler) // 100
        images, labels = next(iter(loader))
        first = [dataset[item] for item in list(sampler)[:100]]
        assert torch.equal(images, torch.stack([image for image, _ in first]))
        assert labels.tolist() == [label for _, label in first]
    assert Counter(Counter(seen).values()) == ({3: 426, 2: 1} if repeated_aug else {1: 1442})


def test_too_few_images_for_a_batch_are_refused():
    with pytest.raises(UserError, match='^--batch-size 722, but an epoch has 721 images for each process: choose a'):
        build_train_loader(build_train_dataset(DIGITS, Augmentation()), Loading(722, repeated_aug=False), Ranks(0, 2),
                           CPU)


def test_an_evaluation_is_whole_or_shared_out():
    dataset = build_eval_dataset(DIGITS)
    labels = [dataset[index][1] for index in range(len(dataset))]
    for rank in (0, 1):
        for shared in (False, True):
            loader = build_eval_loader(dataset, Loading(64, dist_eval=shared), Ranks(rank, 2), CPU)
            batches = [part.tolist() for _, part in loader]
            assert sum(batches, []) == (labels[rank::2] if shared else labels)
            assert len(batches[0]) == 96  # half as much again as in training


def test_a_rank_without_evaluation_images_has_no_batches(folder):
    loader = build_eval_loader(build_eval_dataset(folder), Loading(4, dist_eval=True), Ranks(2, 3), CPU)
    assert list(loader) == []


@pytest.mark.parametrize(('pin_mem', 'device', 'pinned'), [
    (True, 'cpu', False), (True, 'cuda', True), (False, 'cuda', False)])
def test_memory_is_pinned_for_gpus(pin_mem, device, pinned):
    loading, device = Loading(8, pin_mem=pin_mem), torch.device(device)
    assert build_eval_loader(build_eval_dataset(DIGITS), loading, Ranks(), device).pin_memory is pinned
    loader, _ = build_train_loader(build_train_dataset(DIGITS, Augmentation()), loading, Ranks(), device)
    assert loader.pin_memory is pinned


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.processes)])
def test_loading_leaves_the_random_state_alone(workers):
    loading = Loading(512, num_workers=workers)
    before = torch.get_rng_state()
    loader, _ = build_train_loader(build_train_dataset(DIGITS, Augmentation()), loading, Ranks(), CPU)
    assert len(list(loader)) == 2
    list(build_eval_loader(build_eval_dataset(DIGITS), loading, Ranks(), CPU))
    assert torch.equal(torch.get_rng_state(), before)


# Images to calibrate on


def test_calibration_sees_drawn_images_as_in_evaluation(folder):
    dataset = build_train_dataset(folder, Augmentation())
    augmented = dataset.base.transform
    images = calibration_images(dataset, folder, 4, seed=5)
    drawn = torch.randperm(6, generator=torch.Generator().manual_seed(5))[:4].tolist()
    transform = build_transform(False, 48, eval_crop_ratio=0.75)
    assert torch.equal(images, torch.stack([
        transform(Image.open(dataset.base.samples[index][0]).convert('RGB')) for index in drawn]))
    assert dataset.base.transform is augmented
    assert not torch.equal(images, calibration_images(dataset, folder, 4, seed=6))
    assert len(calibration_images(dataset, folder, 100, seed=5)) == 6


def test_the_augmentation_is_back_after_a_failure(folder):
    dataset = build_train_dataset(folder, Augmentation())
    augmented, dataset.base.samples = dataset.base.transform, [('nowhere.png', 0)] * 60
    with pytest.raises(UserError), pytest.warns(UserWarning, match='unreadable'):
        calibration_images(dataset, folder, 1, seed=0)
    assert dataset.base.transform is augmented


def test_the_first_batch_is_that_of_the_loader():
    dataset = build_train_dataset(DIGITS, Augmentation())
    loader, sampler = build_train_loader(dataset, Loading(32, seed=4), Ranks(1, 2), CPU)
    assert torch.equal(first_batch_images(dataset, sampler, 32), next(iter(loader))[0])


# Several processes


def _look_in_turn(rank: int, folder: str) -> None:
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    with rank_0_first(Ranks(rank, 2)):
        (Path(folder) / f'{rank} saw {sorted(path.name for path in Path(folder).glob("done*"))}').touch()
        if rank == 0:
            time.sleep(0.5)  # what others would overtake
            (Path(folder) / 'done').touch()
    dist.destroy_process_group()


@pytest.mark.processes
def test_rank_0_goes_first(tmp_path):
    mp.start_processes(_look_in_turn, (str(tmp_path),), nprocs=2, start_method='fork')  # spared the imports
    assert sorted(path.name for path in tmp_path.glob('* saw *')) == ['0 saw []', "1 saw ['done']"]


def test_a_single_process_does_not_wait():
    with rank_0_first(Ranks()):
        dataset = build_eval_dataset(DIGITS)
    assert isinstance(dataset, Digits) and len(dataset) == 355
