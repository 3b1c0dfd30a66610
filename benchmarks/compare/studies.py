"""What is compared: variants at equal activated FLOPs, and the runs of each study.

A dense MLP of ratio 4 is 8 d^2 multiply-adds per token. So are, in every block: experts of ratio 4 that take each token
once on average (capacity factor 1), experts of ratio 2 at capacity factor 2, and experts of ratio 2 at capacity factor
1 beside a shared expert of ratio 2 that sees every token. The router adds E d, under 1 % of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.compare.kinds import NUM_KINDS
from benchmarks.compare.training import RunConfig
from moe.config import MoeConfig
from moe.routers.registry import ROUTERS, build_router, router_class
from trainer.config import ModelConfig, OptimConfig


@dataclass(frozen=True, kw_only=True)
class Size:
    """Width, depth and batch that suit a device."""

    dim: int
    num_layers: int
    batch_size: int
    learning_rate: float
    steps: int


# Small: 1.9M activated parameters, minutes a run on a CPU core. Large: 87M, for a GPU.
SIZES = {
    "small": Size(dim=128, num_layers=6, batch_size=32, learning_rate=4e-3, steps=4000),
    "large": Size(dim=576, num_layers=16, batch_size=256, learning_rate=5e-4, steps=4000),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Changes to the dense model. `words` say what it is; `extra` what of it costs more than the dense model."""

    words: str
    moe: dict[str, Any]
    mlp_ratio: int = 4
    rate: float = 1.0
    router_rate: float = 0.1
    extra: str = ""


def mixture(words: str, **changes: Any) -> Variant:
    """Half-size experts beside a shared one, in every block, with gates that are 1 on average."""
    experts, factor = changes.get("num_experts", 16), changes.get("capacity_factor", 1.0)
    moe = {"num_experts": experts, "capacity_factor": factor, "every": 1, "num_shared_experts": 1}
    moe["gate_scale"] = experts / factor
    return Variant(words=words, moe={**moe, **changes}, mlp_ratio=2)


def full_size(words: str, **changes: Any) -> Variant:
    """Experts as large as the dense MLP in every block."""
    moe = {"num_experts": 16, "capacity_factor": 1.0, "every": 1}
    return Variant(words=words, moe={**moe, **changes})


def routed_by(router: str) -> Variant:
    """The same experts, chosen by another router of the registry with its example's settings, gates as they are.

    Multiplied by E, a gate of token choice comes to E where the router is sure (tried: far behind after 750 steps).
    """
    changes = {"router": router, "top_k": 1, "gate_scale": 1.0, **router_class(router).traits.example}
    variant = mixture(f"router {router}, gates as they are", **changes)
    learns = build_router(MoeConfig(**variant.moe)).multiply_adds(64, 128) > 0
    return replace(variant, extra="and its predictor" if learns else "")


DENSE = Variant(words="dense", moe={"every": 0})
VARIANTS = {
    "dense": DENSE,
    "dense_half_rate": replace(DENSE, words="dense, half the learning rate", rate=0.5),
    "dense_twice_rate": replace(DENSE, words="dense, twice the learning rate", rate=2.0),
    "dense_wide": Variant(
        words="dense, MLP as large as all experts", moe={"every": 0}, mlp_ratio=34, extra="4.5 x the FLOPs"
    ),
    "expert_choice": mixture("expert choice, 16 experts and a shared one"),
    "expert_choice_half_rate": replace(mixture("the same, half the learning rate"), rate=0.5),
    "expert_choice_twice_rate": replace(mixture("the same, twice the learning rate"), rate=2.0),
    "raw_gates": mixture("the same, gates as they are (paper)", gate_scale=1.0),
    "unmodulated": mixture("the same, router reads token and time apart", router_input="unmodulated"),
    "fast_router": replace(mixture("the same, routers learn as fast as the rest"), router_rate=1.0),
    "sigmoid": mixture("the same, sigmoid gates x 2", gate="sigmoid", gate_scale=2.0),
    "identity": mixture("the same, gates are the logits (as Expert Race)", gate="identity", gate_scale=1.0),
    "no_shared": mixture("16 half-size experts at capacity factor 2", num_shared_experts=0, capacity_factor=2.0),
    "full_size": full_size("16 full-size experts, gates x 16", gate_scale=16.0),
    "full_size_raw": full_size("16 full-size experts, gates as they are"),
    "full_size_normalized": full_size("16 full-size experts, gates of a token sum to 1", normalize_gates=True),
    "paper": Variant(
        words="as the paper: every second block, full-size, capacity factor 2, gates as they are",
        moe={"num_experts": 16, "capacity_factor": 2.0, "every": 2}, extra="1.25 x the FLOPs",
    ),
    **{f"router_{name}": routed_by(name) for name in ROUTERS if name != "expert_choice"},
    **{f"experts_{e}": mixture(f"{e} experts", num_experts=e) for e in (4, 8, 32)},
    **{
        f"factor_{f:g}": replace(
            mixture(f"capacity factor {f:g}", capacity_factor=f), extra=f"{(1 + f) / 2:g} x the MLP's FLOPs"
        )
        for f in (0.5, 2.0, 4.0)
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, its variants, and how long each runs as a share of `--steps`.

    Differences are to the first variant. With `seeds` each is run with all of `--seeds`, else with the first.
    """

    question: str
    variants: tuple[str, ...]
    share: float = 0.5
    seeds: bool = False
    num_kinds: int = NUM_KINDS


STUDIES = {
    "pair": Study(
        question="Does expert choice beat the dense model at equal activated FLOPs?",
        variants=("dense", "expert_choice"), share=1.0, seeds=True,
    ),
    "setup": Study(
        question="What of the set-up does it take?",
        variants=("dense", "expert_choice", "raw_gates", "fast_router", "paper", "no_shared", "full_size",
                  "full_size_raw", "full_size_normalized", "sigmoid", "identity", "unmodulated"),
    ),
    "gates": Study(
        question="What if gates are the logits themselves?",
        variants=("dense", "expert_choice", "identity"), share=1.0, seeds=True,
    ),
    "experts": Study(
        question="How does the loss fall with the number of experts?",
        variants=("dense", "experts_4", "experts_8", "expert_choice", "experts_32"),
    ),
    "capacity": Study(
        question="How does it fall with the capacity factor?",
        variants=("expert_choice", "factor_0.5", "factor_2", "factor_4"),
    ),
    "few_kinds": Study(
        question="And where there is little to remember (16 kinds of objects)?",
        variants=("dense", "expert_choice"), num_kinds=16,
    ),
    "rate": Study(
        question="Is it the learning rate?",
        variants=("dense", "expert_choice", "dense_half_rate", "dense_twice_rate", "expert_choice_half_rate",
                  "expert_choice_twice_rate"),
        share=1.0,  # the best rate falls with the length of a run
    ),
    "routers": Study(
        question="Who should choose?",
        variants=("dense", "raw_gates", *(n for n in VARIANTS if n.startswith("router_")), "dense_wide"),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a study; runs that two studies share have the same name."""

    name: str
    variant: str
    config: RunConfig = field(repr=False)


def run_config(variant: str, size: Size, *, steps: int, seed: int, num_kinds: int = NUM_KINDS) -> RunConfig:
    """Settings of a variant's run."""
    chosen = VARIANTS[variant]
    return RunConfig(
        model=ModelConfig(
            dim=size.dim, num_layers=size.num_layers, num_heads=size.dim // 32, num_kv_heads=size.dim // 32,
            patch_size=2, mlp_ratio=chosen.mlp_ratio, pooled_text=True,
        ),
        moe=MoeConfig(**chosen.moe),
        optim=OptimConfig(name="adamw", learning_rate=size.learning_rate * chosen.rate,
                          router_lr_ratio=chosen.router_rate, beta2=0.95, schedule="cosine",
                          warmup_steps=max(1, min(100, steps // 10)), weight_decay=0.01, max_grad_norm=1.0),
        seed=seed, steps=steps, batch_size=size.batch_size, num_kinds=num_kinds,
    )  # fmt: skip


def jobs_of(study: Study, size: Size, *, steps: int, seeds: Sequence[int]) -> list[Job]:
    """Runs of a study, all variants of a seed before the next seed's; a study without seeds has the first alone."""
    own_steps = max(1, round(steps * study.share))
    jobs = []
    for seed in seeds if study.seeds else seeds[:1]:
        for variant in study.variants:
            kinds = "" if study.num_kinds == NUM_KINDS else f"_kinds{study.num_kinds}"
            config = run_config(variant, size, steps=own_steps, seed=seed, num_kinds=study.num_kinds)
            jobs.append(Job(name=f"{variant}{kinds}_steps{own_steps}_seed{seed}", variant=variant, config=config))
    return jobs
