"""The numbers of a report by name, for tables, csv, TensorBoard and the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.files import write_text

# Parts of a result that are no measurements.
_LEFT_OUT = {"card", "verdicts", "skipped", "seconds", "counts", "values", "closest", "seed", "splits", "subsets",
             "subset_size", "quantile", "distractors", "faults"}  # fmt: skip


def flat_numbers(content: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numeric leaves of nested results as {"fid/kid/mean": value}; the order is kept."""
    found: dict[str, float] = {}
    for name, value in content.items():
        if name in _LEFT_OUT:
            continue
        if isinstance(value, Mapping):
            found |= flat_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = float(value)
    return found


def headline_lines(suite: str, paths: Sequence[str], result: Mapping[str, Any]) -> list[str]:
    """The numbers at these paths of a suite's result, a line each; what is not there is left out."""
    numbers = flat_numbers(result)
    return [f"{suite}/{path.removesuffix('/value')} {numbers[path]:.5g}" for path in paths if path in numbers]


def write_csv(path: Path, report: Mapping[str, Any]) -> None:
    """One row per number: name, value."""
    rows = [f"{name},{value!r}" for name, value in flat_numbers(report["results"]).items()]
    write_text(path, "\n".join(["name,value", *rows]) + "\n")


def log_numbers(run_dir: Path, report: Mapping[str, Any]) -> dict[str, float]:
    """Add the numbers to RUN/tensorboard/eval at the checkpoint's step, for what is a run with a log; returns them.

    A folder of its own: a resumed run discards what was logged after its checkpoint, scores are of checkpoints.
    """
    folder, hidden = run_dir / "tensorboard", ("/low", "/high", "/correct", "/total")
    found = flat_numbers(report["results"]).items()
    numbers = {f"eval/{name.removesuffix('/value')}": value for name, value in found if not name.endswith(hidden)}
    if folder.is_dir():
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder / "eval")) as writer:
            for name, value in numbers.items():
                writer.add_scalar(name, value, report["step"])
    return numbers
