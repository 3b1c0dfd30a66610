"""How the samples of one or more data sets, in buckets of picture sizes, make up an epoch.

An epoch of one data set in one bucket permutes shards, then samples inside groups of shards, so that reads stay
local to a few files. With several buckets it is a permuted sequence of blocks, each of one bucket; with several data
sets each block has the same number of samples of each, which start anew when they run out. Any position of any
epoch is computed directly, from (seed, epoch, position) alone; a few groups and blocks are in memory at a time.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.errors import require

Ints = NDArray[np.int64]
_KEPT = 3  # groups or blocks in memory
_LABELS, _SLOTS = 1 << 30, 1 << 31  # numbers of Philox streams, above those of groups of shards


class Order(Protocol):
    """Position in an epoch -> sample number."""

    def __getitem__(self, position: int) -> int: ...


def _generator(seed: int, epoch: int, group: int, stream: int = 0) -> np.random.Generator:
    key = [(seed + (stream << 48)) % (1 << 64), ((epoch << 32) + group) % (1 << 64)]
    return np.random.Generator(np.random.Philox(key=key))


class EpochOrder:
    """The order of one data set in one bucket, computed group by group.

    `starts` are the numbers of the first samples of its shards (by default they follow each other from 0).
    """

    def __init__(
        self,
        shard_sizes: Sequence[int] | Ints,
        *,
        seed: int,
        epoch: int,
        group_size: int,
        starts: Sequence[int] | Ints | None = None,
        stream: int = 0,
    ) -> None:
        self.key = (seed, epoch, stream)
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.starts = np.asarray(starts) if starts is not None else np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        order = _generator(seed, epoch, 0, stream).permutation(len(self.sizes))
        self.groups = [order[i : i + group_size] for i in range(0, len(order), group_size)]
        self.ends: list[int] = np.cumsum(np.add.reduceat(self.sizes[order], range(0, len(order), group_size))).tolist()
        self.cache: dict[int, Ints] = {}

    def __getitem__(self, position: int) -> int:
        number = bisect_right(self.ends, position)
        if number not in self.cache:
            if len(self.cache) >= _KEPT:
                self.cache.pop(next(iter(self.cache)))
            members = [np.arange(self.starts[s], self.starts[s] + self.sizes[s]) for s in self.groups[number]]
            seed, epoch, stream = self.key
            self.cache[number] = _generator(seed, epoch, number + 1, stream).permutation(np.concatenate(members))
        start = self.ends[number - 1] if number else 0
        return int(self.cache[number][position - start])


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The samples of one data set in one bucket: sizes of their shards and numbers of the first samples.

    `quota` of the samples of each block of the bucket are its; 0 where there are no blocks.
    """

    number: int
    sizes: Ints
    starts: Ints
    quota: int = 0

    @property
    def size(self) -> int:
        """Samples in all."""
        return int(self.sizes.sum())


@dataclass(frozen=True, kw_only=True)
class SampleLayout:
    """The streams of each bucket, and how many blocks of `block` samples an epoch has of each bucket.

    `block` is 0 for one data set in one bucket, whose samples simply follow each other.
    """

    buckets: list[list[Stream]]
    num_blocks: list[int]
    block: int

    @classmethod
    def of_shards(cls, shard_sizes: Sequence[int] | Ints) -> "SampleLayout":
        """One data set in one bucket."""
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        return cls(buckets=[[Stream(number=0, sizes=sizes, starts=starts)]], num_blocks=[], block=0)

    @property
    def size(self) -> int:
        """Samples of an epoch."""
        return self.buckets[0][0].size if self.block == 0 else self.block * sum(self.num_blocks)

    def order(self, seed: int, epoch: int, group_size: int) -> Order:
        """The order of an epoch."""
        if self.block == 0:
            (stream,) = self.buckets[0]
            return EpochOrder(stream.sizes, seed=seed, epoch=epoch, group_size=group_size, starts=stream.starts)
        return BlockOrder(self, seed, epoch, group_size)


class BlockOrder:
    """The order of an epoch of several buckets or data sets."""

    def __init__(self, layout: SampleLayout, seed: int, epoch: int, group_size: int) -> None:
        self.layout, self.seed, self.epoch, self.group_size = layout, seed, epoch, group_size
        labels = np.repeat(np.arange(len(layout.buckets), dtype=np.int16), layout.num_blocks)
        self.labels = _generator(seed, epoch, _LABELS).permutation(labels)
        self.rank = np.empty(len(labels), dtype=np.int64)  # which block of its bucket a block is
        for bucket, count in enumerate(layout.num_blocks):
            self.rank[self.labels == bucket] = np.arange(count)
        self.orders: dict[tuple[int, int], EpochOrder] = {}
        self.slots: dict[int, Ints] = {}

    def __getitem__(self, position: int) -> int:
        block, row = divmod(position, self.layout.block)
        bucket = int(self.labels[block])
        streams = self.layout.buckets[bucket]
        if len(streams) == 1:  # one data set: its tail that fills no block is left out
            return self._order(streams[0], self.epoch)[int(self.rank[block]) * self.layout.block + row]
        slot = int(self._slots(block)[row])
        for stream in streams:
            if slot < stream.quota:
                break
            slot -= stream.quota
        number = self.epoch * self.layout.num_blocks[bucket] + int(self.rank[block])
        epoch, place = divmod(number * stream.quota + slot, stream.size)
        return self._order(stream, epoch)[place]

    def _slots(self, block: int) -> Ints:
        """Which of a block's slots each of its positions is."""
        if block not in self.slots:
            if len(self.slots) >= _KEPT:
                self.slots.pop(next(iter(self.slots)))
            self.slots[block] = _generator(self.seed, self.epoch, _SLOTS + block).permutation(self.layout.block)
        return self.slots[block]

    def _order(self, stream: Stream, epoch: int) -> EpochOrder:
        key = (stream.number, epoch)
        if key not in self.orders:
            for old in [k for k in self.orders if k[0] == stream.number and k[1] < epoch - 1]:
                del self.orders[old]
            self.orders[key] = EpochOrder(
                stream.sizes, seed=self.seed, epoch=epoch, group_size=self.group_size,
                starts=stream.starts, stream=stream.number,
            )  # fmt: skip
        return self.orders[key]


def build_layout(
    sizes: Sequence[int],
    buckets: Sequence[int],
    sets: Sequence[int],
    weights: Sequence[float],
    block: int,
    drop_small: bool,
) -> tuple[SampleLayout, dict[int, int]]:
    """A layout of shards of these sizes, buckets and data sets; and by bucket, samples that no epoch uses.

    `weights` are the shares of the data sets. ConfigError about a bucket or a weight too small for a block of
    `block` samples; with `drop_small` such a bucket is left out.
    """
    size_s, bucket_s, set_s = (np.asarray(values, dtype=np.int64) for values in (sizes, buckets, sets))
    if len(weights) == 1 and len(np.unique(bucket_s)) == 1:
        return SampleLayout.of_shards(size_s), {int(bucket_s[0]): 0}
    start_s = np.concatenate([[0], np.cumsum(size_s)[:-1]]).astype(np.int64)
    totals = [int(size_s[set_s == d].sum()) for d in range(len(weights))]
    share = np.asarray(weights, dtype=np.float64) / sum(weights)
    streams: list[list[Stream]] = []
    counts: list[int] = []
    unused: dict[int, int] = {}
    for bucket in np.unique(bucket_s).tolist():
        members = {d: (bucket_s == bucket) & (set_s == d) for d in range(len(weights))}
        found = {d: int(size_s[mask].sum()) for d, mask in members.items() if mask.any()}
        part = {d: float(share[d]) * count / totals[d] for d, count in found.items()}  # of all samples trained on
        wanted = sum(found.values()) if len(weights) == 1 else sum(totals) * sum(part.values())
        count = int(wanted) // block
        unused[bucket] = found[0] - count * block if len(weights) == 1 else 0
        if count == 0:
            require(
                drop_small,
                f"a bucket has {sum(found.values())} samples, too few for data.bucket_block={block}: lower it, set "
                "data.small_buckets=drop to leave such buckets out, or encode with fewer data.buckets",
            )
            unused[bucket] = sum(found.values())
            continue
        quotas = _quotas(part, block)
        streams.append(
            [
                Stream(
                    number=int(1 + d * (int(bucket_s.max()) + 1) + bucket),
                    sizes=size_s[members[d]],
                    starts=start_s[members[d]],
                    quota=quotas[d],
                )
                for d in found
            ]
        )
        counts.append(count)
    require(bool(streams), f"no bucket has the {block} samples of data.bucket_block: lower it")
    return SampleLayout(buckets=streams, num_blocks=counts, block=block), unused


def _quotas(part: Mapping[int, float], block: int) -> dict[int, int]:
    """Samples of each data set in a block, by largest remainder; ConfigError if one would get none."""
    exact = {d: block * value / sum(part.values()) for d, value in part.items()}
    quotas = {d: int(value) for d, value in exact.items()}
    for d in sorted(exact, key=lambda d: quotas[d] - exact[d])[: block - sum(quotas.values())]:
        quotas[d] += 1
    for d, quota in quotas.items():
        require(
            quota > 0, f"data.mix: data set {d} would give no sample to a block of {block}: raise data.bucket_block"
        )
    return quotas
