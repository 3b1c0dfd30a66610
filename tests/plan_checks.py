"""Bytes that a real engine holds against the planner's; `tests/test_plan.py` starts this.

torchrun --nproc-per-node 2 tests/plan_checks.py "ep_size 2 ZeRO 3 bf16" ...
"""

import gc
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from named_checks import run_named

from benchmarks.parity import SHAPE, parity_config
from trainer.distributed import World
from trainer.engine.deepspeed_config import load_deepspeed_config
from trainer.engine.ema import Ema
from trainer.engine.engine import build_engine
from trainer.engine.zero_state import flat_masters
from trainer.plan.job import Job, Layout
from trainer.plan.memory import state_terms


def bytes_of(tensors: Iterable[Any]) -> dict[int, int]:
    """Size of each storage behind the tensors."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found


def everything() -> dict[int, int]:
    """All storages that a Python object reaches, gradients of parameters included."""
    gc.collect()
    found = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    return bytes_of([*found, *(o.grad for o in found if o.is_leaf and o.grad is not None)])


def backward(engine: Any) -> None:
    out, _ = engine(torch.randn(4, 3, 8, 8), torch.rand(4), torch.randn(4, 4, 32), torch.ones(4, 4, dtype=torch.bool))
    engine.backward(out.square().mean())


def compare(world: World, ep_size: int, stage: int, precision: Any) -> str:
    config = parity_config("adamw", ep_size, world.size)
    config = replace(
        config,
        model=replace(config.model, dim=128),
        train=replace(config.train, precision=precision, gradient_accumulation_steps=2),
        parallel=replace(config.parallel, deepspeed_config=f"ds_configs/zero{stage}.json"),
    )
    content = load_deepspeed_config(config, world.size)
    zero = content["zero_optimization"]
    zero |= {"reduce_bucket_size": 600_000, "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0}
    before = everything()
    engine = build_engine(config, content, SHAPE, torch.device("cpu"))
    ema = Ema(engine, config.ema)
    for _ in range(2):
        backward(engine)
        engine.step()
    backward(engine)  # the first of two: what is accumulated, before stage 1 reduces it
    held = {key: size for key, size in everything().items() if key not in before}
    layout = Layout(
        world_size=world.size, ep_size=ep_size, stage=stage, micro_batch_size=4, accumulation=2, recompute=False
    )
    job = Job(config=config, shape=SHAPE, text_tokens=4, zero=zero)
    expected = {term.name: term.value for term in state_terms(job, layout) if term.name != "gathered weights"}
    states = engine.optimizer.optimizer.state
    moments = [value for state in states.values() for key, value in state.items() if key != "step"]
    parameters = list(engine.module.parameters())
    weights = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")] + [p for p in parameters if p.numel()]
    measured = {
        "weights": sum(bytes_of(weights).values()),
        "optimizer": sum(bytes_of([*flat_masters(engine), *moments]).values()),
        "average": sum(bytes_of(ema.average.values()).values()),
    }
    total, all_expected = sum(held.values()), sum(expected.values())
    for name, size in [*measured.items(), ("sum", total)]:
        wanted = all_expected if name == "sum" else expected[name]
        assert abs(size - wanted) <= 0.1 * wanted, (precision, stage, ep_size, name, size, wanted, measured, expected)
    engine.destroy()
    return f"{precision} ep_size {ep_size} ZeRO {stage}: {total} bytes, {total / all_expected:.3f} of the plan"


def check(world: World, name: str) -> None:
    """One case, such as "ep_size 2 ZeRO 3 bf16"."""
    _, ep_size, _, stage, precision = name.split()
    print(compare(world, int(ep_size), int(stage), precision), flush=True)


if __name__ == "__main__":
    run_named(sys.argv[1:], check)
