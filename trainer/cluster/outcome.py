"""How a start of a run ended, for the batch script: a small file that the main process writes.

A scheduler's exit code is no witness: when one process ends, srun may end the others and report theirs. The file is
named by `TRAIN_OUTCOME`, belongs to one start of one job, and is written last; where there is none, the start died.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from trainer.errors import ConfigError

VARIABLE = "TRAIN_OUTCOME"
Kind = Literal["finished", "stopped", "refused", "failed"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`finished`: nothing is left to do. `stopped`: saved, to be continued. `refused`: the user must mend `reason`."""

    kind: Kind
    step: int = -1
    reason: str = ""

    def write(self, path: Path) -> None:
        """Write it whole."""
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(json.dumps(asdict(self)) + "\n")
        os.replace(temporary, path)

    @classmethod
    def read(cls, path: Path) -> "Outcome | None":
        """None if the start died without a word."""
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None


class Recorder:
    """Takes down the outcome on the main process, if someone wants to know."""

    def __init__(self, *, is_main: bool) -> None:
        name = os.environ.get(VARIABLE)
        self.path = Path(name) if name and is_main else None

    def record(self, outcome: Outcome) -> None:
        """Write the outcome, or do nothing."""
        if self.path is not None:
            outcome.write(self.path)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Errors that leave the block are outcomes."""
        try:
            yield
        except ConfigError as error:
            self.record(Outcome(kind="refused", reason=str(error)))
            raise
        except BaseException as error:
            self.record(Outcome(kind="failed", reason=f"{type(error).__name__}: {error}"))
            raise
