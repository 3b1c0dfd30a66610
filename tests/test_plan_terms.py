"""Each term of the planner's memory by hand, on round numbers: no ratio of two plans, which would hide a factor."""

from dataclasses import replace
from typing import Any

import pytest

from moe.config import MoeConfig
from trainer.config import DiffusionConfig, ModelConfig, OptimConfig, TrainConfig, TrainLoopConfig
from trainer.diffusion.model import ModelShape
from trainer.plan.devices import Efficiency
from trainer.plan.job import Counts, Job, Layout, Term
from trainer.plan.memory import activation_terms, block_bytes, checkpoint_bytes, memory_terms, state_terms

MILLION = 1_000_000
COUNTS = Counts(
    experts=8 * MILLION, rest=MILLION, one_expert=MILLION // 2, num_moe=2, largest_block=300_000, persistent=10_000,
    active=3 * MILLION, ends=100_000,
)  # fmt: skip
CONFIG = TrainConfig(
    model=ModelConfig(dim=64, num_layers=4, num_heads=4, num_kv_heads=2, mlp_ratio=4, patch_size=2),
    moe=MoeConfig(num_experts=8, capacity_factor=2.0, every=2),
)
BF16 = replace(CONFIG, train=TrainLoopConfig(precision="bf16"))
SGD = replace(CONFIG, optim=OptimConfig(name="sgd"))
ZERO = {
    "reduce_bucket_size": 50_000, "stage3_max_live_parameters": 400_000, "stage3_prefetch_bucket_size": 20_000,
    "sub_group_size": MILLION,
}  # fmt: skip
# Of 16 x 16 latents 64 tokens; eight processes, of which four share the experts: a rank has 2 of 8 million parameters
# of experts and the million of the rest before ZeRO, p = 3 million, and an eighth of all, q = 1.125 million.
LAYOUT = Layout(world_size=8, ep_size=4, stage=3, micro_batch_size=2, accumulation=3, recompute=False)


def job_of(config: TrainConfig = CONFIG, *, compiled: bool = False, **zero: Any) -> Job:
    shape = ModelShape(channels=4, height=16, width=16, text_dim=48)
    job = Job(config=config, shape=shape, text_tokens=20, zero=ZERO | zero)
    vars(job)["counts"], vars(job)["flops_per_image"] = COUNTS, 10**9  # in place of what would be counted
    vars(job)["compiled"] = compiled
    return job


def values(terms: list[Term]) -> dict[str, float]:
    return {term.name: term.value for term in terms}


@pytest.mark.parametrize(
    "config,layout,zero,expected",
    [
        (CONFIG, {"stage": 1}, {}, {"weights": 12, "gradients": 12, "optimizer": 13.5, "average": 4.5}),
        (CONFIG, {"stage": 2}, {}, {"weights": 12, "gradients": 4.5, "optimizer": 13.5, "reduce bucket": 0.2}),
        (CONFIG, {"stage": 2}, {"overlap_comm": True}, {"reduce bucket": 0.4}),
        # Stage 3 keeps small parameters whole; a block with its two experts of 2 x 500,000 is gathered at once.
        (CONFIG, {}, {"overlap_comm": True}, {
            "weights": 4.54, "gradients": 4.5, "optimizer": 13.5, "average": 4.5, "reduce bucket": 0.2,
            "gathered weights": 4 * (0.1 + 0.3 + 1.0 + 0.02),
        }),
        (CONFIG, {}, {"stage3_max_live_parameters": 2 * MILLION}, {"gathered weights": 4 * 2.12}),
        (CONFIG, {}, {"stage3_max_live_parameters": 9 * MILLION}, {"gathered weights": 12}),
        (CONFIG, {"world_size": 1, "ep_size": 1}, {}, {
            "weights": 36, "optimizer": 108, "average": 36, "gathered weights": 0,
        }),
        # Each rank has experts of its own.
        (CONFIG, {"ep_size": 8}, {}, {"gathered weights": 4 * (0.1 + 0.4 + 0.02)}),
        (CONFIG, {"ep_size": 8}, {"stage3_max_live_parameters": 9 * MILLION}, {"gathered weights": 4}),
        (CONFIG, {"ep_size": 1}, {}, {"weights": 4.54, "gathered weights": 4 * (0.1 + 0.3 + 4.0 + 0.02)}),
        (BF16, {}, {}, {
            "weights": 2.27, "gradients": 4.5, "optimizer": 13.5, "average": 4.5, "reduce bucket": 0.1,
            "gathered weights": 2.84,
        }),
        (SGD, {}, {}, {"weights": 4.54, "optimizer": 4.5, "average": 4.5}),
        (CONFIG, {}, {"offload_optimizer": {"device": "cpu"}}, {"weights": 4.54, "optimizer": 0, "average": 0}),
        (CONFIG, {}, {"offload_optimizer": {"device": "none"}}, {"optimizer": 13.5}),
    ],
)  # fmt: skip
def test_state_in_megabytes(
    config: TrainConfig, layout: dict[str, Any], zero: dict[str, Any], expected: dict[str, float]
) -> None:
    found = values(state_terms(job_of(config, **zero), replace(LAYOUT, **layout)))
    assert {name: found[name] / MILLION for name in expected} == pytest.approx(expected, rel=1e-12)
    assert ("gathered weights" in found) == (layout.get("stage", 3) == 3)


ENDS = 4 * 128 * 64 * 3 + 4 * 128 * 16 + 4 * 40 * (3 * 64 + 48) + 8 * 64 * 8  # tokens, patches, text, rotations
DENSE = 655_360 + 4 * 128 * 64 * 9  # attention of fp32, and the MLP's input with its hidden values twice
MOE = 655_360 + 128 * 64 * 4 + 4 * 256 * 64 * 10 + 8 * 128 * 8 + 16 * 256


@pytest.mark.parametrize(
    "config,layout,kept,exchange,working",
    [
        (CONFIG, {}, 2 * DENSE + 2 * MOE + ENDS, 4 * 4 * 256 * 64, 2 * 4 * 4 * 256 * 64),
        (CONFIG, {"ep_size": 1}, 2 * DENSE + 2 * MOE + ENDS, 0, 524_288),
        (CONFIG, {"recompute": True}, 4 * 4 * 128 * 64 + MOE + ENDS + 2 * 128 * (4 * 8 + 8 * 2), 262_144, 524_288),
        (CONFIG, {"accumulation": 9}, 2 * DENSE + 2 * MOE + ENDS, 262_144, 524_288),
    ],
)
def test_activations_and_buffers_in_bytes(
    config: TrainConfig, layout: dict[str, Any], kept: float, exchange: float, working: float
) -> None:
    """128 tokens of width 64 in fp32, of which experts take 256 rows."""
    found = values(activation_terms(job_of(config), replace(LAYOUT, **layout)))
    assert found == {"activations": kept, "all-to-all buffers": exchange, "working buffers": working}


@pytest.mark.parametrize("config,width", [(CONFIG, 4), (BF16, 2)])
def test_compiled_blocks_keep_less(config: TrainConfig, width: int) -> None:
    """128 image and 40 text tokens; half as many keys as queries; 256 rows of experts."""
    attention = width * 64 * (128 * 12.5 + 40 * 1.5)
    dense = attention + width * 64 * 128 * (2 + 2 * 4)
    moe = attention + width * 64 * 128 * 2 + width * 64 * 256 * (2 + 2 * 4) + 8 * 128 * 8 + 16 * 256
    job = job_of(config, compiled=True)
    assert [block_bytes(job, 2, moe=moe) for moe in (False, True)] == [dense, moe]
    assert all(block_bytes(job, 2, moe=moe) < 0.9 * block_bytes(job_of(config), 2, moe=moe) for moe in (False, True))


def test_buffers_of_half_the_tokens_in_bf16() -> None:
    masked = replace(BF16, diffusion=DiffusionConfig(mask_ratio=0.5))
    found = values(activation_terms(job_of(masked), LAYOUT))
    assert found["all-to-all buffers"] == 4 * 2 * 128 * 64 and found["working buffers"] == 2 * 2 * 4 * 128 * 64
    unmasked_at_last = replace(BF16, diffusion=DiffusionConfig(mask_ratio=0.5, unmask_at_step=9))
    assert values(activation_terms(job_of(unmasked_at_last), LAYOUT))["all-to-all buffers"] == 4 * 2 * 256 * 64


def step_phase(job: Job, layout: Layout) -> float:
    return values(memory_terms(job, layout, Efficiency()))["optimizer step"]


def test_the_optimizers_own_phase_counts_where_it_is_the_larger() -> None:
    """Twelve bytes for each parameter of a sub-group; the peak has state, the larger phase and what is reserved."""
    assert step_phase(job_of(), LAYOUT) == 12 * MILLION
    assert step_phase(job_of(), replace(LAYOUT, stage=2)) == 12 * 1.125 * MILLION
    assert step_phase(job_of(sub_group_size=9 * MILLION), LAYOUT) == 12 * 1.125 * MILLION
    assert step_phase(job_of(offload_optimizer={"device": "cpu"}), LAYOUT) == 0
    state, reserved = 32.92 * MILLION, 7 * MILLION  # 4.54 + 4.5 + 13.5 + 4.5 + 0.2 + 5.68
    activations = 2 * DENSE + 2 * MOE + ENDS + 262_144 + 524_288
    assert activations < 12 * MILLION
    found = values(memory_terms(job_of(), LAYOUT, Efficiency(reserved=reserved)))
    assert found["peak"] == pytest.approx(state + 12 * MILLION + reserved, rel=1e-12)
    found = values(memory_terms(job_of(sub_group_size=100_000), LAYOUT, Efficiency(reserved=reserved)))
    assert found["peak"] == pytest.approx(state + activations + reserved, rel=1e-12)
    assert found["reserved"] == reserved and found["optimizer step"] == 1.2 * MILLION


def test_a_checkpoint_has_weights_average_and_moments_of_all_parameters() -> None:
    assert checkpoint_bytes(job_of()) == checkpoint_bytes(job_of(BF16)) == 9 * MILLION * (4 + 4 + 8)
    assert checkpoint_bytes(job_of(SGD)) == 9 * MILLION * (4 + 4)
