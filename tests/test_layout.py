"""Buckets and mixes: blocks of one bucket, exact shares, each sample once an epoch, any position directly."""

import itertools
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from trainer.data.order import EpochOrder, SampleLayout, build_layout
from trainer.data.position import DataState, micro_batches
from trainer.errors import ConfigError

# Nine shards of two data sets and three buckets.
SIZES = [n * 5 for n in (30, 5, 12, 9, 40, 3, 22, 17, 8)]
BUCKETS = [0, 1, 0, 2, 0, 1, 1, 0, 2]
SETS = [0, 0, 0, 0, 0, 0, 1, 1, 1]
FIRST = np.concatenate([[0], np.cumsum(SIZES)])
BUCKET_OF = np.repeat(BUCKETS, SIZES)
SET_OF = np.repeat(SETS, SIZES)
BLOCK = 6


def one_set(block: int = BLOCK) -> tuple[SampleLayout, dict[int, int]]:
    return build_layout(SIZES[:6], BUCKETS[:6], SETS[:6], [1.0], block, drop_small=False)


def two_sets(weights: tuple[float, float], block: int = BLOCK) -> SampleLayout:
    return build_layout(SIZES, BUCKETS, SETS, weights, block, drop_small=False)[0]


def epoch_of(layout: SampleLayout, epoch: int, seed: int = 0) -> list[int]:
    order = layout.order(seed, epoch, 2)
    return [order[i] for i in range(layout.size)]


def blocks_of(samples: list[int], block: int = BLOCK) -> list[list[int]]:
    return [samples[i : i + block] for i in range(0, len(samples), block)]


def test_one_bucket_of_one_data_set_is_the_plain_order() -> None:
    layout, unused = build_layout([5, 3, 4], [0, 0, 0], [0, 0, 0], [1.0], 0, drop_small=False)
    order = EpochOrder(SampleLayout.of_shards([5, 3, 4]).buckets[0][0], 7, 2, group_size=2)
    assert epoch_of(layout, 2, seed=7) == [order[i] for i in range(12)] and unused == {0: 0}


def test_an_epoch_has_each_sample_once_in_blocks_of_one_bucket() -> None:
    layout, unused = one_set()
    totals = Counter(BUCKET_OF[: FIRST[6]].tolist())
    assert unused == {b: n % BLOCK for b, n in totals.items()} and layout.size == sum(
        n - n % BLOCK for n in totals.values()
    )
    seen = []
    for epoch, seed in ((0, 0), (1, 0), (0, 1)):
        samples = epoch_of(layout, epoch, seed)
        assert len(set(samples)) == len(samples)
        blocks = blocks_of(samples)
        assert all(len({BUCKET_OF[s] for s in block}) == 1 for block in blocks)
        assert Counter(int(BUCKET_OF[block[0]]) for block in blocks) == {b: n // BLOCK for b, n in totals.items()}
        order = layout.order(seed, epoch, 2)
        assert [order[i] for i in reversed(range(layout.size))] == samples[::-1]  # any position, in any order
        seen.append(samples)
    assert seen[0] != seen[1] and seen[0] != seen[2]
    # over epochs the tails change, so that every sample has its turn
    assert set().union(*(epoch_of(layout, epoch) for epoch in range(30))) == set(range(FIRST[6]))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.2, 0.9)])
def test_blocks_of_a_mix_have_exact_shares(weights: tuple[float, float]) -> None:
    layout = two_sets(weights, block=60)
    share = np.array(weights) / sum(weights)
    totals = [sum(SIZES[:6]), sum(SIZES[6:])]
    used: Counter[int] = Counter()
    for epoch in range(4):
        samples = epoch_of(layout, epoch)
        used.update(samples)
        for block in blocks_of(samples, 60):
            (bucket,) = {int(BUCKET_OF[s]) for s in block}
            of_bucket = [
                sum(n for n, b, d in zip(SIZES, BUCKETS, SETS, strict=True) if (b, d) == (bucket, e)) for e in (0, 1)
            ]
            parts = share * np.array(of_bucket) / totals
            wanted = 60 * parts / parts.sum()
            found = Counter(int(SET_OF[s]) for s in block)
            assert all(abs(found[d] - wanted[d]) < 1 for d in (0, 1))
    # a data set starts anew when it runs out: within a stream no sample is ahead of another by more than one turn
    for bucket, data_set in itertools.product(range(3), (0, 1)):
        counts = [used[s] for s in np.flatnonzero((BUCKET_OF == bucket) & (SET_OF == data_set)).tolist()]
        assert max(counts) - min(counts) <= 1 and max(counts) > 0


def test_a_mix_of_single_buckets_goes_through_each_data_set_in_its_own_order() -> None:
    layout, _ = build_layout([4, 3, 20], [0, 0, 0], [0, 0, 1], [0.5, 0.5], 8, drop_small=False)
    samples = [s for epoch in range(6) for s in epoch_of(layout, epoch)]
    small = [s for s in samples if s < 7]
    assert len(small) * 2 == len(samples)
    # blocks permute their slots, so a turn of seven may straddle two blocks of four; counts stay level
    counts = Counter(small)
    assert max(counts.values()) - min(counts.values()) <= 1


def global_batches(
    layout: SampleLayout, state: DataState, steps: int, world: int, micro: int, accumulation: int
) -> list[list[int]]:
    ranks = [
        micro_batches(
            layout,
            state,
            micro_batch_size=micro,
            num_micro_batches=accumulation,
            rank=rank,
            world_size=world,
            group_size=2,
        )
        for rank in range(world)
    ]
    return [[s for _ in range(accumulation) for rank in ranks for s in next(rank).samples] for _ in range(steps)]


START = DataState(seed=3, epoch=0, consumed=0, samples_seen=0)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(
    ("world", "micro", "accumulation"), [(1, 12, 1), (2, 6, 1), (3, 4, 1), (4, 3, 1), (6, 2, 1), (6, 1, 2), (2, 2, 3)]
)
def test_global_batches_of_one_bucket_for_any_topology(mixed: bool, world: int, micro: int, accumulation: int) -> None:
    layout = two_sets((1.0, 2.0), block=24) if mixed else one_set(12)[0]
    expected = global_batches(layout, START, 15, 1, 12, 1)
    assert global_batches(layout, START, 15, world, micro, accumulation) == expected
    assert all(len({BUCKET_OF[s] for s in batch}) == 1 for batch in expected)


@pytest.mark.parametrize("mixed", [False, True])
def test_chained_resumes_over_topologies_and_epochs(mixed: bool) -> None:
    layout = two_sets((1.0, 2.0), block=24) if mixed else one_set(12)[0]
    start = replace(START, consumed=layout.size - 84)
    expected = global_batches(layout, start, 21, 1, 12, 1)
    state, found = start, []
    for steps, world, micro, accumulation in ((2, 2, 6, 1), (3, 3, 4, 1), (5, 6, 1, 2), (1, 1, 12, 1), (10, 4, 3, 1)):
        found += global_batches(layout, state, steps, world, micro, accumulation)
        for _ in range(steps):
            state = state.advance(12, layout.size, 12)
    assert found == expected and state.epoch == 1


def test_another_global_batch_size_repeats_no_sample_and_mixes_no_buckets() -> None:
    layout = build_layout(SIZES, BUCKETS, [0] * 9, [1.0], 12, drop_small=True)[0]
    state, seen = START, []
    for size in (4, 4, 6, 2, 12, 4, 6, 3, 3, 12):
        (batch,) = global_batches(layout, state, 1, 1, size, 1)
        assert len({BUCKET_OF[s] for s in batch}) == 1
        seen += batch
        state = state.advance(size, layout.size, size)
    assert state.epoch == 0 and len(set(seen)) == len(seen) == 56


def test_buckets_and_weights_that_are_too_small_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a bucket has 40 samples, too few for data\.bucket_block=50: lower it, set"):
        one_set(50)
    layout, unused = build_layout(SIZES[:6], BUCKETS[:6], SETS[:6], [1.0], 50, drop_small=True)
    assert unused == {0: 10, 1: 40, 2: 45} and {BUCKET_OF[s] for s in epoch_of(layout, 0)} == {0}
    with pytest.raises(ConfigError, match=r"no bucket has the 500 samples of data\.bucket_block"):
        build_layout(SIZES[:6], BUCKETS[:6], SETS[:6], [1.0], 500, drop_small=True)
    with pytest.raises(ConfigError, match=r"data set 1 would give no sample to a block of 6: raise data\.bucket_block"):
        two_sets((1.0, 0.001))


@pytest.mark.parametrize("buckets", [1, 9])
def test_a_billion_samples_cost_little(buckets: int) -> None:
    """The benchmark has the exact numbers; here only the order of magnitude."""
    begin = time.process_time()
    numbers = np.arange(100_000)
    layout, _ = build_layout(np.full(100_000, 10_000), numbers % buckets, numbers * 0, [1.0], 4096, drop_small=False)
    order = layout.order(0, 0, 8)
    order[10**8]
    assert time.process_time() - begin < 3
    positions = np.random.default_rng(0).integers(0, 80_000, 2000)
    for position in positions.tolist():  # within one group of shards, as a run reads
        order[10**8 - 10**8 % 80_000 + position]
    begin = time.process_time()
    for position in positions.tolist():
        order[10**8 - 10**8 % 80_000 + position]
    assert (time.process_time() - begin) / len(positions) < 200e-6
