"""Skipped steps: their record, `RUN/bad_steps.jsonl`, and when a run goes back to a checkpoint or gives up.

`step` counts optimizer steps that were applied: a skipped one is tried again under the same number with the next
samples, so that learning rate, EMA, checkpoints and metrics see an unbroken sequence. What advances at a skip
is the data position. After `train.max_bad_steps` skips in a row the weights go back to the newest whole
checkpoint while the data position stays where it is, past the bad samples.

A checkpoint does not know of a roll-back to it that came later, so the file does: a run that is stopped before its
next checkpoint finds the data position here. Streaks and roll-backs are counted from the file, too, so
that a run that was stopped decides as an unbroken one.
"""

import json
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.checkpoint.folder import step_of
from trainer.checkpoint.state import TrainState
from trainer.data.position import DataState, micro_batches
from trainer.distributed import from_main
from trainer.files import keep_records, read_records
from trainer.loop.start_checks import CheckedRun

FILE_NAME = "bad_steps.jsonl"
logger = logging.getLogger("ec_dit")


class DivergedError(RuntimeError):
    """Skipping and going back did not help: the settings or the data need a person."""


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
    """Events of a file in order, [] without one."""
    return [
        Event(kind=record["kind"], step=record["step"], data=DataState(**record["data"]))
        for record in read_records(path)
    ]


class BadSteps:
    """The events of this run, the same on all ranks; the main process also writes them to the file."""

    def __init__(self, path: Path | None, events: Sequence[Event], data: DataState, global_batch_size: int) -> None:
        """`path` is None on all but the main process; `data` is the position at which the run starts."""
        self.path = path
        # A resumed run comes to the samples past its start again, so what happened there has not happened yet.
        self.events = [event for event in events if event.data.samples_seen <= data.samples_seen]
        self.streak = count_streak(self.events, data, global_batch_size)
        if path is not None:
            keep_records(path, lambda record: record["data"]["samples_seen"] <= data.samples_seen)

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


class SkipPolicy:
    """Decides what follows a skipped step. All ranks build it together and decide alike.

    `bad` is the record. `start` is the data position at which to begin: that of `state`, or one further on after a
    roll-back to it.
    """

    def __init__(self, checked: CheckedRun, state: TrainState) -> None:
        self.checked, self.config, self.is_main = checked, checked.config.train, checked.world.is_main
        self.path = Path(checked.config.run_dir) / FILE_NAME
        events = from_main(checked.world, lambda: read_events(self.path))
        self.start = position_after_rollback(events, state.step, state.data)
        self.bad = BadSteps(self.path if self.is_main else None, events, self.start, checked.global_batch_size)

    def record_skip(self, state: TrainState, data: DataState, *, loss: float, suspected: list[int]) -> None:
        """Write down the step that was tried from `state`; `data` is the position after it.

        `suspected` are global indices of samples, of all ranks.
        """
        # All samples of the step: as one micro-batch of a world of one process.
        order = micro_batches(
            self.checked.dataset.layout, state.data, micro_batch_size=self.checked.global_batch_size,
            num_micro_batches=1, rank=0, world_size=1, group_size=self.checked.config.data.shuffle_group,
        )  # fmt: skip
        batch = next(order)
        cause = "gradient norm" if math.isfinite(loss) else "loss"
        sample_of = dict(zip(batch.indices, batch.samples, strict=True))
        if self.is_main:
            logger.warning(
                "skipped step %d: its %s is not finite; samples %d to %d since the start, from %d in epoch %d (see %s)",
                state.step + 1, cause, batch.indices[0], batch.indices[-1],
                data.consumed - len(batch.indices), data.epoch, FILE_NAME,
            )  # fmt: skip
        self.bad.record(
            Event(kind="skip", step=state.step + 1, data=data),
            cause=cause,
            loss=repr(loss),
            indices=batch.indices,
            samples=batch.samples,
            suspected_samples=[sample_of[index] for index in suspected],
        )

    def check_can_roll_back(self, checkpoint: Path | None) -> Path:
        """The checkpoint; DivergedError when there is none, or the run may not go back to it (any more)."""
        most = self.config.max_rollbacks
        if most == 0:
            reason = "train.max_rollbacks is 0"
        elif checkpoint is None:
            reason = "there is no checkpoint yet to go back to"
        elif count_rollbacks(self.bad.events, step_of(checkpoint)) < most:
            return checkpoint
        else:
            step = step_of(checkpoint)
            reason = (
                f"the run has gone back to its checkpoint of step {step} as often as train.max_rollbacks={most} allows"
            )
        raise DivergedError(
            f"no finite loss and gradient norm in {self.bad.streak} tries in a row, and {reason}: see {self.path} for "
            "the samples; remove them, or lower optim.learning_rate"
        )

    def record_rollback(self, state: TrainState, checkpoint: Path) -> None:
        """Write down that `state` has the weights of `checkpoint` and goes on at its own data position."""
        if self.is_main:
            logger.warning(
                "went back to %s after %d skipped steps; going on past their samples, at position %d of epoch %d",
                checkpoint, self.bad.streak, state.data.consumed, state.data.epoch,
            )  # fmt: skip
        self.bad.record(Event(kind="rollback", step=state.step, data=state.data), checkpoint=checkpoint.name)
