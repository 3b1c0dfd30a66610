"""The order in which samples are used, as a function of a small state: exact on any number of processes.

Global batch t is a slice of the epoch's order; ranks, accumulation steps and workers only divide it up. The
order permutes shards, then samples inside groups of shards, so that reads stay local to a few files.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class DataState:
    """Position in the data: `consumed` samples of this epoch, `samples_seen` since the run's start.

    No rank, worker or world size is in it. `samples_seen` numbers the samples: it keys their noise.
    """

    seed: int
    epoch: int
    consumed: int
    samples_seen: int

    def to_dict(self) -> dict[str, int]:
        """For `state.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "DataState":
        """Inverse of `to_dict`."""
        return cls(**content)

    def start_of_batch(self, dataset_size: int, global_batch_size: int) -> "DataState":
        """The state at which the next global batch begins: the next epoch if this one's rest is too small."""
        if self.consumed + global_batch_size <= dataset_size:
            return self
        return replace(self, epoch=self.epoch + 1, consumed=0)

    def advance(self, num_samples: int, dataset_size: int, global_batch_size: int) -> "DataState":
        """The state after an optimizer step that used `num_samples`."""
        start = self.start_of_batch(dataset_size, global_batch_size)
        return replace(start, consumed=start.consumed + num_samples, samples_seen=start.samples_seen + num_samples)


class EpochOrder:
    """Position in an epoch -> sample number, computed group by group; a few groups are kept in memory."""

    def __init__(self, shard_sizes: list[int], *, seed: int, epoch: int, group_size: int) -> None:
        self.seed, self.epoch = seed, epoch
        self.first = np.concatenate([[0], np.cumsum(shard_sizes)])
        order = _generator(seed, epoch, 0).permutation(len(shard_sizes))
        self.groups = [order[i : i + group_size] for i in range(0, len(order), group_size)]
        sizes = np.asarray(shard_sizes)
        self.ends = np.cumsum([sizes[group].sum() for group in self.groups]).tolist()
        self.cache: dict[int, np.ndarray[Any, Any]] = {}

    def __getitem__(self, position: int) -> int:
        number = bisect_right(self.ends, position)
        if number not in self.cache:
            if len(self.cache) > 2:
                self.cache.pop(next(iter(self.cache)))
            members = [np.arange(self.first[s], self.first[s + 1]) for s in self.groups[number]]
            self.cache[number] = _generator(self.seed, self.epoch, number + 1).permutation(np.concatenate(members))
        start = self.ends[number - 1] if number else 0
        return int(self.cache[number][position - start])


def _generator(seed: int, epoch: int, group: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, (epoch << 32) + group]))


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Sample numbers of one micro-batch, and their global indices (keys of all randomness)."""

    samples: list[int]
    indices: list[int]


def micro_batches(
    shard_sizes: list[int],
    state: DataState,
    *,
    micro_batch_size: int,
    num_micro_batches: int,
    rank: int,
    world_size: int,
    group_size: int,
) -> Iterator[MicroBatch]:
    """This rank's micro-batches for ever.

    Sample a * world * micro + rank * micro + j of a global batch is row j of accumulation step a.
    """
    size, global_batch_size = sum(shard_sizes), micro_batch_size * num_micro_batches * world_size
    order, epoch = None, -1
    while True:
        start = state.start_of_batch(size, global_batch_size)
        if order is None or start.epoch != epoch:
            epoch = start.epoch
            order = EpochOrder(shard_sizes, seed=state.seed, epoch=epoch, group_size=group_size)
        for a in range(num_micro_batches):
            offset = (a * world_size + rank) * micro_batch_size
            rows = range(offset, offset + micro_batch_size)
            yield MicroBatch(
                samples=[order[start.consumed + r] for r in rows],
                indices=[start.samples_seen + r for r in rows],
            )
        state = start.advance(global_batch_size, size, global_batch_size)
