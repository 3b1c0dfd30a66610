"""Forward and backward of experts on several ranks, their rows sent in 1, 2, 4 chunks: how much of the way is hidden.

    torchrun --nproc-per-node 2 -m benchmarks.exchange
    torchrun --nproc-per-node 8 -m benchmarks.exchange --dim 3072 --experts 64 --rows 128 --dtype bf16 --repeats 10
    torchrun --nproc-per-node 8 -m benchmarks.exchange ... --compile

The experts of one layer lie on all ranks. `experts alone` computes with the rows as if all had come, `exchange alone`
sends them there and back and computes nothing; `chunks N` is both, as moe/all_to_all.py does it. Wall seconds are means
over the ranks, as multiples of `experts alone` in the same round. The hidden share is what the exchange did not add: 0
is one after the other, 1 an exchange that costs nothing; below 0, smaller products and the sums of their weight
gradients cost more than was hidden. CPU seconds, of the main process, show that cost alone. Over gloo there is little
to hide: its copies take the cores from the products.
"""

import argparse
from pathlib import Path

from trainer.cluster.leave import run_and_leave
from trainer.config import command_parser


def command_line() -> argparse.ArgumentParser:
    """Options; see the module docstring."""
    parser = command_parser("benchmarks.exchange", __doc__)
    parser.add_argument("--experts", type=int, default=8, help="of all ranks (default %(default)s)")
    parser.add_argument("--rows", type=int, default=256, help="of an expert from one rank (default %(default)s)")
    parser.add_argument("--dim", type=int, default=512, help="width, hidden width / 4 (default %(default)s)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="(default %(default)s)")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4], help="(default 1 2 4)")
    parser.add_argument("--rounds", type=int, default=11, help="measured rounds (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="calls of a turn, 10 on a GPU (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="as whole graphs of torch.compile")
    parser.add_argument("--json", type=Path, help="also write the ratios with quartiles to this file")
    return parser


if __name__ == "__main__":
    command_line().parse_known_args()  # --help and mistakes are answered before torch is imported

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.interleaved import Ratio, Times, markdown_table, ratio, time_interleaved, write_json
from moe.all_to_all import COMPILER_OPTIONS, ExpertGroup, send_rows, through_experts
from moe.deepspeed_expert import build_expert_group
from moe.experts import Experts
from trainer.config import require, run_cli
from trainer.distributed import World, all_reduce_mean, barrier, detect_world, process_group
from trainer.engine.host_memory import keep_freed_memory

EXPERTS, EXCHANGE = "experts alone", "exchange alone"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Forward = Callable[[Tensor], Tensor]


def chunked(count: int) -> str:
    """Name of a row."""
    return f"chunks {count}"


def build_work(options: argparse.Namespace, group: ExpertGroup, device: torch.device) -> dict[str, Callable[[], None]]:
    """What takes turns; all ranks begin a turn together."""
    D, dtype = options.dim, DTYPES[options.dtype]
    experts = Experts(options.experts // group.size, D, 4 * D)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=D**-0.5)
    experts = experts.to(device, dtype)
    here = torch.randn(options.experts, options.rows, D, device=device, dtype=dtype)
    come = here.view(options.experts // group.size, group.size * options.rows, D)

    def exchanged(chunks: int, compute: Forward) -> Forward:
        parts = replace(group, chunks=chunks)
        return lambda x_END: through_experts(send_rows(x_END, parts), compute, parts)

    def turn(forward: Forward, rows: Tensor) -> Callable[[], None]:
        grad = torch.randn_like(rows)
        if options.compile:
            forward = torch.compile(forward, fullgraph=True, dynamic=False, options=COMPILER_OPTIONS)

        def run() -> None:
            barrier()
            for _ in range(options.repeats):
                forward(rows.detach().requires_grad_()).backward(grad)
                experts.zero_grad(set_to_none=True)

        return run

    work = {EXPERTS: turn(experts, come), EXCHANGE: turn(exchanged(1, lambda x_eMD: x_eMD), here)}
    return work | {chunked(count): turn(exchanged(count, experts), here) for count in options.chunks}


@dataclass(frozen=True, kw_only=True)
class Row:
    """Of the table: multiples of the experts alone; the median share of the exchange that was hidden, for chunks."""

    wall: Ratio
    cpu: Ratio
    hidden: float | None


def summarise(times: dict[str, Times]) -> dict[str, Row]:
    """What each row of the table says."""
    base, exchange = times[EXPERTS], times[EXCHANGE]
    rows: dict[str, Row] = {}
    for name, found in times.items():
        rounds = zip(base.wall, exchange.wall, found.wall, strict=True)
        shares = [(experts + way - both) / way for experts, way, both in rounds]
        hidden = None if found in (base, exchange) else statistics.median(shares)
        rows[name] = Row(wall=ratio(found.wall, base.wall), cpu=ratio(found.cpu, base.cpu), hidden=hidden)
    return rows


def table(rows: dict[str, Row]) -> str:
    """Markdown."""
    cells = [
        [
            name, f"{row.wall.median:.2f}", f"{row.wall.low:.2f} to {row.wall.high:.2f}", f"{row.cpu.median:.2f}",
            "" if row.hidden is None else f"{row.hidden:.2f}",
        ]
        for name, row in rows.items()
    ]  # fmt: skip
    return markdown_table(["x experts alone", "wall", "quartiles", "CPU", "hidden share"], cells)


def mean_over_ranks(times: dict[str, Times], device: torch.device) -> dict[str, Times]:
    """The same with the ranks' mean wall seconds; collective."""
    walls = {name: torch.tensor(found.wall, dtype=torch.float64, device=device) for name, found in times.items()}
    return {name: replace(found, wall=all_reduce_mean(walls[name]).tolist()) for name, found in times.items()}


def run(options: argparse.Namespace) -> None:
    """Measure on all ranks, print the table on the main process, write the JSON."""
    world = detect_world()
    for flag, values in {"rounds": [options.rounds], "repeats": [options.repeats], "chunks": options.chunks}.items():
        require(min(values) >= 1, f"--{flag} is {min(values)}: use 1 or more")
    require(
        world.size > 1,
        "benchmarks.exchange runs in 1 process, which exchanges nothing: start it by torchrun --nproc-per-node 2",
    )
    require(
        options.experts % world.size == 0,
        f"--experts {options.experts} cannot lie on {world.size} processes: use a multiple of that",
    )
    with process_group(world) as device:
        _measure(options, world, device)


def _measure(options: argparse.Namespace, world: World, device: torch.device) -> None:
    group = build_expert_group(world.size)
    assert group is not None
    keep_freed_memory()
    torch.manual_seed(world.rank)
    times = time_interleaved(build_work(options, group, device), rounds=options.rounds)
    rows = summarise(mean_over_ranks(times, device))
    if world.is_main:
        where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        print(f"\n{world.size} x {where}, {torch.distributed.get_backend()}, torch {torch.__version__}, {settings}")
        print("\n" + table(rows), flush=True)
        if options.json:
            content = {name: asdict(row) for name, row in rows.items()}
            write_json(options.json, {"processes": world.size, "device": where, **settings, "rows": content})


def main(argv: list[str] | None = None) -> None:
    """Print the table; exit code 2 and one sentence on a wrong option."""
    options = command_line().parse_args(argv)
    run_cli(lambda: run(options))


if __name__ == "__main__":
    run_and_leave(main)
