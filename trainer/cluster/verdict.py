"""What a batch script does after a start of a run has ended: leave, put the job back into the queue, or give up.

| how the start ended                                              | verdict                                |
|------------------------------------------------------------------|----------------------------------------|
| finished                                                         | `done`                                 |
| refused: a user error                                            | `fail`, never again                    |
| stopped by a signal or the time limit, saved                     | `again`                                |
| failed or died, and a checkpoint is newer than at the failure before | `again`                            |
| failed or died twice in a row at the same checkpoint             | `fail`                                 |
| the same, but told to stop too late or by a lost node, five times    | `fail`                                 |

A start that Slurm itself ends with its nodes asks nobody, and counts for nothing. `RUN/failures.json` counts; a new job
begins anew. Nothing here imports torch: a verdict is wanted within the grace time of a preemption.
"""

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from trainer.cluster.outcome import Outcome

FILE_NAME = "failures.json"
LIMIT, LIMIT_TOLD = 2, 5
_SILENT = re.compile(r"rank [1-9]\d* on node (\S+) is lost \(silent")  # trainer/cluster/heartbeat.py
_CHECKPOINT = re.compile(r"step_(\d{8,})")  # trainer/checkpoint/folder.py


@dataclass(frozen=True, kw_only=True)
class Failures:
    """Failures of one job in a row at one checkpoint; `step` is -1 before the first."""

    job: str
    step: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to do, and one sentence on why."""

    action: Literal["done", "again", "fail"]
    sentence: str


def newest_step(run_dir: Path) -> int:
    """Step of the newest checkpoint, -1 without one."""
    names = (_CHECKPOINT.fullmatch(path.name) for path in (run_dir / "checkpoints").glob("step_*"))
    return max((int(name[1]) for name in names if name), default=-1)


def read_failures(run_dir: Path, job: str, step: int) -> Failures:
    """The failures of this job at this checkpoint so far."""
    try:
        found = Failures(**json.loads((run_dir / FILE_NAME).read_text()))
    except FileNotFoundError:
        return Failures(job=job, step=step, count=0)
    return found if (found.job, found.step) == (job, step) else Failures(job=job, step=step, count=0)


def judge(outcome: Outcome | None, failures: Failures, *, told: bool) -> tuple[Verdict, Failures | None]:
    """The verdict, and the failures counted now (None: it was no failure).

    `told`: the job was asked to stop, or lost a node; neither need be the program's fault.
    """
    if outcome is not None and outcome.kind == "finished":
        return Verdict(action="done", sentence=f"finished at step {outcome.step}"), None
    if outcome is not None and outcome.kind == "refused":
        return Verdict(action="fail", sentence=outcome.reason), None
    if outcome is not None and outcome.kind == "stopped":
        return Verdict(action="again", sentence=f"stopped and saved at step {outcome.step}"), None
    counted = Failures(job=failures.job, step=failures.step, count=failures.count + 1)
    what = f"failed ({outcome.reason})" if outcome is not None else "died"
    where = f"at the checkpoint of step {counted.step}" if counted.step >= 0 else "before the first checkpoint"
    limit = LIMIT_TOLD if told else LIMIT
    if counted.count >= limit:
        return Verdict(action="fail", sentence=f"{what} {counted.count} times in a row {where}: giving up"), counted
    return Verdict(action="again", sentence=f"{what} {where}: try {counted.count + 1} of {limit} is next"), counted


def settle(run_dir: Path, outcome: Outcome | None, *, job: str, told: bool) -> Verdict:
    """The verdict on a start of a job, with its failures counted in the run folder."""
    verdict, counted = judge(outcome, read_failures(run_dir, job, newest_step(run_dir)), told=told)
    if counted is not None:
        temporary = run_dir / f"{FILE_NAME}.tmp"
        temporary.write_text(json.dumps(asdict(counted)) + "\n")
        os.replace(temporary, run_dir / FILE_NAME)
    return verdict


def silent_nodes(logs: list[Path]) -> list[str]:
    """Nodes that fell silent, as the other processes' logs name them. Not the first: the script runs there."""
    found = (_SILENT.findall(path.read_text(errors="replace")) for path in logs)
    return sorted({node for nodes in found for node in nodes})


def last_words(logs: list[Path], most: int = 8) -> list[str]:
    """The line of each rank's log that names a lost peer, else its last error: for the job's own output."""
    found = []
    for path in logs:
        lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
        lost = [line for line in lines if "is lost" in line]  # says more than the errors that follow from it
        words = lost or [line for line in lines if "rror" in line or "killed" in line.lower()]
        if words:
            found.append(f"{path}: {words[-1][:300]}")
    return found[:most]
