"""The rule that fits a recipe to the processes of a start, against brute force."""

import re
from itertools import product

import pytest

from trainer.config import ConfigError, TrainConfig, load_config
from trainer.engine.elastic import adapt, choose_ep_size, split_share


@pytest.mark.parametrize(
    "wish,experts,world,local,expected",
    [
        (8, 8, 64, 8, 8),  # divides: kept
        (8, 64, 24, 8, 8),
        (16, 64, 16, 8, 16),  # the recipe wants it across nodes
        (16, 64, 24, 8, 8),  # else inside a node
        (16, 64, 24, 4, 4),  # though 8 would do across nodes
        (8, 8, 4, 4, 4),  # fewer processes than the wish
        (8, 8, 12, 4, 4),
        (8, 8, 6, 3, 2),  # 3 does not divide 8; 2 spans nodes, since only 1 stays inside
        (4, 8, 3, 3, 1),
        (8, 12, 6, 6, 6),
        (1, 8, 7, 7, 1),
    ],
)  # fmt: skip
def test_ep_size(wish: int, experts: int, world: int, local: int, expected: int) -> None:
    assert choose_ep_size(wish, num_experts=experts, world_size=world, local_size=local) == expected


def test_ep_size_always_divides() -> None:
    for nodes, local, experts, wish in product(range(1, 7), range(1, 9), (1, 4, 6, 8, 64), range(1, 9)):
        if experts % wish:
            continue
        world = nodes * local
        found = choose_ep_size(wish, num_experts=experts, world_size=world, local_size=local)
        assert world % found == 0 and experts % found == 0 and found <= wish


def test_shares_are_split_exactly_with_the_largest_micro_batch() -> None:
    for share, largest in product(range(1, 65), range(1, 20)):
        split = split_share(share, largest)
        assert split is not None
        micro, steps = split
        assert micro * steps == share and micro <= largest
        assert not [m for m in range(micro + 1, largest + 1) if share % m == 0]


def recipe(*overrides: str) -> TrainConfig:
    return load_config("debug", ["parallel.elastic=true", "train.micro_batch_size=4", *overrides])


def test_the_global_batch_stays() -> None:
    config = recipe("parallel.ep_size=4")
    assert adapt(config, world_size=4, local_size=2, saved_batch=None) == (config, [])
    assert adapt(config, world_size=4, local_size=2, saved_batch=16) == (config, [])
    for world, ep_size in ((1, 1), (2, 2), (8, 4), (16, 4)):
        fitted, notes = adapt(config, world_size=world, local_size=min(world, 8), saved_batch=16)
        assert fitted.global_batch_size(world) == 16 and fitted.parallel.ep_size == ep_size and notes
        assert fitted.train.micro_batch_size <= 4
    with pytest.raises(ConfigError, match="3 processes cannot share the run's global batch of 16: start 2 or 4"):
        adapt(config, world_size=3, local_size=3, saved_batch=16)


@pytest.mark.parametrize(
    "world,local,found",
    [(24, 4, "4, the largest .*, inside a node"), (6, 3, "2, the largest .*, across nodes"), (2, 0, "2, .*, inside")],
)
def test_the_change_is_told_with_where_its_groups_are(world: int, local: int, found: str) -> None:
    config = recipe("parallel.ep_size=16", "moe.num_experts=64")
    _, (note,) = adapt(config, world_size=world, local_size=local, saved_batch=None)
    assert re.search(f"parallel.ep_size 16 -> {found}", note), note


def test_a_model_without_experts_has_no_pools() -> None:
    fitted, _ = adapt(recipe("moe.every=0", "moe.pool=batch"), world_size=8, local_size=8, saved_batch=16)
    assert (fitted.train.micro_batch_size, fitted.train.gradient_accumulation_steps) == (2, 1)


def test_a_micro_batch_holds_whole_pools() -> None:
    for share, largest, pool in product(range(1, 33), range(1, 17), (2, 3, 4)):
        found = split_share(share, largest, pool)
        expected = [m for m in range(1, largest + 1) if share % m == 0 and m % pool == 0]
        assert found == ((max(expected), share // max(expected)) if expected else None)
    pairs = recipe("moe.pool=group(2)", "train.micro_batch_size=6")
    fitted, _ = adapt(pairs, world_size=2, local_size=2, saved_batch=24)
    assert (fitted.train.micro_batch_size, fitted.train.gradient_accumulation_steps) == (6, 2)
    fitted, _ = adapt(pairs, world_size=3, local_size=3, saved_batch=24)
    assert (fitted.train.micro_batch_size, fitted.train.gradient_accumulation_steps) == (4, 2)
    with pytest.raises(ConfigError, match="24 processes with 1 images each cannot hold whole pools of 2"):
        adapt(pairs, world_size=24, local_size=8, saved_batch=24)
    whole = recipe("moe.pool=batch")
    fitted, _ = adapt(whole, world_size=2, local_size=2, saved_batch=16)
    assert (fitted.train.micro_batch_size, fitted.train.gradient_accumulation_steps) == (4, 2)
    with pytest.raises(ConfigError, match=r"moe\.pool=batch and parallel\.elastic"):
        adapt(whole, world_size=8, local_size=8, saved_batch=16)
