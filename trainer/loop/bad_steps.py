"""The record of skipped steps and roll-backs, `RUN/bad_steps.jsonl`, and what follows from it.

`step` counts optimizer steps that were applied: a skipped one is tried again under the same number with the next
samples, so that learning rate, EMA, checkpoints and metrics see an unbroken sequence. What advances at a skip
is the data position. After `train.max_bad_steps` skips in a row the weights go back to the newest whole
checkpoint while the data position stays where it is, past the bad samples.

A checkpoint does not know of a roll-back to it that came later, so the file does: a run that is stopped before its
next checkpoint finds the data position here. Streaks and roll-backs are counted from the file, too, so
that a run that was stopped decides as an unbroken one.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.data.position import DataState

FILE_NAME = "bad_steps.jsonl"


@dataclass(frozen=True, kw_only=True)
class Event:
    """A skip: `step` would have been its number. A roll-back: `step` is the checkpoint's.

    `data` is the position after it.
    """

    kind: Literal["skip", "rollback"]
    step: int
    data: DataState


def position_after_rollback(events: Sequence[Event], step: int, data: DataState) -> DataState:
    """Where to go on from a checkpoint of `step` whose own position is `data`."""
    later = [e.data for e in events if e.kind == "rollback" and e.step == step]
    return max([data, *later], key=lambda position: position.samples_seen)


def count_streak(events: Sequence[Event], data: DataState, global_batch_size: int) -> int:
    """How many skips in a row end exactly at `data`."""
    streak, end = 0, data.samples_seen
    for event in reversed(events):
        if event.kind != "skip" or event.data.samples_seen != end:
            break
        streak, end = streak + 1, end - global_batch_size
    return streak


def count_rollbacks(events: Sequence[Event], step: int) -> int:
    """How often the run has gone back to the checkpoint of `step`."""
    return sum(event.kind == "rollback" and event.step == step for event in events)


def read_events(path: Path) -> list[Event]:
    """Events of a file in order, [] without one; a half line of a killed process is left out."""
    if not path.exists():
        return []
    return [event for event, _ in _parse(path)]


def _parse(path: Path) -> list[tuple[Event, str]]:
    found = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        event = Event(kind=entry["kind"], step=entry["step"], data=DataState.from_dict(entry["data"]))
        found.append((event, line))
    return found


def drop_events_after(path: Path, data: DataState) -> None:
    """Rewrite the file without events past `data`, atomically: a resumed run comes to those samples again."""
    if not path.exists():
        return
    kept = [line for event, line in _parse(path) if event.data.samples_seen <= data.samples_seen]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    os.replace(temporary, path)


class BadSteps:
    """The events of this run, the same on all ranks; the main process also writes them to the file."""

    def __init__(self, path: Path | None, events: Sequence[Event], data: DataState, global_batch_size: int) -> None:
        """`path` is None on all but the main process; `data` is the position at which the run starts."""
        self.path = path
        self.events = [event for event in events if event.data.samples_seen <= data.samples_seen]
        self.streak = count_streak(self.events, data, global_batch_size)
        if path is not None:
            drop_events_after(path, data)

    @property
    def num_skipped(self) -> int:
        """Steps skipped since the run's start."""
        return sum(event.kind == "skip" for event in self.events)

    def record(self, event: Event, **details: Any) -> None:
        """Add an event; in the file, on disk when this returns, with what a person wants to know of it."""
        self.events.append(event)
        self.streak = self.streak + 1 if event.kind == "skip" else 0
        if self.path is None:
            return
        entry = asdict(event) | {"time": time.strftime("%Y-%m-%d %H:%M:%S %z")} | details
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def step_applied(self) -> None:
        """End a streak."""
        self.streak = 0
