"""Where a run is in its data, and which samples each rank reads next: exact on any number of processes.

A global batch is a slice of the epoch's order (order.py); ranks, accumulation steps and workers only divide it up. So
the position is a few numbers, the same for all, and a run resumes from them on other processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from trainer.data.order import SampleLayout


@dataclass(frozen=True, kw_only=True)
class DataState:
    """Position in the data: `consumed` samples of this epoch, `samples_seen` since the run's start.

    No rank, worker or world size is in it. `samples_seen` numbers the samples: it keys their noise. What each
    bucket and each data set of a mix has given follows from it.
    """

    seed: int
    epoch: int
    consumed: int
    samples_seen: int

    def __post_init__(self) -> None:
        if min(self.epoch, self.consumed, self.samples_seen) < 0:
            raise ValueError(f"{self} is no position in the data")

    def start_of_batch(self, dataset_size: int, global_batch_size: int) -> "DataState":
        """The state at which the next global batch begins: in the next epoch, if too few samples of this one are left.

        After a change of the global batch size the position is first rounded up to a multiple of it, so that no
        batch lies across two blocks of buckets: at most one batch is left out of that epoch, none is repeated.
        """
        aligned = -(-self.consumed // global_batch_size) * global_batch_size
        if aligned + global_batch_size <= dataset_size:
            return replace(self, consumed=aligned)
        return replace(self, epoch=self.epoch + 1, consumed=0)

    def advance(self, num_samples: int, dataset_size: int, global_batch_size: int) -> "DataState":
        """The state after an optimizer step that used `num_samples`."""
        start = self.start_of_batch(dataset_size, global_batch_size)
        return replace(start, consumed=start.consumed + num_samples, samples_seen=start.samples_seen + num_samples)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Sample numbers of one micro-batch, and their global indices (keys of all randomness)."""

    samples: list[int]
    indices: list[int]


def micro_batches(
    layout: SampleLayout,
    state: DataState,
    *,
    micro_batch_size: int,
    num_micro_batches: int,
    rank: int,
    world_size: int,
    group_size: int,
) -> Iterator[MicroBatch]:
    """This rank's micro-batches for ever.

    Sample a * world * micro + rank * micro + j of a global batch is row j of accumulation step a: the global batch is
    the same whatever the numbers of ranks and steps, if their product is.
    """
    size, global_batch_size = layout.size, micro_batch_size * num_micro_batches * world_size
    epoch = -1
    while True:
        start = state.start_of_batch(size, global_batch_size)
        if start.epoch != epoch:
            epoch = start.epoch
            order = layout.order(state.seed, epoch, group_size)
        for a in range(num_micro_batches):
            offset = (a * world_size + rank) * micro_batch_size
            rows = range(offset, offset + micro_batch_size)
            yield MicroBatch(
                samples=[order[start.consumed + r] for r in rows], indices=[start.samples_seen + r for r in rows]
            )
        state = start.advance(global_batch_size, size, global_batch_size)
