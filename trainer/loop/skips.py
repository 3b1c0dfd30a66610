"""What to do about a skipped step: write it down with its samples, and decide when to go back or give up."""

import logging
import math
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.state import TrainState
from trainer.data.position import DataState, MicroBatch, micro_batches
from trainer.distributed import from_main
from trainer.loop.bad_steps import FILE_NAME, BadSteps, Event, count_rollbacks, position_after_rollback, read_events
from trainer.loop.start_checks import Plan

logger = logging.getLogger("ec_dit")


class DivergedError(RuntimeError):
    """Skipping and going back did not help: the settings or the data need a person."""


class SkipPolicy:
    """Counts skipped steps and roll-backs. All ranks build it together and decide alike.

    `start` is the data position at which to begin: that of `state`, or one further on after a roll-back to it.
    """

    def __init__(self, plan: Plan, state: TrainState) -> None:
        self.plan, self.config = plan, plan.config.train
        self.path = Path(plan.config.run_dir) / FILE_NAME
        events = from_main(plan.world, lambda: read_events(self.path))
        self.start = position_after_rollback(events, state.step, state.data)
        self.bad = BadSteps(self.path if plan.world.is_main else None, events, self.start, plan.global_batch_size)

    @property
    def num_skipped(self) -> int:
        """Steps skipped since the run's start."""
        return self.bad.num_skipped

    @property
    def must_roll_back(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return self.bad.streak >= self.config.max_bad_steps

    def step_applied(self) -> None:
        """End a streak."""
        self.bad.step_applied()

    def gather_suspects(self, mine: list[int]) -> list[int]:
        """Suspected samples of all ranks, by global index. Collective."""
        parts: list[Any] = [None] * self.plan.world.size
        torch.distributed.all_gather_object(parts, mine)
        return sorted(index for part in parts for index in part)

    def record_skip(self, state: TrainState, data: DataState, *, loss: float, suspected: list[int]) -> None:
        """Write down the step that was tried from `state`; `data` is the position after it."""
        batch = self._global_batch(state.data)
        cause = "gradient norm" if math.isfinite(loss) else "loss"
        sample_of = dict(zip(batch.indices, batch.samples, strict=True))
        if self.plan.world.is_main:
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

    def _global_batch(self, data: DataState) -> MicroBatch:
        """All samples of the step that starts at `data`: indices since the run's start, numbers in the data set."""
        dataset, group = self.plan.dataset, self.plan.config.data.shuffle_group
        size = self.plan.global_batch_size
        return next(
            micro_batches(
                dataset.layout, data, micro_batch_size=size, num_micro_batches=1, rank=0, world_size=1,
                group_size=group,
            )
        )  # fmt: skip

    def check_can_roll_back(self, checkpoint: Path | None) -> None:
        """Raise DivergedError when there is nothing to go back to, or going back is switched off."""
        if self.config.max_rollbacks == 0:
            raise self._diverged("train.max_rollbacks is 0")
        if checkpoint is None:
            raise self._diverged("there is no checkpoint yet to go back to")

    def check_rollbacks(self, step: int) -> None:
        """Raise DivergedError when the run has gone back to the checkpoint of `step` often enough."""
        if count_rollbacks(self.bad.events, step) >= self.config.max_rollbacks:
            raise self._diverged(
                f"the run has gone back to its checkpoint of step {step} as often as "
                f"train.max_rollbacks={self.config.max_rollbacks} allows"
            )

    def _diverged(self, reason: str) -> DivergedError:
        return DivergedError(
            f"no finite loss and gradient norm in {self.bad.streak} tries in a row, and {reason}: see {self.path} for "
            "the samples; remove them, or lower optim.learning_rate"
        )

    def record_rollback(self, state: TrainState, checkpoint: Path) -> None:
        """Write down that `state` has the weights of `checkpoint` and goes on at its own data position."""
        if self.plan.world.is_main:
            logger.warning(
                "went back to %s after %d skipped steps; going on past their samples, at position %d of epoch %d",
                checkpoint, self.bad.streak, state.data.consumed, state.data.epoch,
            )  # fmt: skip
        self.bad.record(Event(kind="rollback", step=state.step, data=state.data), checkpoint=checkpoint.name)
