"""What a batch script does after a start of a run has ended: leave, put the job back into the queue, or give up.

| how the start ended                                              | verdict                                |
|------------------------------------------------------------------|----------------------------------------|
| finished                                                         | `done`                                 |
| refused: a user error                                            | `fail`, never again                    |
| stopped by a signal or the time limit, saved                     | `again`                                |
| failed or died, and a checkpoint is newer than at the failure before | `again`                            |
| failed or died twice in a row at the same checkpoint             | `fail`                                 |
| the same, but told to stop too late or by a lost node, five times    | `fail`                                 |

When Slurm itself ends a start with its nodes, no verdict is asked for and nothing is counted. `RUN/failures.json` holds
the count, which a new job begins anew. Nothing here imports torch: a verdict is wanted within the grace time of a
preemption.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from trainer.cluster.incidents import read_incidents
from trainer.cluster.outcome import Outcome
from trainer.files import replacing

FILE_NAME = "failures.json"
LIMIT, LIMIT_TOLD = 2, 5
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
        with replacing(run_dir / FILE_NAME) as temporary:
            temporary.write_text(json.dumps(asdict(counted)) + "\n")
    return verdict


def silent_nodes(logs: list[Path]) -> list[str]:
    """Nodes whose processes fell silent, as the others recorded it. Not rank 0's: the batch script runs there."""
    incidents = (incident for log in logs for incident in read_incidents(log))
    return sorted({i.node for i in incidents if i.kind == "lost_peer" and i.reason == "silent" and i.rank > 0})


def last_words(logs: list[Path], most: int = 8) -> list[str]:
    """One line a process for the job's own output, `most` in all: its last record, or the end of its log as it is.

    A lost peer goes before an error, which may follow from it, and those that recorded something before those that
    did not: some of these died without a word, others were only ended by the launcher.
    """
    recorded, silent = [], []
    for log in logs:
        incidents = read_incidents(log)
        if incidents:
            lost = [incident for incident in incidents if incident.kind == "lost_peer"]
            sentence = " ".join((lost or incidents)[-1].sentence.split())  # an error may have many lines
            recorded.append(f"{log}: {sentence[:300]}")
            continue
        lines = log.read_text(errors="replace").split("\n")
        tail = next((line.strip()[:300] for line in reversed(lines) if line.strip()), "(the log is empty)")
        silent.append(f"{log}: no record of its end, last line: {tail}")
    return (recorded + silent)[:most]
