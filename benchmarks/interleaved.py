"""Timing of alternatives against each other on a machine whose speed drifts.

Every round runs every alternative once, in rotated order, so that a slow minute hits all of them alike.
What is reported is the median over rounds of a ratio within one round, never an absolute time. Two
clocks: CPU seconds of the process over all its threads (steady on a shared machine, if waiting threads
sleep: OMP_WAIT_POLICY=PASSIVE) and wall seconds. Work on a GPU is waited for before each look at a clock.
"""

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one alternative, one entry per round."""

    cpu: list[float]
    wall: list[float]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Median and quartiles of per-round ratios."""

    median: float
    low: float
    high: float


def time_interleaved(
    work: Mapping[str, Callable[[], None]], *, rounds: int, warmups: int = 2, repeats: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, Times]:  # fmt: skip
    """Run each alternative `warmups` times unmeasured, then `rounds` times in turn with the others.

    Each turn is `repeats` calls: on a GPU several, so that it need not wait for the next call to be put in its queue.
    `clock` counts CPU seconds.
    """
    names = list(work)
    times = {name: Times(cpu=[], wall=[]) for name in names}
    for name in names:
        for _ in range(warmups):
            work[name]()
    gc.collect()
    gc.disable()  # a collection would be charged to whoever happens to run
    try:
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                wait_for_gpu()
                wall, cpu = time.perf_counter(), clock()
                for _ in range(repeats):
                    work[name]()
                wait_for_gpu()
                times[name].cpu.append(clock() - cpu)
                times[name].wall.append(time.perf_counter() - wall)
    finally:
        gc.enable()
    return times


def wait_for_gpu() -> None:
    """Return when all that was queued on the GPU is done, if a program here uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def ratio(seconds: Sequence[float], base: Sequence[float]) -> Ratio:
    """Per-round ratios of `seconds` to `base`; both have one entry per round, of the same rounds."""
    ratios = sorted(a / b for a, b in zip(seconds, base, strict=True))
    if len(ratios) == 1:
        return Ratio(median=ratios[0], low=ratios[0], high=ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median=median, low=low, high=high)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; every row has as many cells as the header."""
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)
