"""Parity of training under ZeRO and expert parallelism with one plain process, as a table.

    torchrun --nproc-per-node 4 -m benchmarks.parity
    torchrun --nproc-per-node 2 -m benchmarks.parity --routers token_choice expert_race --optimizers sgd --stages 3
    torchrun --nproc-per-node 2 -m benchmarks.parity --compile --recompute

fp32, 5 optimizer steps with gradient accumulation 2 and clipping that is always active. The reference is one process
with a model, noise and loss of its own (`benchmarks.plain_model`) and torch's plain optimizers; from the code that it
judges it has its data and initial values only. SGD shows errors in the scale of gradients, which AdamW hides.
Columns: largest relative difference of loss and of global gradient norm over the steps; largest difference of a
parameter, relative to its own update and beyond one rounding of each weight: of a tensor that hardly moves, a single
rounding is more than 1e-4 of the update.
Where images of a batch compete (pools, balance losses) the reference takes each rank's micro-batch by itself.
Exits 1 if a row is outside the bounds.
"""

import argparse

from trainer.cluster.leave import run_and_leave
from trainer.config import command_parser


def command_line() -> argparse.ArgumentParser:
    """Options; see the module docstring."""
    parser = command_parser("benchmarks.parity", __doc__)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ep-sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adamw"], choices=["sgd", "adamw"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--routers", nargs="+", default=["expert_choice"])
    parser.add_argument("--compile", action="store_true", help="with compiled blocks")
    parser.add_argument("--recompute", action="store_true", help="with activation checkpointing")
    return parser


if __name__ == "__main__":
    command_line().parse_known_args()  # --help and mistakes are answered before torch is imported

import itertools
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.plain_model import PlainDit, plain_loss
from benchmarks.whole_weights import gather_master
from moe.config import MoeConfig
from moe.layer import auxiliary_loss
from moe.routers.registry import ROUTERS, router_class
from trainer.config import DataConfig, DiffusionConfig, OptimConfig, ParallelConfig, TrainConfig, TrainLoopConfig
from trainer.config import ModelConfig as Size
from trainer.data.dataset import open_dataset
from trainer.data.loader import build_loader
from trainer.data.position import DataState
from trainer.diffusion.flow import noise_batch, training_loss
from trainer.diffusion.model import ModelShape
from trainer.distributed import World, all_reduce_mean, detect_world, from_main, process_group
from trainer.engine.deepspeed_config import load_deepspeed_config
from trainer.engine.engine import build_engine
from trainer.randomness import keyed_generator

GLOBAL_BATCH, ACCUMULATION, STEPS = 16, 2, 5
# Every registered router in its example, and two settings that any router could have.
VARIANTS: dict[str, dict[str, Any]] = {
    **{
        name: {"router": name, "auxiliary_weight": 0.1, **router_class(name).traits.example} for name in ROUTERS
    },
    "group": {"pool": "group(2)", "gate": "sigmoid"},
    "identity": {"gate": "identity", "num_shared_experts": 1},
    "nucleus": {
        "gate": "sigmoid", "router_input": "unmodulated", "normalize_gates": True, "gate_scale": 2.5,
        "num_shared_experts": 1,
    },
}  # fmt: skip
LOSS_BOUND, NORM_BOUND, UPDATE_BOUND = 1e-6, 1e-6, 1e-5
SHAPE = ModelShape(channels=3, height=8, width=8, text_dim=32)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Loss and gradient norm of each step, and the fp32 weights before and after."""

    losses: list[float]
    norms: list[float]
    start: dict[str, Tensor]
    end: dict[str, Tensor]


def random_value(name: str, shape: tuple[int, ...], seed: int, first_expert: int) -> Tensor:
    """Like the real initial values, but with nothing at zero, so that every gradient is exercised."""
    count = shape[0] if ".experts." in name else 1
    part = shape[1:] if ".experts." in name else shape
    draws = [torch.randn(part, generator=keyed_generator(seed, name, first_expert + i)) for i in range(count)]
    value = torch.stack(draws) if ".experts." in name else draws[0]
    scale = 0.3 if len(part) < 2 or name.endswith("modulation") else part[-1] ** -0.5
    return 1 + 0.1 * value if "_norm" in name else scale * value


def parity_config(
    optimizer: str, ep_size: int, world_size: int, router: str = "expert_choice", *, accumulation: int = ACCUMULATION
) -> TrainConfig:
    """The small model of the comparison; its clipping threshold lies below every gradient norm."""
    micro = GLOBAL_BATCH // accumulation // world_size
    rate = 0.1 if optimizer == "sgd" else 1e-3
    return TrainConfig(
        train=TrainLoopConfig(micro_batch_size=micro, gradient_accumulation_steps=accumulation, max_steps=STEPS),
        parallel=ParallelConfig(ep_size=ep_size),
        moe=MoeConfig(**VARIANTS[router]),
        model=Size(dim=32, num_layers=4, num_heads=2, num_kv_heads=1, patch_size=2, pooled_text=True),
        optim=OptimConfig(
            name="sgd" if optimizer == "sgd" else "adamw", learning_rate=rate, eps=1e-6, max_grad_norm=0.1
        ),
        data=DataConfig(image_size=8),
        diffusion=DiffusionConfig(),
    )


def reference_trace(config: TrainConfig, steps: int) -> Trace:
    """One process, plain model, torch's optimizer and clipping."""
    model = PlainDit(config.model, config.moe, SHAPE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_value(name, tuple(parameter.shape), config.seed, 0))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = _plain_optimizer(model, config.optim)
    batches = _batches(config, World(rank=0, local_rank=0, size=1))
    losses, norms, accumulation = [], [], config.train.gradient_accumulation_steps
    for _ in range(steps):
        total = 0.0
        for _ in range(accumulation):
            loss = plain_loss(model, next(batches), config.diffusion, config.seed)
            (loss / accumulation).backward()
            total += float(loss.detach()) / accumulation
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return Trace(losses=losses, norms=norms, start=start, end={n: p.detach() for n, p in model.named_parameters()})


def _plain_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD, or AdamW tensor by tensor; matrices are all that decays."""
    groups: list[dict[str, Any]] = []
    for name, parameter in model.named_parameters():
        decay = config.weight_decay if name.endswith((".weight", ".w1", ".w2")) else 0.0
        groups.append({"params": [parameter], "weight_decay": decay})
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, foreach=False)
    betas = config.beta1, config.beta2
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.eps, foreach=False)


def _batches(config: TrainConfig, world: World) -> Any:
    state = DataState(seed=config.seed, epoch=0, consumed=0, samples_seen=0)
    return build_loader(open_dataset(config), config, rank=world.rank, world_size=world.size, state=state)


def _loss(model: Any, config: TrainConfig, batch: Any) -> Tensor:
    noised = noise_batch(batch, config.diffusion, seed=config.seed, patch_size=config.model.patch_size)
    prediction, stats = model(noised.x_BCHW, noised.t_B, noised.text_BLD, noised.text_mask_BL)
    loss, own = training_loss(prediction, noised, config.model.patch_size), auxiliary_loss(stats)
    return loss if own is None else loss + own


def engine_trace(config: TrainConfig, stage: int, world: World, start: dict[str, Tensor], steps: int) -> Trace:
    """The same steps through the DeepSpeed engine. Collective."""
    config = replace(config, parallel=replace(config.parallel, deepspeed_config=f"ds_configs/zero{max(stage, 1)}.json"))
    content = load_deepspeed_config(config, world.size)
    content["zero_optimization"] |= {"stage": stage, "overlap_comm": False}
    if stage == 3:
        content["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    engine = build_engine(config, content, SHAPE, torch.device("cpu"), random_value)
    batches = _batches(config, world)
    losses, norms = [], []
    for _ in range(steps):
        total = torch.zeros(1, dtype=torch.float64)
        for _ in range(ACCUMULATION):
            loss = _loss(engine, config, next(batches))
            engine.backward(loss)
            engine.step()
            total += loss.detach().double() / ACCUMULATION
        losses.append(all_reduce_mean(total).item())
        norm = engine.get_global_grad_norm()
        norms.append(float(norm) if norm is not None else float("nan"))
    end = gather_master(engine) if stage else {}
    engine.destroy()
    return Trace(losses=losses, norms=norms, start=start, end=end)


def differences(reference: Trace, trace: Trace) -> tuple[float, float, float]:
    """(loss, gradient norm, update): largest relative differences."""
    rounding = torch.finfo(torch.float32).eps
    loss = max(abs(a - b) / abs(a) for a, b in zip(reference.losses, trace.losses, strict=True))
    norm = max(abs(a - b) / a for a, b in zip(reference.norms, trace.norms, strict=True))
    update = float("nan")
    if trace.end:
        update = max(
            float(((trace.end[name].detach() - end).abs() - rounding * end.abs()).clamp_min(0).norm())
            / float((end - reference.start[name]).norm())
            for name, end in reference.end.items()
        )
    return loss, norm, update


def main(argv: list[str] | None = None) -> None:
    """Print the table for this number of processes."""
    parser = command_line()
    arguments = parser.parse_args(argv)
    for router in arguments.routers:
        if router not in VARIANTS:
            parser.error(f"argument --routers: invalid choice: {router!r} (choose from {', '.join(VARIANTS)})")
    world = detect_world()
    import deepspeed.utils

    deepspeed.utils.logger.setLevel("ERROR")
    with process_group(world):
        failed = False
        if world.is_main:
            print("| optimizer | router | processes | ep_size | ZeRO | loss | grad norm | update |")
            print("|---|---|---|---|---|---|---|---|")
        for optimizer, router in itertools.product(arguments.optimizers, arguments.routers):
            competing = router != "expert_choice"
            accumulation = ACCUMULATION * (world.size if competing else 1)
            plain = parity_config(optimizer, 1, 1, router, accumulation=accumulation)
            reference = from_main(world, partial(reference_trace, plain, arguments.steps))
            assert min(reference.norms) > 0.1, "clipping must be active"
            for ep_size, stage in itertools.product(arguments.ep_sizes, arguments.stages):
                if world.size % ep_size:
                    continue
                config = parity_config(optimizer, ep_size, world.size, router)
                how = replace(config.train, compile=arguments.compile, activation_checkpointing=arguments.recompute)
                config = replace(config, train=how)
                loss, norm, update = differences(
                    reference, engine_trace(config, stage, world, reference.start, arguments.steps)
                )
                good = loss <= LOSS_BOUND and norm <= NORM_BOUND and update <= UPDATE_BOUND
                failed |= not good
                if world.is_main:
                    row = f"| {optimizer} | {router} | {world.size} | {ep_size} | {stage} |"
                    row += f" {loss:.1e} | {norm:.1e} | {update:.1e} |"
                    print(row + ("" if good else " outside the bounds"), flush=True)
        if failed:
            sys.exit(1)


if __name__ == "__main__":
    run_and_leave(main)
