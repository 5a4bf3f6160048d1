"""The order of samples: one endless sequence, epoch after epoch, divided among the ranks.

Samples are numbered from the start of training. With n samples per epoch, number g is sample g mod n of epoch g div n. An
optimizer step takes the next numbers, independent of the number of processes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from mask2dit.randomness import generator_for


class Position(NamedTuple):
    """The index of a sample in a dataset: its epoch and its position in the epoch."""

    epoch: int
    position: int


def sample_order(num_items: int, seed: int, epoch: int) -> torch.Tensor:
    """A permutation of 0 … num_items - 1 that differs between epochs, (num_items,) int64."""
    return torch.randperm(num_items, generator=generator_for(seed, "order", epoch))


class PositionSampler(Sampler[Position]):
    """One rank's positions of the samples `start` … `stop - 1`: every `world_size`-th from number `start + rank` on.

    A remainder at the end that does not give every rank a sample is dropped, so that all ranks take the same number of steps.
    A run that has taken g samples over all ranks continues with `start=g`.

    Args:
        samples_per_epoch: the length of the dataset.
        start, stop: the first sample and the one after the last, counted over all epochs and ranks.
        rank, world_size: the number of this process, and of all processes.

    Raises:
        ValueError: if there is no sample for every rank, or `rank` is not in 0 … world_size - 1.
    """

    def __init__(self, samples_per_epoch: int, start: int, stop: int, rank: int = 0, world_size: int = 1):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} has to be one of 0 to {world_size - 1}")
        if samples_per_epoch < 1:
            raise ValueError(f"an epoch needs at least one sample, but has {samples_per_epoch}")
        if not 0 <= start <= stop - world_size:
            raise ValueError(f"samples {start} to {stop - 1} are too few for {world_size} ranks to get one each")
        self.samples_per_epoch = samples_per_epoch
        count = (stop - start) // world_size * world_size
        self._numbers = range(start + rank, start + count, world_size)

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Position]:
        for number in self._numbers:
            yield Position(*divmod(number, self.samples_per_epoch))
