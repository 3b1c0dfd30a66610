"""What happened to a run, read from its folder: starts, ends, and what its log warns of."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

LOG = "train.log"
WARNING_MARK = "warning: "  # trainer/loop/run.py writes it before what needs a person's eye
_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)")
_START = re.compile(r"run .*: (\d+) processes, (.*)")
_RESUMED = re.compile(r"resuming from .*step_(\d+)")
_STEP = re.compile(r"step (\d+)/\d+  ")
_END = re.compile(r"ended after step (\d+) of \d+ \((.*)\)")


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run: from which step, on what, the newest step that it logged, and why it ended, if it says so."""

    time: str
    processes: int
    layout: str
    first: int = 0
    last: int = 0
    ended: str = ""


@dataclass(frozen=True, kw_only=True)
class History:
    """`starts` in order, `incidents` as (time, sentence), and when the log was last written."""

    starts: list[Start] = field(default_factory=list)
    incidents: list[tuple[str, str]] = field(default_factory=list)
    newest: str = ""

    @property
    def num_resumed(self) -> int:
        """Starts that went on from a checkpoint."""
        return sum(start.first > 0 for start in self.starts)


def read_history(run: Path) -> History:
    """The history of a run folder, empty where nothing was written."""
    log = run / LOG
    starts: list[Start] = []
    incidents: list[tuple[str, str]] = []
    newest = ""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else ():
        if not (found := _LINE.fullmatch(line)):
            continue
        newest, text = found[1], found[2]
        if start := _START.fullmatch(text):
            starts.append(Start(time=newest, processes=int(start[1]), layout=start[2]))
        elif text.startswith(WARNING_MARK):
            incidents.append((newest, text.removeprefix(WARNING_MARK)))
        elif starts:
            starts[-1] = _told(starts[-1], text)
    return History(starts=starts, incidents=incidents, newest=newest)


def _told(start: Start, text: str) -> Start:
    """What a line of the log adds to a start."""
    if found := _STEP.match(text):
        return replace(start, last=int(found[1]))
    if found := _RESUMED.fullmatch(text):
        return replace(start, first=int(found[1]), last=int(found[1]))
    if found := _END.fullmatch(text):
        return replace(start, last=int(found[1]), ended=found[2])
    return start
