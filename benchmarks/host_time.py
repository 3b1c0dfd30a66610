"""CPU time of one block in a training step, under ZeRO and without DeepSpeed: what starting its kernels costs the host.

    python -m benchmarks.host_time                                        # tiny shapes: nearly all of it is the host's
    torchrun --nproc-per-node 2 -m benchmarks.host_time parallel.ep_size=2
    python -m benchmarks.host_time ec_dit_xl_8e train.micro_batch_size=1 --layers 1 2

Each side trains the recipe's model with two numbers of blocks, all in one process and in turn. A block's time is the
difference of two whole steps (forward, backward, update, average) by the difference of their blocks, so what a step
costs beside blocks is not in it. Half of the blocks are MoE blocks where the recipe has them so.

- `plain`      the model with torch's optimizer: no DeepSpeed (on several processes: no exchange, all experts local)
- `zero1`      stage 1
- `zero3`      stage 3, every parameter cut (`stage3_param_persistence_threshold` 0, as in a model of real width)
- `zero3 stock` stage 3 with DeepSpeed's own bookkeeping, without trainer/engine/zero3_host_cost.py
"""

import argparse
from pathlib import Path

from trainer.cluster.leave import run_and_leave
from trainer.config import command_parser

SIDES = ("plain", "zero1", "zero3", "zero3 stock")
# Widths so small that kernels take no time beside the dispatch that starts them.
TINY = (
    "model.dim=16", "model.num_heads=2", "model.num_kv_heads=1", "data.image_size=8", "data.num_workers=0",
    "train.micro_batch_size=2", "train.precision=bf16", "train.activation_checkpointing=false",
)  # fmt: skip


def command_line() -> argparse.ArgumentParser:
    """Options; see the module docstring."""
    parser = command_parser("benchmarks.host_time", __doc__)
    parser.add_argument("words", nargs="*", metavar="[RECIPE] key=value", help="(default: debug, made tiny)")
    parser.add_argument("--layers", type=int, nargs=2, default=[2, 8], help="blocks of the two models")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=4, help="steps of a turn (default %(default)s)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser


if __name__ == "__main__":
    command_line().parse_known_args()  # --help and mistakes are answered before torch is imported

import os

# Read by the OpenMP runtime that torch loads: waiting threads sleep, so CPU time counts work only.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import torch

from benchmarks.interleaved import markdown_table, ratio, time_interleaved, write_json
from benchmarks.step import RandomData
from trainer.config import TrainConfig, load_config, require, run_cli
from trainer.data.position import DataState
from trainer.diffusion.compiled import CompiledBlocks, is_wanted
from trainer.diffusion.flow import NoisedBatch, training_loss
from trainer.diffusion.model import ModelShape
from trainer.distributed import World, detect_world, process_group
from trainer.engine.deepspeed_config import load_deepspeed_config
from trainer.engine.ema import Ema
from trainer.engine.engine import build_engine, build_model
from trainer.engine.optim import build_optimizer
from trainer.loop.step import next_step, noised_batches, train_step
from trainer.plan.__main__ import parse as parse_plan
from trainer.plan.command import data_shape
from trainer.plan.job import Job
from trainer.telemetry.step_timer import StepTimer

Step = Callable[[list[NoisedBatch]], None]
RATE = 1e-5
# On a CPU one thread starts everything; others send, as a network card and a GPU would. On a GPU backward passes have
# threads of their own.
CLOCK = time.process_time if torch.cuda.is_available() else time.thread_time


def resolved(config: TrainConfig, world: World, stage: int) -> dict[str, Any]:
    """The recipe's DeepSpeed settings at another stage, at stage 3 with every parameter cut."""
    content = load_deepspeed_config(config, world.size)
    cut = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return content | {"zero_optimization": content["zero_optimization"] | {"stage": stage} | cut}


def zero_step(
    config: TrainConfig, shape: ModelShape, world: World, device: torch.device, updates: list[float], side: str
) -> Step:
    """One call is one step of a run with an engine: update and average."""
    content = resolved(config, world, int(side[4]))
    engine = build_engine(config, content, shape, device, stock=side.endswith("stock"))
    ema, timer, number, update = Ema(engine, config.ema), StepTimer(device), count(1), engine.step

    def measured() -> None:
        begin = CLOCK()
        update()
        updates.append(CLOCK() - begin)

    engine.step = measured

    def step(batches: list[NoisedBatch]) -> None:
        train_step(engine, batches, RATE, device, timer, patch_size=config.model.patch_size, statistics=False)
        begin = CLOCK()
        ema.update(engine, next(number))
        updates[-1] += CLOCK() - begin

    return step


def plain_step(
    config: TrainConfig, shape: ModelShape, world: World, device: torch.device, updates: list[float]
) -> Step:
    """The same with torch alone: working weights as the engine has them, one fused AdamW, one average."""
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    model = build_model(config, resolved(config, world, 1), shape).to(device, dtype)
    if is_wanted(config.train.compile, device):
        CompiledBlocks(model)
    optimizer = build_optimizer(model.named_parameters(), config.optim)
    weights = list(model.parameters())
    average = [weight.detach().float() for weight in weights]

    def step(batches: list[NoisedBatch]) -> None:
        for batch in batches:
            noised = batch.to(device)
            inputs = noised.x_BCHW, noised.t_B, noised.text_BLD, noised.text_mask_BL, noised.keep_BS
            training_loss(model(*inputs)[0], noised, config.model.patch_size).backward()
        begin = CLOCK()
        torch.nn.utils.clip_grad_norm_(weights, config.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, [weight.float() for weight in weights], 1e-3)
        updates.append(CLOCK() - begin)

    return step


def build_steps(
    options: argparse.Namespace, device: torch.device
) -> tuple[dict[tuple[str, int], Callable[[], None]], dict[tuple[str, int], list[float]]]:
    """For each side and number of blocks a function that takes one step, on one batch that never changes, and the list
    to which it adds the seconds of its update and average.
    """
    named = bool(options.words) and "=" not in options.words[0]
    name = options.words[0] if named else "debug"
    given = options.words[1:] if named else [*TINY, *options.words]
    world = detect_world()
    steps: dict[tuple[str, int], Callable[[], None]] = {}
    updates: dict[tuple[str, int], list[float]] = {}
    for layers in options.layers:
        overrides = [*given, f"model.num_layers={layers}"]
        config = load_config(name, overrides)
        shape, tokens = data_shape(config, parse_plan([name, *overrides]))
        job = Job(config=config, shape=shape, text_tokens=tokens, zero={})
        data = RandomData(job, config.global_batch_size(world.size))
        start = DataState(seed=0, epoch=0, consumed=0, samples_seen=0)
        batches = noised_batches(data, config, rank=world.rank, world_size=world.size, state=start)
        batch = next_step(batches, config, 0)
        for side in options.sides:
            build = plain_step if side == "plain" else partial(zero_step, side=side)
            updates[side, layers] = []
            steps[side, layers] = partial(build(config, shape, world, device, updates[side, layers]), batch)
    return steps, updates


def run(options: argparse.Namespace) -> None:
    """Measure and print on the main process, write the JSON."""
    small, large = options.layers
    require(0 < small < large, f"--layers {small} {large}: give two numbers of blocks, the smaller one first")
    with process_group(detect_world()) as device:
        _measure(options, device)


def _measure(options: argparse.Namespace, device: torch.device) -> None:
    small, large = options.layers
    steps, updates = build_steps(options, device)
    names = {f"{side} {layers}": step for (side, layers), step in steps.items()}
    times = time_interleaved(names, rounds=options.rounds, repeats=options.repeats, warmups=4, clock=CLOCK)
    if not detect_world().is_main:
        return

    def milliseconds(side: str, layers: int) -> list[float]:
        return [1000 * seconds / options.repeats for seconds in times[f"{side} {layers}"].cpu]

    blocks = {
        side: [
            (b - a) / (large - small) for a, b in zip(milliseconds(side, small), milliseconds(side, large), strict=True)
        ]
        for side in options.sides
    }
    rows = []
    for side in options.sides:
        found = ratio(blocks[side], blocks[options.sides[0]])
        whole = statistics.median(milliseconds(side, large))
        few, many = (statistics.median(updates[side, layers]) for layers in options.layers)
        update = 1000 * (many - few) / (large - small)
        spread = f"{found.median:.2f} ({found.low:.2f} - {found.high:.2f})"
        rows.append([side, f"{statistics.median(blocks[side]):.2f}", f"{update:.2f}", spread, f"{whole:.1f}"])
    head = ["", "CPU ms a block", "of it update", f"ratio to {options.sides[0]}", f"CPU ms a step of {large} blocks"]
    print(markdown_table(head, rows), flush=True)
    if options.json:
        write_json(
            options.json,
            {"layers": options.layers, "block_ms": blocks, "cpu_seconds": {n: t.cpu for n, t in times.items()}},
        )


def main(argv: list[str] | None = None) -> None:
    """Print the table; exit code 2 and one sentence on a wrong option."""
    run_cli(lambda: run(command_line().parse_intermixed_args(argv)))


if __name__ == "__main__":
    run_and_leave(main)
