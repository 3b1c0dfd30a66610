"""Reads what a run has written to metrics.jsonl; needs no torch."""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.errors import require
from trainer.files import whole_records

METRICS = "metrics.jsonl"
NUM_BINS = 4  # equal ranges of timesteps, for which routers have numbers of their own


def read_metrics(run: Path | str) -> list[dict[str, Any]]:
    """The metrics of a run, a dict for each line: `step`, and numbers by name as `Reporter` explains them.

    `pandas.DataFrame(read_metrics("runs/mine"))` makes a table of them. ConfigError for a folder without metrics and
    for a damaged line; the half line of a run that was killed is left out.
    """
    path = Path(run) / METRICS
    require(path.is_file(), f"{run} has no {METRICS}: name the folder of a run")
    return whole_records(path, _is_whole)


def _is_whole(record: dict[str, Any]) -> bool:
    return isinstance(record.get("step"), int) and all(isinstance(value, int | float) for value in record.values())


def read_curves(run: Path, most_whole: int = 300) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Metrics of a run for a look at it, fast however long the run: what stands before the routers' numbers of all
    lines, and at most about `most_whole` whole lines, evenly spread and with the last.

    Half and damaged lines are left out, and a file that is not there has none.
    """
    path = run / METRICS
    lines = path.read_bytes().splitlines() if path.is_file() else []
    lines = [line for line in lines if line.endswith(b"}")]
    heads = [line.partition(b', "moe/')[0] for line in lines]
    every = -(-len(lines) // most_whole) or 1
    chosen = [line for number, line in enumerate(reversed(lines)) if number % every == 0]
    curves = _parsed(head if head.endswith(b"}") else head + b"}" for head in heads)
    return curves, _parsed(reversed(chosen))


def _parsed(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    found = []
    for line in lines:
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and _is_whole(record):
                found.append(record)
    return found
