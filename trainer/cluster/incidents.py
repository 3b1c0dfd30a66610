"""What the processes of a start noticed of its end, as records for the batch script (`verdict`).

Each process has a file of its own, beside its log and named by `TRAIN_INCIDENTS` (slurm/task.sh), so nobody has to
lock it: one JSON object a line, on disk before the call returns, since the process may be killed right after. A
process that dies without a word (SIGKILL, a crash in native code) leaves no record. Nothing here imports torch.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from trainer.cluster.node import node_name
from trainer.files import read_records

VARIABLE = "TRAIN_INCIDENTS"


@dataclass(frozen=True, kw_only=True)
class Incident:
    """One event: `rank` on `node` is the process that was lost or failed, `time` Unix seconds.

    `reason` of a lost peer: `silent` (sends nothing), `hung` (lives, but is behind the others and does not get on),
    `ended` (connection closed without a farewell) or `unreachable` (no route to it); of a failure: the exception's
    class. Of a hang in which no rank is behind, `rank` is -1. `node` is empty and `pid` 0 where unknown. `sentence` is
    for people.
    """

    kind: Literal["lost_peer", "failed"]
    rank: int
    node: str
    reason: str
    sentence: str
    pid: int = 0
    time: float = field(default_factory=time.time)


def failure(rank: int, error: BaseException) -> Incident:
    """This process failed with an error."""
    name = type(error).__name__
    return Incident(kind="failed", rank=rank, node=node_name(), reason=name, sentence=f"{name}: {error}")


def record_incident(incident: Incident) -> None:
    """Append to this process's file; nothing without `TRAIN_INCIDENTS`."""
    name = os.environ.get(VARIABLE)
    if not name:
        return
    with suppress(OSError), open(name, "a") as file:  # a full disk may be what went wrong; the log says the same
        file.write(json.dumps(asdict(incident)) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def recording(rank: int) -> Iterator[None]:
    """Errors that leave the block are recorded as failures of this process."""
    try:
        yield
    except BaseException as error:
        record_incident(failure(rank, error))
        raise


def read_incidents(log: Path) -> list[Incident]:
    """What the process that wrote `log` recorded, oldest first."""
    return [Incident(**record) for record in read_records(log.with_suffix(".jsonl"))]
