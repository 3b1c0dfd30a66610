"""How a start of a run ended, for the batch script: a small file that the main process writes.

The launcher's exit code does not tell: when one process ends, srun may end the others and report their codes. The file
is named by `TRAIN_OUTCOME`, belongs to one start of one job, and is written last; without it the start died.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from trainer.cluster.incidents import recording
from trainer.errors import ConfigError
from trainer.files import write_json

VARIABLE = "TRAIN_OUTCOME"
Kind = Literal["finished", "stopped", "halted", "refused", "failed"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`finished`: nothing is left to do. `stopped`: saved, to be continued. `halted`: saved, and
    to be continued only when the user submits it again. `refused`: the user must mend `reason`."""

    kind: Kind
    step: int = -1
    reason: str = ""

    @classmethod
    def read(cls, path: Path) -> "Outcome | None":
        """The outcome in the file; None if there is none."""
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None


class Recorder:
    """Writes the outcome on the main process, if `TRAIN_OUTCOME` names a file, and each process's own failure."""

    def __init__(self, *, rank: int) -> None:
        name = os.environ.get(VARIABLE)
        self.rank, self.path = rank, Path(name) if name and rank == 0 else None

    def record(self, outcome: Outcome) -> None:
        """Write the outcome, or do nothing."""
        if self.path is not None:
            write_json(self.path, asdict(outcome))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Errors that leave the block are recorded: as an incident of this process, and as the outcome."""
        try:
            with recording(self.rank):  # on every rank: one alone may know what is wrong with its node
                yield
        except ConfigError as error:
            self.record(Outcome(kind="refused", reason=str(error)))
            raise
        except BaseException as error:
            self.record(Outcome(kind="failed", reason=f"{type(error).__name__}: {error}"))
            raise
