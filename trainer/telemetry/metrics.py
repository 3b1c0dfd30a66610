"""The log of a run, and what remains of its `metrics.jsonl` when it goes back."""

import logging
import sys
from pathlib import Path

from trainer.files import keep_records

logger = logging.getLogger("ec_dit")


def setup_logging(path: Path) -> None:
    """Log to the run's `train.log`, and to the terminal beside the progress bar."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handlers: list[logging.Handler] = [logging.FileHandler(path), logging.StreamHandler(sys.stdout)]
    for old in list(logger.handlers):
        logger.removeHandler(old)
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)


def truncate_metrics(path: Path, last_step: int) -> None:
    """Drop lines after `last_step`: steps that a killed run logged but did not save."""
    keep_records(path, lambda record: record["step"] <= last_step)
