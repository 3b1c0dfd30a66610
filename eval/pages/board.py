"""Scores in TensorBoard, beside the run's training curves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


def log_scores(report: dict[str, Any], run_dir: Path) -> None:
    """Write a report's scores into RUN/tensorboard/eval at its checkpoint's step; nothing for what is no run.

    A folder of its own: a resumed run discards what was logged after its checkpoint, scores are of checkpoints.
    """
    if not (run_dir / "tensorboard").is_dir():
        return
    with SummaryWriter(str(run_dir / "tensorboard" / "eval")) as writer:
        for name, value in scores(report["results"]):
            writer.add_scalar(f"eval/{name}", value, report["step"])


def scores(results: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers to follow over training."""
    if "geneval" in results:
        yield "geneval", results["geneval"]["overall"]["value"]
        for tag, score in results["geneval"]["tags"].items():
            yield f"geneval_{tag}", score["value"]
    if "fid" in results:
        yield "fid", results["fid"]["generated"]
