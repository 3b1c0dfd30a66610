"""What a batch script does after a start of a run has ended: leave, put the job back into the queue, or give up.

| how the start ended                                              | verdict                                |
|------------------------------------------------------------------|----------------------------------------|
| finished                                                         | `done`                                 |
| refused: a user error                                            | `refused`, never again                 |
| stopped by a signal or the time limit, saved                     | `again`                                |
| halted by RUN/stop, saved                                        | `halt`, until the file is removed      |
| failed or died, and a checkpoint is newer than at the failure before | `again`                            |
| failed or died twice in a row at the same checkpoint             | `fail`                                 |
| the same, but told to stop too late or by a lost or hung node, 5 times | `fail`                                 |

When Slurm itself ends a start with its nodes, no verdict is asked for and nothing is counted. `RUN/failures.json` holds
the count, which a new job begins anew. Nothing here imports torch: a verdict is wanted within the grace time of a
preemption.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.cluster.incidents import Incident, read_incidents
from trainer.cluster.outcome import Outcome
from trainer.files import write_json

FILE_NAME = "failures.json"
LIMIT, LIMIT_TOLD = 2, 5
# The innermost frame of the main thread, as Python writes it at the SIGABRT of slurm/processes.sh.
_HUNG = re.compile(r"^Fatal Python error: Aborted$.*^Current thread [^\n]*\n  File (?P<place>[^\n]*)", re.M | re.S)
_OUT_OF_MEMORY = re.compile(r"(?P<node>\S+): tasks? (?P<task>[\d,-]+): Out Of Memory")  # srun's words
_CHECKPOINT = re.compile(r"step_(\d{8,})")  # trainer/checkpoint/folder.py


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to do, and one sentence on why."""

    action: Literal["done", "again", "halt", "fail", "refused"]
    sentence: str


def newest_step(run_dir: Path) -> int:
    """Step of the newest checkpoint, -1 without one."""
    names = (_CHECKPOINT.fullmatch(path.name) for path in (run_dir / "checkpoints").glob("step_*"))
    return max((int(name[1]) for name in names if name), default=-1)


def settle(run_dir: Path, outcome: Outcome | None, *, job: str, told: bool) -> Verdict:
    """The verdict on a start of a job; a failure is counted in the run folder.

    `told`: the job was asked to stop, or lost a node, or one hung; none of these need be the program's fault.
    """
    match outcome:
        case Outcome(kind="finished"):
            return Verdict(action="done", sentence=f"finished at step {outcome.step}")
        case Outcome(kind="refused"):
            return Verdict(action="refused", sentence=outcome.reason)
        case Outcome(kind="stopped"):
            return Verdict(action="again", sentence=f"stopped and saved at step {outcome.step}")
        case Outcome(kind="halted"):
            why = f"saved at step {outcome.step} and ended by RUN/stop: remove {run_dir / 'stop'}, then submit again"
            return Verdict(action="halt", sentence=why)
    path, step, count = run_dir / FILE_NAME, newest_step(run_dir), 1  # step is -1 before the first checkpoint
    if path.exists():
        before = json.loads(path.read_text())
        count += before["count"] if (before["job"], before["step"]) == (job, step) else 0
    write_json(path, {"job": job, "step": step, "count": count})
    what = f"failed ({outcome.reason})" if outcome is not None else "died"
    where = f"at the checkpoint of step {step}" if step >= 0 else "before the first checkpoint"
    limit = LIMIT_TOLD if told else LIMIT
    if count >= limit:
        return Verdict(action="fail", sentence=f"{what} {count} times in a row {where}: giving up")
    return Verdict(action="again", sentence=f"{what} {where}: try {count + 1} of {limit} is next")


def silent_nodes(logs: list[Path]) -> list[str]:
    """Nodes whose processes fell silent or hung, as the others recorded it.

    Of rank 0's no process is silent because the node died: the batch script runs there.
    """
    found = (i for i in _lost_peers(logs) if i.node)
    return sorted({i.node for i in found if i.reason == "hung" or (i.reason == "silent" and i.rank > 0)})


def has_lost_or_hung(logs: list[Path]) -> bool:
    """Whether one process, which may be rank 0, hung or could not be reached: that need not be the program's fault."""
    return any(i.reason in ("hung", "silent", "unreachable") and i.rank >= 0 for i in _lost_peers(logs))


def _lost_peers(logs: list[Path]) -> list[Incident]:
    return [incident for log in logs for incident in read_incidents(log) if incident.kind == "lost_peer"]


def out_of_memory(launcher: Path | None, logs: list[Path]) -> list[str]:
    """One sentence if Slurm says that the kernel ended processes at the memory limit; they cannot say it themselves."""
    texts = [path.read_text(errors="replace") for path in (launcher, *logs) if path is not None and path.exists()]
    told = dict.fromkeys(f"process {m['task']} on {m['node']}" for text in texts for m in _OUT_OF_MEMORY.finditer(text))
    if not told and not any("oom_kill event" in text or "OOM Killed" in text for text in texts):
        return []
    who = ", ".join(told) or "a process"
    return [
        f"out of memory: the kernel ended {who} at the job's limit: submit with more --mem, or lower data.num_workers"
    ]


def last_words(logs: list[Path], most: int = 8) -> list[str]:
    """One line a process for the job's own output, `most` in all: its last record, or the end of its log as it is.

    A lost peer goes before an error, which may follow from it, and those that recorded something before those that
    did not: some of these died without a word, others were only ended by the launcher.
    """
    recorded, silent = [], []
    for log in logs:
        if incidents := read_incidents(log):
            lost = [incident for incident in incidents if incident.kind == "lost_peer"]
            sentence = " ".join((lost or incidents)[-1].sentence.split())  # an error may have many lines
            recorded.append(f"{log}: {sentence[:300]}")
            continue
        text = log.read_text(errors="replace")
        if (hung := _HUNG.search(text)) is not None:
            recorded.append(f"{log}: ended as it hung in {hung['place']}")
            continue
        tail = next((line.strip()[:300] for line in reversed(text.split("\n")) if line.strip()), "(the log is empty)")
        silent.append(f"{log}: no record of its end, last line: {tail}")
    return (recorded + silent)[:most]
