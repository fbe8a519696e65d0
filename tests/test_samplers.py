"""Coverage, balance and resumption of the samplers, and the samples that come of the seeds they hand out."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Dataset

from datasets import Augmentation, ImageList, SeededSamples, build_transform
from samplers import ExactEvalSampler, RASampler, ResumableSampler, build_train_sampler

WORLDS = (1, 2, 3, 4, 7)
LENGTHS = (1, 5, 100, 255, 256, 1000)
every_shape = pytest.mark.parametrize(('world', 'length'), [(w, n) for w in WORLDS for n in LENGTHS])


def union(samplers) -> Counter:
    return Counter(index for sampler in samplers for index in sampler)


@every_shape
def test_exact_eval_sampler_covers_everything_once(world, length):
    samplers = [ExactEvalSampler(range(length), world, rank) for rank in range(world)]
    assert union(samplers) == Counter(range(length))
    lengths = [len(sampler) for sampler in samplers]
    assert lengths == [len(list(sampler)) for sampler in samplers]
    assert max(lengths) - min(lengths) <= 1


def test_exact_eval_sampler_may_be_empty():
    sampler = ExactEvalSampler(range(2), 3, 2)
    assert len(sampler) == 0
    assert list(DataLoader(range(2), batch_size=4, sampler=sampler)) == []


@every_shape
def test_repeated_augmentation_is_balanced_and_repeats_three_times(world, length):
    samplers = [RASampler(range(length), world, rank) for rank in range(world)]
    expected = length // 256 * 256 // world if length >= 256 else -(-length // world)
    assert [len(sampler) for sampler in samplers] == [expected] * world
    assert [len(list(sampler)) for sampler in samplers] == [expected] * world
    counts = union(samplers)
    assert set(counts) <= set(range(length))
    if expected * world <= 3 * length:
        # Whole triples, but for the last image.
        whole, rest = divmod(expected * world, 3)
        assert Counter(counts.values()) == Counter({3: whole}) + Counter({rest: 1 if rest else 0})


@pytest.mark.parametrize('world', WORLDS)
@pytest.mark.parametrize('shuffle', [True, False])
def test_repeated_augmentation_has_the_order_of_timm_for_seed_0(world, shuffle):
    for rank in range(world):
        ours, theirs = (kind(range(1000), world, rank, shuffle) for kind in (RASampler, RepeatAugSampler))
        ours.set_epoch(5)
        theirs.set_epoch(5)
        assert list(ours) == list(theirs)


def test_copies_of_an_image_go_to_different_processes():
    for world in (3, 4, 7):
        for rank in range(world):
            assert max(Counter(RASampler(range(1000), world, rank)).values()) == 1


def test_repeated_augmentation_with_more_processes_than_the_rounding():
    samplers = [RASampler(range(256), 300, rank) for rank in range(300)]
    assert {len(list(sampler)) for sampler in samplers} == {1}


@pytest.mark.parametrize('repeated_aug', [True, False])
def test_order_depends_on_epoch_and_seed(repeated_aug):
    def indices(seed, epoch):
        sampler = build_train_sampler(range(300), repeated_aug, 2, 1, seed)
        sampler.set_epoch(epoch)
        return [index for index, _ in sampler]

    assert indices(0, 3) == indices(0, 3)
    assert indices(0, 3) != indices(0, 4)
    assert indices(0, 3) != indices(7, 3)


@every_shape
@pytest.mark.parametrize('repeated_aug', [True, False])
def test_train_sampler_is_balanced_at_every_shape(world, length, repeated_aug):
    samplers = [build_train_sampler(range(length), repeated_aug, world, rank, 0) for rank in range(world)]
    assert len({len(sampler) for sampler in samplers}) == 1
    assert all(len(list(sampler)) == len(sampler) > 0 for sampler in samplers)
    if not repeated_aug:
        assert {index for sampler in samplers for index, _ in sampler} == set(range(length))


@pytest.mark.parametrize('repeated_aug', [True, False])
@pytest.mark.parametrize('start', [0, 1, 77, 128])
def test_resumption_continues_the_same_epoch(repeated_aug, start):
    whole = build_train_sampler(range(256), repeated_aug, 2, 1, 3)
    whole.set_epoch(4)
    resumed = build_train_sampler(range(256), repeated_aug, 2, 1, 3)
    resumed.set_epoch(4, start)
    assert len(resumed) == 128 - start
    assert list(resumed) == list(whole)[start:]
    resumed.set_epoch(5)
    assert len(resumed) == len(list(resumed)) == 128


@pytest.mark.parametrize('start', [-1, 11])
def test_start_outside_the_epoch_is_refused(start):
    sampler = build_train_sampler(range(10), False, 1, 0, 0)
    with pytest.raises(ValueError, match=f'start {start} '):
        sampler.set_epoch(0, start)


def test_seeds_are_distinct_over_position_rank_epoch_and_run():
    seeds = []
    for run in (0, 1):
        for rank in (0, 1):
            sampler = ResumableSampler(RASampler(range(256), 2, rank), run, rank)
            for epoch in (0, 1):
                sampler.set_epoch(epoch)
                seeds += [seed for _, seed in sampler]
    assert len(seeds) == len(set(seeds)) == 8 * 128
    assert all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds)
    # Well mixed: each bit is set about half of the time (1024 draws, six standard deviations).
    assert all(abs(sum(seed >> bit & 1 for seed in seeds) - 512) < 96 for bit in range(63))


# Samples from seeds


@pytest.fixture
def augmented(tmp_path):
    """24 image files under the published augmentation, with more random erasing."""
    samples = []
    for label in range(24):
        pixels = np.random.default_rng(label).integers(0, 256, (50, 60, 3), dtype=np.uint8)
        samples.append((str(tmp_path / f'{label}.png'), label))
        Image.fromarray(pixels).save(samples[-1][0])
    transform = build_transform(True, 48, augmentation=Augmentation(train_interpolation='random', reprob=0.7))
    return SeededSamples(ImageList(samples, [str(label) for label in range(24)], transform, skip_unreadable=True))


def batches(dataset, workers, start=0, epoch=3):
    """The batches of 4 of process 1 of 2, whatever the state of the random generators in this process."""
    random.seed()
    np.random.seed()
    torch.seed()
    sampler = build_train_sampler(dataset, False, 2, 1, seed=5)
    sampler.set_epoch(epoch, start)
    return list(DataLoader(dataset, batch_size=4, sampler=sampler, num_workers=workers))


def test_samples_do_not_depend_on_workers_nor_on_resumption(augmented):
    reference = batches(augmented, workers=0)
    assert len(reference) == 3
    for workers, start in ((2, 0), (2, 4), (0, 8)):
        found = batches(augmented, workers, start)
        assert len(found) == 3 - start // 4
        for (images, labels), (expected_images, expected_labels) in zip(found, reference[start // 4 :], strict=True):
            assert torch.equal(images, expected_images)
            assert torch.equal(labels, expected_labels)
    assert not torch.equal(batches(augmented, 0, epoch=4)[0][0], reference[0][0])


class Draws(Dataset):
    """One draw from each source of randomness."""

    classes = ['none']

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 2:
            raise IndexError('broken sample')
        return random.random(), np.random.random(), torch.rand(()).item()


def test_seeded_samples_leave_the_random_state_alone():
    def draws():
        return Draws()[0]

    def seed_all():
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)

    seed_all()
    expected = draws()
    seed_all()
    dataset = SeededSamples(Draws())
    first = dataset[0, 2**63 - 1]
    assert first != expected
    assert first == dataset[1, 2**63 - 1]
    assert all(a != b for a, b in zip(first, dataset[0, 7], strict=True))
    with pytest.raises(IndexError):
        dataset[2, 7]
    assert draws() == expected


def test_numpy_and_torch_draw_independently():
    raw = SeededSamples(RawDraws())
    assert all(numpy_bits != torch_bits for numpy_bits, torch_bits in (raw[0, seed] for seed in range(20)))


class RawDraws(Draws):
    """The first 24 bits that numpy and torch draw."""

    def __getitem__(self, index):
        return int(np.random.randint(0, 2**32, dtype=np.uint32)) % 2**24, int(torch.rand(()).item() * 2**24)


def test_seeded_samples_stand_for_their_base():
    dataset = SeededSamples(Draws())
    assert (dataset.classes, len(dataset)) == (['none'], 3)
    torch.manual_seed(0)
    expected = torch.rand(()).item()
    torch.manual_seed(0)
    assert dataset[0][2] == expected
