"""What a fixed order of sums costs on a GPU: parts of a step and the whole, with and without deterministic algorithms.

    python -m benchmarks.determinism ec_dit_xl_8e model.num_layers=8 train.micro_batch_size=256 --device h100

All in one process, the two taking turns; a line is printed as soon as it is known. Sizes are the recipe's; options of
trainer.plan work, too. Parts are forward and backward: attention with repeated heads (as the model has it) and with
grouped ones, at the tokens that masked training keeps, at all, and against the text with and without its mask; what
gathers by index; the dispatch and combine of a layer, whose row sums have one order either way; a product.
`whole step` is that of benchmarks.step.

cuBLAS reads the size of its workspace once, at the first product: `CUBLAS_WORKSPACE_CONFIG=:4096:8`, as training sets
it, unless the environment says another. What that costs, the milliseconds of two starts say, not a ratio of one.
"""

import argparse

from trainer.cluster.leave import run_and_leave
from trainer.config import command_parser


def command_line() -> argparse.ArgumentParser:
    """Options; see the module docstring."""
    parser = command_parser("benchmarks.determinism", __doc__)
    parser.add_argument("--device", default="h100", help="what trainer.plan takes the devices for")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="calls of a turn (default %(default)s)")
    parser.add_argument("--timeout", type=int, default=120, help="seconds for a line, else where it hangs is printed")
    return parser


if __name__ == "__main__":
    command_line().parse_known_args()  # --help and mistakes are answered before torch is imported

import faulthandler
import statistics
from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.attention_kinds import Work, attention_parts, forward_backward
from benchmarks.interleaved import markdown_table, ratio, time_interleaved
from benchmarks.step import Bench
from moe.dispatch import combine, dispatch, expert_rows
from trainer.config import require, run_cli
from trainer.distributed import detect_world, process_group
from trainer.engine.determinism import make_deterministic
from trainer.loop.step import next_step
from trainer.plan.__main__ import parse as parse_plan
from trainer.plan.command import plan
from trainer.plan.job import Job

HEADER = ["part", "deterministic / not", "quartiles", "not, ms", "deterministic, ms"]


def other_parts(job: Job, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Work]]:
    """Gathers, row sums and products at the sizes of a layer."""
    D, B, S = job.config.model.dim, job.config.train.micro_batch_size, job.num_tokens
    E, C = job.config.moe.num_experts, job.config.moe.capacity(S)
    x_BSD = torch.randn(B, S, D, device=device, dtype=dtype)
    affinity_BSE = torch.rand(B, S, E, device=device)
    index_BEC = affinity_BSE.transpose(1, 2).topk(C).indices
    gate_BEC, rows = torch.rand(B, E, C, device=device), expert_rows(index_BEC, S)

    def moved(x_BSD: Tensor, gate_BEC: Tensor) -> Tensor:
        return combine(dispatch(x_BSD, rows, E), gate_BEC, rows, x_BSD)

    number_BS = torch.randint(0, 1000, (B, S), device=device)
    table, weight = (torch.randn(n, D, device=device, dtype=dtype) for n in (1000, 4 * D))
    yield "embedding of 1000", forward_backward(lambda t: functional.embedding(number_BS, t), table)
    yield "gates, a gather", forward_backward(lambda a: a.transpose(1, 2).gather(2, index_BEC), affinity_BSE)
    yield "dispatch and combine", forward_backward(moved, x_BSD, gate_BEC)
    yield "a product", forward_backward(functional.linear, x_BSD, weight)


def whole_step(job: Job, device: torch.device) -> Iterator[tuple[str, Work]]:
    """Steps one after another, whichever way each is computed; the engine is built when asked for."""
    bench, number = Bench(job, detect_world(), device), 0
    upcoming = next_step(bench.batches, bench.config, 0)

    def run() -> None:
        nonlocal upcoming, number
        upcoming, number = bench.step(number, upcoming), number + 1

    yield "whole step", run


def line(name: str, work: Work, options: argparse.Namespace) -> list[str]:
    """Measure one row of the table."""

    def under(deterministic: bool) -> Callable[[], None]:
        def run() -> None:
            torch.use_deterministic_algorithms(deterministic)
            work()

        return run

    both = {"not": under(False), "deterministic": under(True)}
    times = time_interleaved(both, rounds=options.rounds, repeats=options.repeats)
    plain, fixed = times["not"].wall, times["deterministic"].wall
    found = ratio(fixed, plain)
    spent = (f"{1e3 * statistics.median(seconds) / options.repeats:.3f}" for seconds in (plain, fixed))
    return [name, f"{found.median:.2f}", f"{found.low:.2f} to {found.high:.2f}", *spent]


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Print the table row by row."""
    for flag in ("rounds", "repeats", "timeout"):
        require(getattr(options, flag) >= 1, f"--{flag} is {getattr(options, flag)}: use 1 or more")
    world = detect_world()
    require(
        world.size == 1, f"benchmarks.determinism runs in one process, not in {world.size}: start it without torchrun"
    )
    _, job, _, _ = plan(parse_plan([*rest, "--device", options.device, "--world-size", "1"]))
    require(
        job.config.moe.every > 0, "moe.every=0 is a dense model, but dispatch is measured, too: choose another recipe"
    )
    make_deterministic()  # before the first product
    with process_group(world) as device:
        _measure(options, job, device)


def _measure(options: argparse.Namespace, job: Job, device: torch.device) -> None:
    dtype = torch.bfloat16 if job.config.train.precision == "bf16" else torch.float32
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, where all is deterministic"
    print(f"{where}, torch {torch.__version__}, {dtype}, {job.config.train.micro_batch_size} images\n")
    print(markdown_table(HEADER, []), flush=True)
    faulthandler.dump_traceback_later(options.timeout, exit=True)
    parts = attention_parts(job, device, dtype), other_parts(job, device, dtype), whole_step(job, device)
    for name, work in chain(*parts):
        print(markdown_table(line(name, work, options), []).splitlines()[0], flush=True)
        faulthandler.dump_traceback_later(options.timeout, exit=True)  # the next one's time
    faulthandler.cancel_dump_traceback_later()
    torch.use_deterministic_algorithms(False)


def main(argv: list[str] | None = None) -> None:
    """Print the table; exit code 2 and one sentence on a wrong option."""
    options, rest = command_line().parse_known_args(argv)
    run_cli(lambda: run(options, rest))


if __name__ == "__main__":
    run_and_leave(main)
