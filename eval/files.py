"""Where results may go, and lists of records that are whole: what else would end in a traceback, late."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.config import ConfigError, require
from trainer.files import check_writable, read_records


def check_file(file: Path, name: str) -> None:
    """ConfigError unless a file of this name can be written."""
    require(not file.is_dir(), f"{name} {file} is a folder: name a file in it")
    check_writable(file.parent, f"{name} {file}")


def whole_records(path: Path, is_whole: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """What `read_records` gives; ConfigError for a line that is not a whole one."""
    try:
        found = read_records(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): restore it, or move it away") from error
    for record in found:
        require(is_whole(record), f"{path} has a damaged line ({json.dumps(record)[:60]}): delete it")
    return found


def training_records(run: Path) -> list[dict[str, Any]]:
    """What a run has written to metrics.jsonl, every value a number; [] for what is no run."""
    return whole_records(
        run / "metrics.jsonl",
        lambda record: isinstance(record.get("step"), int) and all(isinstance(v, int | float) for v in record.values()),
    )
