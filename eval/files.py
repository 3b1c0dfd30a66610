"""Where results may go, and what a run has written: what else would end in a traceback, late."""

from pathlib import Path
from typing import Any

from trainer.config import require
from trainer.files import check_writable
from trainer.telemetry.metrics_file import METRICS, read_metrics


def check_file(file: Path, name: str) -> None:
    """ConfigError unless a file of this name can be written."""
    require(not file.is_dir(), f"{name} {file} is a folder: name a file in it")
    check_writable(file.parent, f"{name} {file}")


def training_records(run: Path) -> list[dict[str, Any]]:
    """What a run has written to metrics.jsonl; [] for what is no run."""
    return read_metrics(run) if (run / METRICS).exists() else []
