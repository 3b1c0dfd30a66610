"""A training step of a recipe at full size on the devices at hand, against what the planner says of it.

    python -m benchmarks.step ec_dit_xl_8e train.micro_batch_size=64 --device h100
    torchrun --nproc-per-node 8 -m benchmarks.step ec_dit_xl_32e --device h100 --steps 20 --json step.json
    python -m benchmarks.step ec_dit_xl_8e model.num_layers=8 --device h100 --micro-batches 32,64,128,256,512

The engine, the optimizer step and the average are those of a run; data are random tensors of the recipe's shapes that
lie in memory, made into noised batches by `data.num_workers` processes as in training. Nothing is read or written.
`--device` is what trainer.plan should take the devices for; its other options (`--text-tokens`, ...) work, too.

`step` is the median over the steps; then one is measured section by section (trainer/telemetry/step_timer.py), which is
slower. Memory is the most that PyTorch held at once, and with it what the device context and the libraries take.

`--micro-batches` takes these sizes one after another in one process, and says what a step is made of: seconds of an
image (the GPU), and those that a step takes however small it is (the host). The planner's terms are fitted with it.
"""

import argparse
from pathlib import Path


def command_line() -> argparse.ArgumentParser:
    """Options; see the module docstring."""
    parser = argparse.ArgumentParser(prog="benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="h100", help="what trainer.plan takes the devices for")
    parser.add_argument("--steps", type=int, default=10, help="measured steps (default %(default)s)")
    parser.add_argument("--warmups", type=int, default=3, help="steps before them (default %(default)s)")
    parser.add_argument("--micro-batches", default="", metavar="N,N,...", help="sizes to measure one after another")
    parser.add_argument("--profile", action="store_true", help="also say which kinds of kernels a step's time goes to")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    return parser


if __name__ == "__main__":
    command_line().parse_known_args()  # --help and mistakes are answered before torch is imported

import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.interleaved import markdown_table, wait_for_gpu, write_json
from benchmarks.kernel_shares import kernel_seconds, shares
from benchmarks.step_fit import fit_steps, read_sizes
from trainer.cluster.leave import run_and_leave
from trainer.config import TrainConfig, require, run_cli
from trainer.data.latents.samples import LatentInfo, Sample
from trainer.data.order import SampleLayout
from trainer.data.position import DataState
from trainer.diffusion.flow import NoisedBatch
from trainer.distributed import World, all_reduce_mean, detect_world, process_group
from trainer.encoders.protocols import TextEncoder
from trainer.engine.deepspeed_config import load_deepspeed_config
from trainer.engine.determinism import make_deterministic
from trainer.engine.ema import Ema
from trainer.engine.engine import build_engine
from trainer.loop.step import next_step, noised_batches, train_step
from trainer.plan.__main__ import parse as parse_plan
from trainer.plan.command import plan
from trainer.plan.job import Job
from trainer.telemetry.step_timer import StepTimer


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One rank's numbers; seconds are means over the ranks. Memory is 0 on a CPU."""

    steps: list[float]
    sections: dict[str, float]
    allocated_bytes: float
    taken_bytes: float


class Bench:
    """An engine with random data of the recipe's shapes."""

    def __init__(self, job: Job, world: World, device: torch.device) -> None:
        self.config, self.device = job.config, device
        content = load_deepspeed_config(self.config, world.size)
        self.engine = build_engine(self.config, content, job.shape, self.device)
        self.ema = Ema(self.engine, self.config.ema)
        self.timer = StepTimer(self.device)
        self.job, self.world = job, world
        self.feed(self.config.train.micro_batch_size)

    def feed(self, micro_batch_size: int) -> None:
        """Have the steps that follow take micro-batches of this size."""
        self.config = replace(self.config, train=replace(self.config.train, micro_batch_size=micro_batch_size))
        start, world = DataState(seed=0, epoch=0, consumed=0, samples_seen=0), self.world
        data = RandomData(self.job, self.config.global_batch_size(world.size))
        self.batches = noised_batches(data, self.config, rank=world.rank, world_size=world.size, state=start)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def step(self, number: int, micro_batches: list[NoisedBatch]) -> list[NoisedBatch]:
        """One step as the training loop takes it: update, average, then the data of the next one, then the loss."""
        result = train_step(
            self.engine, micro_batches, 1e-5, self.device, self.timer, patch_size=self.config.model.patch_size,
            statistics=False,
        )  # fmt: skip
        with self.timer.section("optimizer"):
            self.ema.update(self.engine, number + 1)
        with self.timer.section("data"):
            upcoming = next_step(self.batches, self.config, number + 1)
        all_reduce_mean(result.losses.mean()).item()
        return upcoming

    def measure(self, steps: int, warmups: int) -> Measured:
        """Time `steps` steps after `warmups`, and one more in sections."""
        upcoming, seconds = next_step(self.batches, self.config, 0), []
        for number in range(warmups + steps):
            wait_for_gpu()
            start = time.perf_counter()
            upcoming = self.step(number, upcoming)
            wait_for_gpu()
            seconds.append(time.perf_counter() - start)
        allocated, taken = device_memory()
        with self.timer.measuring(self.engine, True):
            self.step(warmups + steps, upcoming)
        means = all_reduce_mean(torch.tensor(seconds[warmups:], device=self.device)).tolist()
        sections = {name.removeprefix("time/"): value for name, value in self.timer.take().items()}
        return Measured(steps=means, sections=sections, allocated_bytes=allocated, taken_bytes=taken)

    def kernels(self, number: int) -> dict[str, float]:
        """Seconds of each kind of kernels in one step, on a GPU."""
        upcoming = next_step(self.batches, self.config, number)
        return kernel_seconds(lambda: self.step(number, upcoming))


class RandomData:
    """A global batch of samples of the job's shapes that are all the same; captions are as long as can be."""

    online_encoder: TextEncoder | None = None

    def __init__(self, job: Job, size: int) -> None:
        generator, shape, tokens = torch.Generator().manual_seed(0), job.shape, job.text_tokens
        self.layout = SampleLayout.of_shards([size])
        self.info = LatentInfo(
            channels=shape.channels, height=shape.height, width=shape.width, text_dim=shape.text_dim,
            max_tokens=tokens, codec="", text_encoder="", fingerprint="random",
            mean=[0.0] * shape.channels, std=[1.0] * shape.channels,
        )  # fmt: skip
        self.sample = Sample(
            latent=torch.randn(shape.channels, shape.height, shape.width, generator=generator),
            text=torch.randn(tokens, shape.text_dim, generator=generator).half(),
        )
        self.empty_text: Tensor | str = torch.zeros(1, shape.text_dim, dtype=torch.float16)
        self.size = size

    def __len__(self) -> int:
        return self.size

    def read(self, sample: int) -> Sample:
        """The one sample."""
        return self.sample


def device_memory() -> tuple[float, float]:
    """(most that tensors took at once, what is gone from the device now) in bytes; zeros on a CPU."""
    if not torch.cuda.is_available():
        return 0.0, 0.0
    free, total = torch.cuda.mem_get_info()
    return float(torch.cuda.max_memory_allocated()), float(total - free)


def compare(planned: dict[str, Any], found: Measured, config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Planned and measured value of each line of the table."""
    step = statistics.median(found.steps)
    flops = planned["terms"]["model FLOPs per rank"]
    peak_flops = flops / planned["step_seconds"] / planned["mfu"]
    reserved = planned["terms"]["reserved"]
    return {
        "step, s": (planned["step_seconds"], step),
        "images/s": (planned["images_per_second"], config.global_batch_size(world_size) / step),
        "MFU, %": (100 * planned["mfu"], 100 * flops / step / peak_flops),
        "memory of tensors, GB": ((planned["peak_bytes"] - reserved) / 1e9, found.allocated_bytes / 1e9),
        "memory taken from the device, GB": (planned["peak_bytes"] / 1e9, found.taken_bytes / 1e9),
    }


def sweep(options: argparse.Namespace, planned: list[float], sizes: list[int], bench: Bench) -> None:
    """Measure each size, print a line as it comes, then what a step is made of, planned and measured."""
    is_main, measured = bench.world.is_main, []
    if is_main:
        print("| images in a micro-batch | planned, s | measured, s | images/s |\n|---|---|---|---|")
    for size, expected in zip(sizes, planned, strict=True):
        bench.feed(size)
        measured.append(statistics.median(bench.measure(options.steps, options.warmups).steps))
        if is_main:
            speed = bench.config.global_batch_size(bench.world.size) / measured[-1]
            print(f"| {size} | {expected:.4g} | {measured[-1]:.4g} | {speed:.4g} |", flush=True)
    if is_main:
        accumulated = bench.config.train.gradient_accumulation_steps
        for name, seconds in (("planned", planned), ("measured", measured)):
            print(f"{name}: {fit_steps([accumulated * size for size in sizes], seconds)}", flush=True)
        if options.json:
            write_json(options.json, {"sizes": sizes, "planned": planned, "measured": measured})


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Plan, measure, print the table on the main process, write the JSON."""
    require(options.steps >= 1, f"--steps is {options.steps}: use 1 or more")
    sizes, world = read_sizes(options.micro_batches), detect_world()
    arguments = [*rest, "--device", options.device, "--world-size", str(world.size)]
    report, job, _, _ = plan(parse_plan(arguments))
    each = [plan(parse_plan([*arguments, f"train.micro_batch_size={size}"]))[0] for size in sizes]
    if job.config.train.deterministic:
        make_deterministic()
    with process_group(world) as device:
        bench = Bench(job, world, device)
        if sizes:
            sweep(options, [planned["configured"]["step_seconds"] for planned in each], sizes, bench)
        else:
            compare_with_plan(options, report, bench)


def compare_with_plan(options: argparse.Namespace, report: dict[str, Any], bench: Bench) -> None:
    """The configured micro-batch: a table of what was planned and what was measured."""
    found = bench.measure(options.steps, options.warmups)
    kinds = bench.kernels(options.warmups + options.steps + 1) if options.profile else {}
    bench.engine.destroy()  # another benchmark of this process may need its memory
    world = bench.world
    if not world.is_main:
        return
    lines = compare(report["configured"], found, bench.config, world.size)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    layout = report["configured"]["layout"]
    print(f"\n{world.size} x {name}, {report['parameters']['total'] / 1e9:.3f}B parameters, {layout}")
    rows = [[key, f"{a:.4g}", f"{b:.4g}", f"{b / a:.2f}"] for key, (a, b) in lines.items()]
    print("\n" + markdown_table(["", "planned", "measured", "measured / planned"], rows))
    sections = ", ".join(f"{key} {value:.4f}" for key, value in found.sections.items())
    print(f"\nsections of a measured step, s: {sections}", flush=True)
    if kinds:
        print(shares(kinds), flush=True)
    if options.json:
        write_json(options.json, {"lines": lines, "measured": asdict(found), "plan": report})


def main(argv: list[str] | None = None) -> None:
    """Print the table; exit code 2 and one sentence on a wrong option."""
    options, rest = command_line().parse_known_args(argv)
    run_cli(lambda: run(options, rest))


if __name__ == "__main__":
    run_and_leave(main)
