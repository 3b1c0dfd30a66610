"""Checks of the engine on several real processes: compiled blocks, and routers that learn at a rate of their own.

`distributed_checks.py` runs them with its own.
"""

from dataclasses import replace
from typing import Any

import torch

from benchmarks.parity import SHAPE, parity_config, random_value
from benchmarks.whole_weights import gather_master
from moe.layer import set_capacity_factor
from trainer.config import TrainConfig
from trainer.diffusion.compiled import CompiledBlocks
from trainer.distributed import World
from trainer.engine.deepspeed_config import load_deepspeed_config
from trainer.engine.engine import build_engine
from trainer.engine.optim import set_learning_rate


def engine_of(config: TrainConfig, stage: int, world: World) -> object:
    config = replace(config, parallel=replace(config.parallel, deepspeed_config=f"ds_configs/zero{stage}.json"))
    return build_engine(config, load_deepspeed_config(config, world.size), SHAPE, torch.device("cpu"), random_value)


def inputs(batch: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    text = torch.randn(batch, 4, 32, generator=generator)
    x = torch.randn(batch, 3, 8, 8, generator=generator)
    return x, torch.linspace(0.1, 0.9, batch), text, torch.ones(batch, 4, dtype=torch.bool)


def compiled_blocks_learn_what_plain_ones_do(world: World) -> None:
    """Weights after two steps of SGD under ZeRO-3 with the all-to-all inside the graphs, recomputed or not; and while
    the capacity falls, when MoE blocks run uncompiled between compiled ones."""
    torch._dynamo.reset()
    found = torch._dynamo.utils.counters
    found.clear()  # of what earlier checks compiled
    falling = {"capacity_factor_start": 3.0, "capacity_anneal_steps": 2}
    for recompute, schedule in ((False, {}), (True, {}), (True, falling)):
        config = parity_config("sgd", 2, world.size)
        config = replace(
            config, moe=replace(config.moe, **schedule),
            train=replace(config.train, activation_checkpointing=recompute, gradient_accumulation_steps=1),
        )  # fmt: skip
        weights = []
        for compiled in (False, True):
            engine: Any = engine_of(config, 3, world)
            if compiled:
                CompiledBlocks(engine.module, backend="aot_eager")
            for step in range(2):
                set_capacity_factor(engine.module, config.moe.factor_at(step))
                engine.backward(engine(*inputs(4))[0].square().mean())
                engine.step()
            weights.append(gather_master(engine))
            engine.destroy()
        for name, value in weights[0].items():
            torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-6, msg=f"{name} {recompute}")
    assert not found["graph_break"] and found["stats"]["unique_graphs"] == 4, "two kinds, recomputed or not"


def routers_move_by_their_share_of_the_rate(world: World) -> None:
    """A group of their own in all stages: gradient descent moves them by that share, and all else as without it."""
    for stage in (1, 3):
        moved = []
        for ratio in (1.0, 0.25):
            config = parity_config("sgd", 2, world.size)
            optim = replace(config.optim, router_lr_ratio=ratio)
            config = replace(config, optim=optim, train=replace(config.train, gradient_accumulation_steps=1))
            engine: Any = engine_of(config, stage, world)
            before = gather_master(engine)
            engine.backward(engine(*inputs(4))[0].square().mean())
            set_learning_rate(engine.optimizer, 0.1)
            engine.step()
            after = gather_master(engine)
            moved.append({name: after[name] - before[name] for name in before})
            engine.destroy()
        for name, whole in moved[0].items():
            share = 0.25 if name.endswith("router.weight") else 1.0
            torch.testing.assert_close(
                moved[1][name], share * whole, rtol=1e-5, atol=1e-7, msg=f"{name}, stage {stage}"
            )
        assert any(name.endswith("router.weight") and change.abs().max() > 0 for name, change in moved[0].items())
