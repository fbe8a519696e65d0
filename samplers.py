"""Which samples of an epoch each process sees, in what order, and with which random seed."""

from collections.abc import Iterator, Sized

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler, Sampler

_REPEATS = 3
_ROUND = 256


class RASampler(RepeatAugSampler):
    """Repeated augmentation as in DeiT: an epoch shows about len(dataset) samples, each chosen image up to 3 times.

    The copies of one image lie next to each other in the global order, so they go to different processes and get
    different augmentations. Every process gets the same number of samples: len(dataset), rounded down to a multiple
    of 256, over `num_replicas`; a data set too small for this rounding is taken whole (rounded up).

    timm's class works out these lengths. The order is worked out here because timm's shuffles by the epoch alone,
    and because its padding fails in some releases when there are more processes than samples.
    """

    def __init__(self, dataset: Sized, num_replicas: int, rank: int, shuffle: bool = True, seed: int = 0) -> None:
        rounding = _ROUND if len(dataset) // _ROUND * _ROUND >= num_replicas else 0
        super().__init__(dataset, num_replicas, rank, shuffle, num_repeats=_REPEATS, selected_round=rounding)
        self.seed = seed

    def __iter__(self) -> Iterator[int]:
        size = len(self.dataset)
        if self.shuffle:
            # The seed joins the epoch in the same way as in DistributedSampler.
            order = torch.randperm(size, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        else:
            order = torch.arange(size)
        # Positions in the endless list a a a b b b ... of which this process takes every num_replicas-th.
        positions = self.rank + self.num_replicas * torch.arange(len(self))
        return iter(order[positions // _REPEATS % size].tolist())


class ExactEvalSampler(Sampler[int]):
    """Every index exactly once over all processes, without padding.

    Process `rank` gets the indices rank, rank + num_replicas, ...: lengths differ by at most one and may be zero.
    """

    def __init__(self, dataset: Sized, num_replicas: int, rank: int) -> None:
        self._indices = range(rank, len(dataset), num_replicas)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


class ResumableSampler(Sampler[tuple[int, int]]):
    """Pairs each index of `sampler` with a seed for that sample, and can start in the middle of an epoch.

    The seed is a function of (seed, epoch, rank, position in the epoch) only, so the samples do not depend on the
    number of data-loading workers nor on whether the epoch was interrupted. It lies in [0, 2**63).

    Args:
        sampler: has `set_epoch(epoch)`, and yields one process' indices of that epoch.
        seed: the run's seed, at least 0.
        rank: this process' number, at least 0.
    """

    def __init__(self, sampler: DistributedSampler | RASampler, seed: int, rank: int) -> None:
        self.sampler = sampler
        self.seed = seed
        self.rank = rank
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, of which this process has consumed `start` samples already.

        Raises:
            ValueError: `start` is not within [0, samples of an epoch].
        """
        if not 0 <= start <= len(self.sampler):
            raise ValueError(f'start {start} is not within the {len(self.sampler)} samples of an epoch')
        self.sampler.set_epoch(epoch)
        self.epoch = epoch
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        indices = list(self.sampler)[self.start :]
        # numpy promises that a bit generator's raw stream never changes, which it does not for its distributions.
        stream = np.random.PCG64(np.random.SeedSequence((self.seed, self.epoch, self.rank)))
        seeds = (stream.random_raw(len(self.sampler))[self.start :] >> np.uint64(1)).tolist()
        return zip(indices, seeds, strict=True)

    def __len__(self) -> int:
        """Samples that remain of the epoch from `start` on."""
        return len(self.sampler) - self.start


class StreamOrder:
    """The order of a data set that gives its images from the first on only, in the place of a `ResumableSampler`.

    Args:
        stream: has `set_epoch(epoch, is_over)` and a length, the images of one process in an epoch.
        generator: of its loader, from which workers get their seeds.
        seed: the run's seed.
    """

    def __init__(self, stream: Sized, generator: torch.Generator, seed: int) -> None:
        self.sampler, self._length, self._generator, self._seed = stream, len(stream), generator, seed

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch.

        Raises:
            ValueError: `start` is neither 0 nor its end, where nothing is left to read.
        """
        if start not in (0, self._length):
            raise ValueError(f'start {start}: a stream can only be read from its beginning')
        self.sampler.set_epoch(epoch, is_over=start > 0)
        self._generator.manual_seed(self._seed + epoch)


def build_train_sampler(
    dataset: Sized, repeated_aug: bool, num_replicas: int, rank: int, seed: int
) -> ResumableSampler:
    """The shuffled, seeded and resumable training sampler of one process.

    Args:
        dataset: the training data, at least one sample.
        repeated_aug: show each chosen image three times (`RASampler`) instead of each image once.
        num_replicas: number of processes.
        rank: this process' number, 0 .. num_replicas - 1.
        seed: the run's seed, at least 0 and the same in all processes.
    """
    if repeated_aug:
        sampler = RASampler(dataset, num_replicas, rank, seed=seed)
    else:
        sampler = DistributedSampler(dataset, num_replicas, rank, shuffle=True, seed=seed)
    return ResumableSampler(sampler, seed, rank)
