"""ZeRO-3's bookkeeping against DeepSpeed's own; `tests/test_zero3_host_cost.py` starts these on one to three processes.

torchrun --nproc-per-node 2 tests/zero3_checks.py FOLDER lighter_bookkeeping_changes_no_bit ...
"""

import logging
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from named_checks import run_named

from benchmarks.parity import SHAPE, parity_config, random_value
from benchmarks.whole_weights import gather_master
from trainer.diffusion.model import EcDit
from trainer.distributed import World
from trainer.engine import zero3_gather, zero3_host_cost
from trainer.engine.deepspeed_config import load_deepspeed_config
from trainer.engine.engine import build_engine
from trainer.engine.zero_state import flat_masters, publish_master

CPU = torch.device("cpu")
# Each pass of a block gathers what it needs, and gives it back.
NOTHING_KEPT = "stage3_param_persistence_threshold", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"


def losses_of(engine: Any, steps: int, rank: int, *, evaluating: bool = True) -> list[float]:
    """Loss and gradient norm of each step; twice the weights and a pass for evaluation, which ZeRO-3 did not expect."""
    found, generator = [], torch.Generator().manual_seed(rank)
    text, mask = torch.randn(4, 4, 32, generator=generator), torch.ones(4, 4, dtype=torch.bool)
    for step in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator)
        for micro_batch in range(2):
            loss = engine(x, torch.linspace(0.1, 0.9, 4), text, mask)[0].square().mean()
            engine.backward(loss)
            engine.step()
            if evaluating and (step, micro_batch) in ((0, 0), (steps // 2, 0)):
                with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
                    found.append(sum(param.detach().float().abs().sum() for param in engine.module.parameters()).item())
            if evaluating and (step, micro_batch) in ((0, 1), (steps // 2, 0)):
                with torch.no_grad():
                    found.append(engine(x[:2], torch.ones(2), text[:2], mask[:2])[0].sum().item())
        found += [loss.item(), float(engine.get_global_grad_norm())]
    return found


def lighter_bookkeeping_changes_no_bit(world: World, _: Path) -> None:
    """Against DeepSpeed's own, with parameters cut or whole, gathered in parts or by a sum, and recomputed."""
    cut: dict[str, Any] = {"stage3_param_persistence_threshold": 0}
    ahead = {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 3000}
    variants: list[tuple[int, bool, dict[str, Any]]] = [
        (20, False, cut),
        (6, True, ahead | {"stage3_max_reuse_distance": 0, "gradient_clipping": 0.0}),
        (6, False, cut | {"stage3_use_all_reduce_for_fetch_params": True, "reduce_bucket_size": 5000}),
        (6, False, cut | {"contiguous_gradients": False}),
        (6, False, cut | {"reduce_scatter": False}),
        (6, False, cut | {"offload_optimizer": {"device": "cpu"}}),
    ]
    for steps, recompute, zero in variants:
        config = parity_config("adamw", 1 if world.size == 3 else world.size, world.size)
        config = replace(config, train=replace(config.train, activation_checkpointing=recompute, precision="bf16"))
        content = load_deepspeed_config(config, world.size) | {"zero_force_ds_cpu_optimizer": False}
        content["gradient_clipping"] = zero.get("gradient_clipping", content["gradient_clipping"])
        content["zero_optimization"] |= {name: value for name, value in zero.items() if name != "gradient_clipping"}
        found = []
        for stock in (True, False):
            engine = build_engine(config, content, SHAPE, CPU, random_value, stock=stock)
            assert is_light(engine) is not stock
            found.append(losses_of(engine, steps, world.rank))
            coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
            assert stock or (coordinator.is_recorded and any(coordinator.ahead.values()) == (world.size > 1))
            assert any(module is engine.module.blocks[0].cross_attention for module in engine.module.modules())
            engine.destroy()
        assert found[0] == found[1], [i for i, (a, b) in enumerate(zip(*found, strict=True)) if a != b][:1]


def is_light(engine: Any) -> bool:
    return hasattr(engine.optimizer.parameter_offload.get_param_coordinator(), "kept")


def bookkeeping_stays_where_something_is_in_the_way(world: World, _: Path) -> None:
    """Another version, another setting: one sentence, and DeepSpeed as it is."""
    config = parity_config("adamw", 1, world.size)
    content, said = load_deepspeed_config(config, world.size), []
    keep = logging.Handler()
    keep.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger, version = zero3_host_cost.logger, zero3_host_cost.VERSION
    logger.addHandler(keep)
    logger.setLevel(logging.INFO)
    try:
        zero3_host_cost.VERSION = "0.1"
        assert not is_light(build_engine(config, content, SHAPE, CPU, random_value))
        zero3_host_cost.VERSION = version
        for key, value in (("stage3_allgather_sequential", True), ("reduce_scatter", False)):
            changed = content | {"zero_optimization": content["zero_optimization"] | {key: value}}
            assert is_light(build_engine(config, changed, SHAPE, CPU, random_value)) == (key == "reduce_scatter")
    finally:
        zero3_host_cost.VERSION = version
        logger.removeHandler(keep)
    assert len(said) == (3 if world.is_main else 0), said
    if world.is_main:
        assert said[0].endswith(f"deepspeed is {version}, and 0.1 is what was looked into")
        assert said[1].endswith("zero_optimization.allgather_sequential is True")
        assert said[2].endswith("DeepSpeed reduces ZeRO-3's gradients by its own code, which costs the host more: "
                                "its reduce_scatter is False")  # fmt: skip


def each_parameter_is_gathered_no_more_often_than_needed(world: World, _: Path) -> None:
    """Those of blocks in each pass of both micro-batches, the rest once a step, what a rank has for itself never."""
    config = parity_config("adamw", world.size, world.size)
    content = load_deepspeed_config(config, world.size)
    content["zero_optimization"] |= dict.fromkeys(NOTHING_KEPT, 0)
    engine = build_engine(config, content, SHAPE, CPU, random_value)
    counts: Counter[int] = Counter()
    begin = zero3_gather.Gathering.__init__

    def counted(gathering: zero3_gather.Gathering, params: list[Any]) -> None:
        counts.update(id(param) for param in params)
        begin(gathering, params)

    losses_of(engine, 2, world.rank)  # DeepSpeed's own code, and a pass for evaluation
    zero3_gather.Gathering.__init__ = counted  # type: ignore[method-assign]
    try:
        for steps in (1, 2):
            counts.clear()
            losses_of(engine, steps, world.rank, evaluating=False)
            for name, param in engine.module.named_parameters():
                shared = world.size > 1 and ".experts." not in name
                expected = steps * (4 if name.startswith("blocks.") else 1) if shared else 0
                assert counts[id(param)] == expected, (name, counts[id(param)], expected)
                assert shared or param.data_ptr() == param.ds_tensor.data_ptr(), name
    finally:
        zero3_gather.Gathering.__init__ = begin  # type: ignore[method-assign]
        engine.destroy()


def published_weights_are_those_that_compute(world: World, _: Path) -> None:
    """As when pictures are drawn with the average: a forward pass before them, one with them, one after them."""
    config = parity_config("adamw", world.size, world.size)
    content = load_deepspeed_config(config, world.size)
    content["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    for stock in (True, False):
        engine = build_engine(config, content, SHAPE, CPU, random_value, stock=stock)
        model = EcDit(config.model, config.moe, SHAPE)
        losses_of(engine, 2, world.rank)
        for factor in (1.0, 2.0, 0.5):
            with torch.no_grad():
                for flat in flat_masters(engine):
                    flat.mul_(factor)
                publish_master(engine)
                model.load_state_dict(gather_master(engine))
                x, text = torch.ones(4, 3, 8, 8), torch.ones(4, 4, 32)
                inputs = x, torch.linspace(0.1, 0.9, 4), text, torch.ones(4, 4, dtype=torch.bool)
                torch.testing.assert_close(engine(*inputs)[0], model(*inputs)[0], rtol=1e-5, atol=1e-5)
        engine.destroy()


if __name__ == "__main__":
    run_named(sys.argv[2:], lambda world, name: globals()[name](world, Path(sys.argv[1])))
