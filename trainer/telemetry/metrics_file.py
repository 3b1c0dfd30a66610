"""Reads what a run has written to metrics.jsonl; needs no torch."""

from pathlib import Path
from typing import Any

from trainer.errors import require
from trainer.files import whole_records

METRICS = "metrics.jsonl"


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
