"""The order in which an epoch uses samples: of one or more data sets, with pictures of one or more sizes.

All samples of one picture size are a bucket. A batch is of one size, so an epoch is laid out in this way:

- one data set in one bucket: shards in random order, and samples in random order within each group of shards, so that
  reads stay local to a few files (`EpochOrder`);
- several buckets: blocks of `block` samples in random order, each of one bucket (`BlockOrder`); a block is a whole
  number of global batches;
- several data sets: besides, each block has a fixed number of samples from each data set (its quota); a data set that
  runs out starts anew, in another order.

Every position of every epoch is computed from (seed, epoch, position) alone, without walking there: that is why a run
resumes exactly on any number of processes. A few groups and blocks are in memory at a time.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trainer.errors import require

Ints = NDArray[np.int64]
_KEPT = 3  # groups or blocks in memory at a time
# Numbers of random streams beside those of groups of shards, which count from 0: no two draws share one.
_BLOCK_SEQUENCE, _WITHIN_BLOCK = 1 << 30, 1 << 31


def _generator(seed: int, epoch: int, group: int, stream: int = 0) -> np.random.Generator:
    """Random numbers for one purpose: Philox's key of 128 bits holds the arguments side by side."""
    key = [(seed + (stream << 48)) % (1 << 64), ((epoch << 32) + group) % (1 << 64)]
    return np.random.Generator(np.random.Philox(key=key))


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The samples of one data set in one bucket: the sizes of their shards and each shard's first sample number.

    Each block of the bucket takes `quota` samples of it; 0 where there are no blocks. `number` keys its random order.
    """

    number: int
    sizes: Ints
    starts: Ints
    quota: int = 0

    @property
    def size(self) -> int:
        """Samples in all."""
        return int(self.sizes.sum())


class EpochOrder:
    """The order of one data set in one bucket, computed group of shards by group of shards."""

    def __init__(self, stream: Stream, seed: int, epoch: int, group_size: int) -> None:
        self.stream, self.key = stream, (seed, epoch)
        order = _generator(seed, epoch, 0, stream.number).permutation(len(stream.sizes))
        self.groups = [order[i : i + group_size] for i in range(0, len(order), group_size)]
        sizes = np.add.reduceat(stream.sizes[order], range(0, len(order), group_size))
        self.ends: list[int] = np.cumsum(sizes).tolist()
        self.drawn = lru_cache(_KEPT)(self._draw)

    def __getitem__(self, position: int) -> int:
        number = bisect_right(self.ends, position)  # of the group that holds the position
        start = self.ends[number - 1] if number else 0
        return int(self.drawn(number)[position - start])

    def _draw(self, number: int) -> Ints:
        """A whole group, for the neighbours of a sample are asked for next."""
        starts, sizes = self.stream.starts, self.stream.sizes
        members = [np.arange(starts[s], starts[s] + sizes[s]) for s in self.groups[number]]
        return _generator(*self.key, number + 1, self.stream.number).permutation(np.concatenate(members))


@dataclass(frozen=True, kw_only=True)
class SampleLayout:
    """What an epoch consists of: the streams of each bucket, and how many blocks of `block` samples each bucket has.

    `block` is 0 for one data set in one bucket, which needs no blocks.
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

    def order(self, seed: int, epoch: int, group_size: int) -> "EpochOrder | BlockOrder":
        """The order of an epoch: position -> sample number."""
        if self.block == 0:
            return EpochOrder(self.buckets[0][0], seed, epoch, group_size)
        return BlockOrder(self, seed, epoch, group_size)


class BlockOrder:
    """The order of an epoch of several buckets or data sets."""

    def __init__(self, layout: SampleLayout, seed: int, epoch: int, group_size: int) -> None:
        self.layout, self.seed, self.epoch, self.group_size = layout, seed, epoch, group_size
        buckets = np.repeat(np.arange(len(layout.buckets), dtype=np.int16), layout.num_blocks)
        self.bucket_of = _generator(seed, epoch, _BLOCK_SEQUENCE).permutation(buckets)  # the epoch's blocks in order
        self.turn = np.empty(len(buckets), dtype=np.int64)  # how many blocks of the same bucket come before a block
        for bucket, count in enumerate(layout.num_blocks):
            self.turn[self.bucket_of == bucket] = np.arange(count)
        self.orders: dict[tuple[int, int], EpochOrder] = {}
        # A random order of the samples of a block, which mixes its data sets.
        self.mixed = lru_cache(_KEPT)(lambda n: _generator(seed, epoch, _WITHIN_BLOCK + n).permutation(layout.block))

    def __getitem__(self, position: int) -> int:
        block, row = divmod(position, self.layout.block)
        bucket, turn = int(self.bucket_of[block]), int(self.turn[block])
        streams = self.layout.buckets[bucket]
        if len(streams) == 1:  # one data set: its tail that fills no block is left out, another one in each epoch
            return self._order(streams[0], self.epoch)[turn * self.layout.block + row]
        # Of the block's samples the first `quota` are of the first data set, and so on. The shuffle spreads them over
        # the block, so that every global batch has about the shares of the mix.
        slot = int(self.mixed(block)[row])
        for stream in streams:
            if slot < stream.quota:
                break
            slot -= stream.quota
        # Blocks go through a stream one after the other and over the ends of epochs: each sample is used once before
        # any is used again, however the length of the stream and that of the run's epoch compare.
        blocks_before = self.epoch * self.layout.num_blocks[bucket] + turn
        epoch, place = divmod(blocks_before * stream.quota + slot, stream.size)
        return self._order(stream, epoch)[place]

    def _order(self, stream: Stream, epoch: int) -> EpochOrder:
        key = (stream.number, epoch)
        if key not in self.orders:
            for old in [k for k in self.orders if k[0] == stream.number and k[1] < epoch - 1]:
                del self.orders[old]  # a block may lie across the end of the turn before
            self.orders[key] = EpochOrder(stream, self.seed, epoch, self.group_size)
        return self.orders[key]


def build_layout(
    sizes: Sequence[int],
    buckets: Sequence[int],
    sets: Sequence[int],
    weights: Sequence[float],
    block: int,
    drop_small: bool,
) -> tuple[SampleLayout, dict[int, int]]:
    """The layout of shards, of each its size, bucket and data set; and by bucket, how many samples no epoch uses.

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
        # Drawing from data sets by weight and within each uniformly, this part of all draws is of this bucket and set.
        part = {d: float(share[d]) * count / totals[d] for d, count in found.items()}
        # One data set: as many blocks as it fills. A mix: an epoch has as many samples as all data sets together.
        alone, held = len(weights) == 1, sum(found.values())
        count = (held if alone else int(sum(totals) * sum(part.values()))) // block
        unused[bucket] = held if count == 0 else held - count * block if alone else 0
        if count == 0:
            require(
                drop_small,
                f"a bucket has {held} samples, too few for data.bucket_block={block}: lower it, set "
                "data.small_buckets=drop to leave such buckets out, or encode with fewer data.buckets",
            )
            continue
        counts.append(count)
        streams.append([])
        for d, quota in _quotas(part, block).items():
            number = int(1 + d * (int(bucket_s.max()) + 1) + bucket)  # stream 0 is that of a data set without blocks
            sizes_of, starts_of = size_s[members[d]], start_s[members[d]]
            streams[-1].append(Stream(number=number, sizes=sizes_of, starts=starts_of, quota=quota))
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
