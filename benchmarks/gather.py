"""Host time of one gather of ZeRO-3, without its exchange: cutting a block's parameters out of what the ranks sent.

    python -m benchmarks.gather                       # milliseconds at 8, 64 and 128 ranks
    python -m benchmarks.gather --params 30 --device cuda

The ranks are simulated: the buffer is what an exchange would have left, and both sides are given it as it is.
DeepSpeed's handle is its own (`AllGatherCoalescedHandle`), the other that of trainer/engine/zero3_gather.py. Parameters
are so small that copying their values takes no time beside telling PyTorch to.
"""

import argparse
from pathlib import Path

from trainer.config import command_parser


def command_line() -> argparse.ArgumentParser:
    """Options; see the module docstring."""
    parser = command_parser("benchmarks.gather", __doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 128])
    parser.add_argument("--params", type=int, default=16, help="of a block (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=21, help="measured rounds (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="calls of a turn (default %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default %(default)s)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser


if __name__ == "__main__":
    command_line().parse_known_args()  # --help and mistakes are answered before torch is imported

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus
from torch import Tensor

from benchmarks.interleaved import markdown_table, ratio, time_interleaved, write_json
from trainer.config import require, run_cli
from trainer.engine.zero3_gather import Gathering

SIDES = ("DeepSpeed", "ours")


def cut_parameters(num: int, ranks: int, device: str) -> tuple[list[Any], Tensor]:
    """Parameters as ZeRO-3 leaves them, some of a length that the ranks do not divide, and what all ranks sent."""
    params, generator = [], torch.Generator().manual_seed(0)
    for number in range(num):
        shape = torch.Size([4, ranks]) if number % 2 else torch.Size([3 * ranks + 1])
        part = torch.zeros(-(-shape.numel() // ranks), device=device)
        part.ds_numel = part.numel()  # type: ignore[attr-defined]
        params.append(
            SimpleNamespace(
                ds_id=number, ds_shape=shape, ds_numel=shape.numel(), ds_tensor=part, ds_zero_partition_world_size=1,
                ds_status=ZeroParamStatus.NOT_AVAILABLE, data=None,
            )
        )  # fmt: skip
    size = ranks * sum(param.ds_tensor.numel() for param in params)
    return params, torch.randn(size, generator=generator).to(device)


def handles(params: list[Any], flat: Tensor, ranks: int) -> dict[str, Callable[[], None]]:
    """One function for each side that takes the parameters from being on their way to being there."""
    arrived = SimpleNamespace(wait=lambda: None)

    def deepspeed() -> None:
        for param in params:
            param.ds_status = ZeroParamStatus.INFLIGHT
        partitions = list(flat.view(ranks, -1))
        AllGatherCoalescedHandle(arrived, params, partitions, ranks).wait()

    def ours() -> None:
        for param in params:
            param.ds_status = ZeroParamStatus.NOT_AVAILABLE
        gathering = Gathering(params)
        gathering.flat, gathering.work, gathering.world_size = flat, arrived, ranks
        gathering.wait()

    return dict(zip(SIDES, (deepspeed, ours), strict=True))


def measure(options: argparse.Namespace, ranks: int) -> dict[str, list[float]]:
    """Milliseconds of a gather in each round, after a look that both sides give the same."""
    params, flat = cut_parameters(options.params, ranks, options.device)
    work, found = handles(params, flat, ranks), []
    for side in SIDES:
        work[side]()
        found.append([param.data.clone() for param in params])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), "the two sides differ"
    clocks = time_interleaved(work, rounds=options.rounds, repeats=options.repeats)
    return {side: [1000 * seconds / options.repeats for seconds in clocks[side].cpu] for side in SIDES}


def run(options: argparse.Namespace) -> None:
    """Print the table, write the JSON."""
    require(options.params >= 1, f"--params is {options.params}: use 1 or more")
    require(min(options.ranks) >= 2, f"--ranks {min(options.ranks)}: use 2 or more, one rank gathers nothing")
    times = {ranks: measure(options, ranks) for ranks in options.ranks}
    rows = []
    for ranks, of in times.items():
        found = ratio(*(of[side] for side in SIDES))
        rows.append([str(ranks), *(f"{statistics.median(of[side]):.3f}" for side in SIDES), f"{found.median:.1f}"])
    print(markdown_table(["ranks", *(f"{side}, ms" for side in SIDES), "ratio"], rows), flush=True)
    if options.json:
        write_json(options.json, {"params": options.params, "milliseconds": times})


if __name__ == "__main__":
    run_cli(lambda: run(command_line().parse_args()))
