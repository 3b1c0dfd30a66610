"""Each part of the planner's step by hand, on round numbers; its layouts compared."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from test_plan_terms import BF16, CONFIG, LAYOUT, MILLION, SGD, values
from test_plan_terms import job_of as eager_job_of

from trainer.config import TrainConfig
from trainer.plan.devices import Device, Efficiency, HostCost
from trainer.plan.job import Job, Layout
from trainer.plan.passes import pass_bytes
from trainer.plan.search import evaluate, search, why_slower
from trainer.plan.time import PARTS, time_terms
from trainer.plan.traffic import all_to_all_bytes

DEVICE = Device(name="slow", flops=1e12, memory=1e10, hbm=1e9, node=1e8, nic=1e7, per_node=2)
NO_HOST = HostCost(scale=0)
HOST = HostCost(
    scale=2, eager=3, eager_stage3=5, compiled=0.5, compiled_stage3=0.75, shared=0.125, ends=7, ends_stage3=6,
    update=0.25, update_stage3=0.375,
)  # fmt: skip
EFFICIENCY = Efficiency(
    gemm=0.5, rows=512, attention=0.25, attention_hbm=0.4, eager=0.1, fused=0.2, hbm=0.8, host=NO_HOST, node=0.5,
    nic=0.25, hidden=0.9, latency=1e-3,
)  # fmt: skip
ALL_TO_ALL = 2 * 4 * (6 * 64 * 2) * 64 * 4  # layers x exchanges x rows x width x fp32: 1,572,864
# Six images of 64 image and 20 text tokens in 4 blocks of width 64: products of queries with keys and of weights with
# values, over 64 + 20 keys, times 3 for forward and backward.
ATTENTION_FLOPS = 2 * 3 * 6 * 4 * (2 * 64 * (64 + 20) * 64)
# Queries, results, keys and values (as many as queries): read or written 6 times each in all, of 64 or 20 tokens.
ATTENTION_BYTES = 6 * 4 * 6 * 4 * 64 * ((64 + 64) + (64 + 20))
ATTENTION = ATTENTION_FLOPS / 0.25e12 + ATTENTION_BYTES / 0.4e9
PRODUCTS = (6e9 - ATTENTION_FLOPS) / (1e12 * 0.5 * 0.25**0.5)  # an expert has 512 x 2 / 8 = 128 rows of 512 wanted


def timed(job: Job, layout: Layout = LAYOUT, device: Device = DEVICE, eff: Efficiency = EFFICIENCY) -> dict[str, float]:
    return values(time_terms(job, layout, device, eff))


def job_of(config: TrainConfig = CONFIG, *, compiled: bool = True) -> Job:
    return eager_job_of(config, compiled=compiled)


@pytest.mark.parametrize("setting,compiled", [(None, True), (True, True), (False, False)])
def test_a_recipe_says_whether_blocks_are_compiled(setting: bool | None, compiled: bool) -> None:
    settings: Any = SimpleNamespace(**vars(CONFIG.train) | {"compile": setting})
    job = replace(job_of(), config=replace(CONFIG, train=settings))
    assert job.compiled is compiled and replace(job, config=CONFIG).compiled


def test_time_and_traffic_of_a_step() -> None:
    """Four nodes of two devices; three micro-batches, and DeepSpeed's stage 3."""
    found, job = timed(job_of()), job_of()
    passes = pass_bytes(job, 6) / (1e9 * 0.2)
    # Of 3 million parameters: put side by side and divided, thrice; twice as often gathered, but 0.1 million once.
    copies = 4 * (3 * MILLION * (3 * 2 * 2) + 2 * 17.5 * MILLION + 3 * 2 * 1.125 * MILLION) / 0.8e9
    exchange = ALL_TO_ALL * 2 / 4 / (1e7 * 0.25) + 2 * 4 * 3 * 1e-3
    rest, experts = 4 * MILLION * (0.9 * 6 + 0.1 + 3) * 7 / 8, 4 * 2 * MILLION * (6 + 3) / 2
    zero = rest / (2 * 1e7 * 0.25) + experts / (1e7 * 0.25)
    update, average = (28 + 14) * 1.125 * MILLION / 0.8e9, 12 * 1.125 * MILLION / 0.8e9
    busy = PRODUCTS + ATTENTION + passes + copies
    hidden = min(0.9 * zero, 0.8 * busy)
    expected = {
        "model FLOPs per rank": 6e9,
        "all-to-all in the node": ALL_TO_ALL / 4,
        "all-to-all across nodes": ALL_TO_ALL * 2 / 4,
        "ZeRO of the rest": rest,
        "ZeRO of the experts": experts,
        "host": 0,
        "host update": 0,
        "products": PRODUCTS,
        "attention": ATTENTION,
        "passes": passes,
        "ZeRO copies": copies,
        "all-to-all": exchange,
        "ZeRO exposed": zero - hidden,
        "update": update,
        "average of weights": average,
        "host wait": 0,
        "step": busy + exchange + zero - hidden + update + average,
        "MFU bound": 6e9 / 1e12 / (busy + exchange + zero - hidden + update + average),
    }
    assert found == pytest.approx(expected, rel=1e-12)
    assert sum(found[part] for part in PARTS) == pytest.approx(found["step"], rel=1e-12)
    assert timed(job_of(SGD))["update"] == pytest.approx((12 + 14) * 1.125 * MILLION / 0.8e9, rel=1e-12)


@pytest.mark.parametrize(
    "stage,gathers,reductions,copied", [(1, 1, 2, 6), (2, 1, 6, 18), (3, 6, 3, 12 + 12)]
)  # fmt: skip
def test_zero_traffic_and_copies_of_each_stage(stage: int, gathers: int, reductions: int, copied: int) -> None:
    """Stages 1 and 2 reduce by all-reduce; what is behind compute is stage 3's alone, and no more than there is."""
    layout = replace(LAYOUT, stage=stage)
    found = timed(job_of(), layout)
    again = (gathers - 1) * 100_000  # outside of blocks weights are gathered once
    assert found["ZeRO of the rest"] == 4 * (MILLION * (gathers + reductions) - again) * 7 / 8
    assert found["ZeRO of the experts"] == 8 * MILLION * (gathers + reductions) / 2
    own = 2 * 1.125 * MILLION * (1 if stage == 1 else 3)
    assert found["ZeRO copies"] == pytest.approx(4 * (copied * 3 * MILLION - 2 * again + own) / 0.8e9, rel=1e-12)
    seconds = found["ZeRO of the rest"] / 5e6 + found["ZeRO of the experts"] / 2.5e6
    busy = found["products"] + found["attention"] + found["passes"] + found["ZeRO copies"]
    hidden = 0.8 * busy if stage == 3 else 0
    assert found["ZeRO exposed"] == pytest.approx(seconds - hidden, rel=1e-12)
    found = timed(job_of(), layout, replace(DEVICE, nic=1e12))
    shown = 1 - (0.9 if stage == 3 else 0)
    assert found["ZeRO exposed"] == pytest.approx(shown * seconds * 1e7 / 1e12, rel=1e-9)


def test_within_a_node_everything_goes_over_its_own_links() -> None:
    found = timed(job_of(), device=replace(DEVICE, per_node=8))
    assert found["all-to-all in the node"] == ALL_TO_ALL * 3 / 4 and found["all-to-all across nodes"] == 0
    assert found["all-to-all"] == pytest.approx(ALL_TO_ALL * 3 / 4 / (1e8 * 0.5) + 24e-3, rel=1e-12)
    zero = (29.75e6 + 36e6) / (1e8 * 0.5)
    busy = found["products"] + found["attention"] + found["passes"] + found["ZeRO copies"]
    assert found["ZeRO exposed"] == pytest.approx(zero - min(0.8 * busy, 0.9 * zero), rel=1e-12)


def test_what_a_rank_shares_with_nobody_is_not_copied() -> None:
    found = timed(job_of(), replace(LAYOUT, ep_size=8))
    assert found["ZeRO copies"] == pytest.approx(4 * (MILLION * (12 + 11) + 2 * 1.125 * MILLION * 3) / 0.8e9, rel=1e-12)


def test_recomputation_costs_a_third_and_two_exchanges() -> None:
    job, again = job_of(), replace(LAYOUT, recompute=True)
    found, plain = timed(job, again), timed(job)
    assert found["model FLOPs per rank"] == 6e9, "useful ones alone"
    for part in ("products", "attention", "passes"):
        assert found[part] == pytest.approx(4 / 3 * plain[part], rel=1e-12)
    assert found["ZeRO copies"] == plain["ZeRO copies"]
    assert found["all-to-all across nodes"] == ALL_TO_ALL * 6 / 4 / 2
    assert found["all-to-all"] == pytest.approx(ALL_TO_ALL * 6 / 4 / 2 / (1e7 * 0.25) + 36e-3, rel=1e-12)


@pytest.mark.parametrize(
    "compiled,layout,block",
    [
        (False, {"stage": 1}, 3),
        (False, {"stage": 2}, 3),
        (False, {}, 5 + 0.125),
        (False, {"recompute": True}, 5 + 3 / 3 + 0.125),
        (True, {"stage": 2}, 0.5),
        (True, {"stage": 2, "recompute": True}, 0.5 + 0.5 / 3),
        (True, {}, 0.75 + 0.125),
        (True, {"world_size": 1, "ep_size": 1}, 0.75),
    ],
)
def test_the_host_starts_each_block_of_each_micro_batch(compiled: bool, layout: dict[str, Any], block: float) -> None:
    """Three micro-batches of 4 blocks, which ranks share in stage 3; the update starts 4 blocks and the ends."""
    job, chosen = job_of(compiled=compiled), replace(LAYOUT, **layout)
    found = timed(job, chosen, eff=replace(EFFICIENCY, host=HOST))
    ends, update = (6, 0.375) if chosen.stage == 3 else (7, 0.25)
    assert found["host"] == pytest.approx(2 * 3 * (4 * block + ends), rel=1e-12)
    assert found["host update"] == 2 * 6 * update


def test_the_step_waits_for_the_host_where_it_is_the_slower() -> None:
    plain = timed(job_of())
    queued = sum(plain[part] for part in PARTS[:6])
    for scale in (1e-4, 1.0, 100.0):
        host = replace(HOST, scale=scale)
        found = timed(job_of(), eff=replace(EFFICIENCY, host=host))
        seconds, updating = scale * 3 * (4 * 0.875 + 6), scale * 6 * 0.375
        busy = sum(found[part] for part in PARTS[:4])
        zero = plain["ZeRO exposed"] + 0.8 * busy
        hidden = min(0.9 * zero, 0.8 * max(busy, seconds))
        queued = busy + found["all-to-all"] + zero - hidden
        wait = max(0, seconds - queued) + max(0, updating - plain["update"] - plain["average of weights"])
        assert found["host wait"] == pytest.approx(wait, rel=1e-12)
        assert found["step"] == pytest.approx(sum(found[part] for part in PARTS), rel=1e-12)


def test_compiled_blocks_move_less() -> None:
    eager, compiled = (job_of(compiled=value) for value in (False, True))
    assert timed(eager)["passes"] == pytest.approx(pass_bytes(eager, 6) / (1e9 * 0.1), rel=1e-12)
    assert timed(compiled)["passes"] == pytest.approx(pass_bytes(compiled, 6) / (1e9 * 0.2), rel=1e-12)
    assert pass_bytes(compiled, 6) < 0.8 * pass_bytes(eager, 6) and not eager.compiled and compiled.compiled


def test_one_process_sends_nothing() -> None:
    alone = replace(LAYOUT, world_size=1, ep_size=1)
    found = timed(job_of(), alone)
    assert all_to_all_bytes(job_of(), alone) == 0 and all_to_all_bytes(job_of(BF16), LAYOUT) == ALL_TO_ALL / 2
    sent = ("all-to-all in the node", "all-to-all across nodes", "all-to-all", "ZeRO of the rest", "ZeRO exposed")
    assert not any(found[name] for name in (*sent, "ZeRO of the experts"))
    assert found["ZeRO copies"] == pytest.approx(4 * 9 * MILLION * 2 * 3 / 0.8e9, rel=1e-12), "its parts alone"


def test_a_layout_is_preferred_for_a_reason() -> None:
    """Where the host decides, stage 3 costs what it starts; equal steps are settled by what the GPU has to do."""
    fast = replace(DEVICE, flops=1e13, hbm=1e12, node=1e11, nic=1e11, memory=1e15)
    job, eff = job_of(), replace(EFFICIENCY, host=HOST, latency=0.0)
    first, *others = search(job, 8, 6, fast, eff)
    assert first.layout.stage == 1 and first.layout.accumulation == 1 and not first.layout.recompute
    third = evaluate(job, replace(first.layout, stage=3), fast, eff)
    more = 2 * (4 * (0.75 + 0.125 - 0.5) + 6 - 7 + 6 * (0.375 - 0.25))
    assert why_slower(first, third) == f"{more:.3f} s more, most of all host wait: {more:+.3f} s"
    small = evaluate(job, first.layout, replace(fast, memory=1e6), eff)
    assert why_slower(first, small) == small.reason and "GB usable" in small.reason
    equal = [other for other in others if round(other.value("step"), 3) == round(first.value("step"), 3)]
    busy = [outcome.value("step") - outcome.value("host wait") for outcome in (first, *equal)]
    assert len(equal) > 1 and busy[-1] > busy[0] + 1e-3 and busy == pytest.approx(sorted(busy), abs=1e-4)
