"""The training loop: optimizer steps, and what happens between them.

Within a step nothing may be saved. Between steps the state is sound; what fails there ends the run with a checkpoint
if every rank can take part (trainer/loop/leaving.py). The ranks exchange one small vector at the end of each step:
loss, router statistics, and whether a rank was asked to stop, failed, or lost the run folder.
"""

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moe.layer import set_capacity_factor
from trainer.checkpoint.folder import list_checkpoints, newest_whole
from trainer.checkpoint.init_from import load_init
from trainer.checkpoint.load import load_checkpoint
from trainer.checkpoint.save import Saver
from trainer.checkpoint.state import TrainState
from trainer.data.position import DataState
from trainer.distributed import all_reduce_mean, from_main
from trainer.engine.ema import Ema
from trainer.engine.engine import build_engine
from trainer.engine.optim import learning_rate
from trainer.loop.leaving import (
    ARRIVAL_SECONDS,
    HeldErrors,
    all_ranks_arrive,
    build_arrival_group,
    end_within,
    time_limit,
)
from trainer.loop.prepared import Prepared, build_prepared, next_step
from trainer.loop.run_lock import LockLostError, RunLock
from trainer.loop.sample_grid import GridSampler
from trainer.loop.signals import StopSignal
from trainer.loop.skips import DivergedError, SkipPolicy
from trainer.loop.start_checks import Plan
from trainer.loop.step import StepResult, suspects, train_step
from trainer.loop.time_budget import TimeBudget
from trainer.telemetry.reporter import Reporter
from trainer.telemetry.step_timer import StepTimer

logger = logging.getLogger("ec_dit")


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What all ranks know at the end of a step."""

    loss: float
    stop: bool
    failed: bool
    lock_lost: bool
    router: list[float]


class Trainer:
    """The state of a running loop. All ranks build and run it together."""

    def __init__(self, plan: Plan, device: torch.device, stop: StopSignal, lock: RunLock) -> None:
        self.plan, self.config, self.device, self.stop, self.lock = plan, plan.config, device, stop, lock
        info, shape = plan.dataset.info, plan.model_shape
        self.engine = build_engine(plan.config, plan.deepspeed_config, shape, device)
        if plan.init_from is not None:
            load_init(plan.init_from, self.engine, plan.config)
        self.ema = Ema(self.engine, plan.config.ema)
        self.state = TrainState(step=0, data=DataState(seed=plan.config.seed, epoch=0, consumed=0, samples_seen=0))
        self.saver = Saver(plan.config, plan.topology, info, plan.world)
        if plan.checkpoint is not None:
            self.state = load_checkpoint(plan.checkpoint, self.engine, self.ema, plan.world)
        self.saved_step = self.state.step
        self.skips = SkipPolicy(plan, self.state)
        self.state = replace(self.state, data=self.skips.start)
        self.grid = GridSampler(plan.config, info, shape, plan.world, device)
        self.reporter = Reporter(plan, shape, device, self.state.step)
        self.batches = build_prepared(
            plan.dataset, plan.config, rank=plan.world.rank, world_size=plan.world.size, state=self.state.data
        )
        self.upcoming: list[Prepared] = []
        self.held = HeldErrors()
        self.budget = TimeBudget.from_environment()
        self.timer = StepTimer(device)
        self.arrivals = build_arrival_group()
        self.sound, self.agreed = True, False

    def run(self) -> bool:
        """Steps until `max_steps`, `stop_at_step` or a stop; always ends with a checkpoint.

        A stop is a signal, or too little time left before the deadline. Returns whether the last step was reached.
        """
        loop = self.config.train
        last = loop.stop_at_step or loop.max_steps
        if self.state.step >= last:
            self._say("nothing to do: the checkpoint is at step %d of %d", self.state.step, last)
            return True
        try:
            stopped = self._run_until(last)
        except Exception as error:
            self._save_on_the_way_out(error)
            raise
        why = "last step" if not stopped else "time limit near" if self.budget.is_spent() else "stop signal"
        self._say("ended after step %d of %d (%s)", self.state.step, loop.max_steps, why)
        return self.state.step >= last

    def close(self) -> None:
        """Close the log files."""
        self.reporter.close()

    def _run_until(self, last: int) -> bool:
        """Step until `last` or a stop; returns whether it was a stop."""
        loop = self.config.train
        stopping = self._settle(self._prepare_and_exchange(more=True))
        while self.state.step < last and not stopping:
            before, start = self.state.step, time.perf_counter()
            stopping = self._step(last)
            self.budget.stepped(time.perf_counter() - start)
            step = self.state.step
            applied = step > before
            if applied and loop.sample_every and (step % loop.sample_every == 0 or step == loop.max_steps):
                self._draw_grid()
            final = stopping or step == last
            if final or (applied and loop.checkpoint_every and step % loop.checkpoint_every == 0):
                self._save(final=final)
        self._settle(self._prepare_and_exchange(more=False))
        return stopping

    def _step(self, last: int) -> bool:
        """Try one optimizer step; returns whether any rank was asked to stop."""
        self.sound = False
        rate = learning_rate(self.state.step, self.config.optim, self.config.train.max_steps)
        used = self.upcoming
        set_capacity_factor(self.engine.module, self.config.moe.factor_at(self.state.step))
        every = self.config.train.profile_every
        with self.timer.measuring(self.engine, bool(every) and (self.state.step + 1) % every == 0):
            result = train_step(
                self.engine, used, rate, self.device, self.timer, patch_size=self.config.model.patch_size,
                statistics=(self.state.step + 1) % self.config.train.log_every == 0,
            )  # fmt: skip
            if result.applied:
                with self.timer.section("optimizer"):
                    self.ema.update(self.engine, self.state.step + 1)
            found = self._prepare_and_exchange(more=self.state.step + result.applied < last, result=result)
        batch_size = self.plan.global_batch_size
        data = self.state.data.advance(batch_size, len(self.plan.dataset), batch_size)
        if result.applied:
            self._advance(data, found, rate, result)
        else:
            self._skip(data, found, suspects(result, used))
        self.sound = True
        return self._settle(found)

    def _prepare_and_exchange(self, *, more: bool, result: StepResult | None = None) -> Exchange:
        """Read the data of the next step if there are `more`, then tell all ranks how this one went. Collective.

        Reading comes first, so that a rank whose data cannot be read says so before others wait for it.
        """
        if more:
            with self.held.held():
                number = self.state.step + (result is not None and result.applied)
                with self.timer.section("data"):
                    self.upcoming = next_step(self.batches, self.config, number)
        if self.lock.lost and self.held.error is None:
            self.held.error = LockLostError(f"run_dir={self.config.run_dir} was taken over by another job")
        report = torch.zeros(4 + self.reporter.router_size)
        report[1:4] = torch.tensor(
            [
                self.stop.received or self.budget.is_spent(),
                self.held.error is not None,
                isinstance(self.held.error, LockLostError),
            ]
        )
        report = report.to(self.device)
        if result is not None:
            report[0] = result.losses.mean()
            if len(result.router):
                report[4:] = result.router
        loss, stop, failed, lost, *router = all_reduce_mean(report).tolist()
        return Exchange(loss=loss, stop=stop > 0, failed=failed > 0, lock_lost=lost > 0, router=router)

    def _settle(self, found: Exchange) -> bool:
        """Raise if a rank failed; returns whether one was asked to stop."""
        if found.failed:
            self.sound, self.agreed = self.sound and not found.lock_lost, True
            self.held.raise_everywhere()
        return found.stop

    def _advance(self, data: DataState, found: Exchange, rate: float, result: StepResult) -> None:
        """Count an applied step, report at the interval."""
        step, every = self.state.step + 1, self.config.train.log_every
        total = self.state.interval_loss + found.loss
        self.state = replace(self.state, step=step, data=data, interval_loss=0.0 if step % every == 0 else total)
        self.skips.step_applied()
        with self.held.held():
            if step % every == 0:
                self.reporter.report(
                    step, loss=total / every, norm=self.engine.get_global_grad_norm(), rate=rate,
                    epoch=data.epoch, bad_steps=self.skips.num_skipped, router=found.router,
                    stats=result.stats, times=self.timer.take(),
                )  # fmt: skip
            self.reporter.advance()

    def _skip(self, data: DataState, found: Exchange, mine: list[int]) -> None:
        """Count a skipped step; go back to the newest checkpoint after too many in a row."""
        suspected = self.skips.gather_suspects(mine)
        with self.held.held():
            self.skips.record_skip(self.state, data, loss=found.loss, suspected=suspected)
        self.state = replace(self.state, data=data)
        if self.skips.must_roll_back:
            self._roll_back()

    def _roll_back(self) -> None:
        """Load the newest whole checkpoint, keep the data position."""
        self.saver.finish()
        folder = Path(self.config.run_dir) / "checkpoints"
        checkpoint = from_main(self.plan.world, lambda: newest_whole(list_checkpoints(folder)))
        self.skips.check_can_roll_back(checkpoint)
        assert checkpoint is not None
        loaded = load_checkpoint(checkpoint, self.engine, self.ema, self.plan.world)
        self.state = replace(loaded, data=self.state.data)
        self.saved_step = loaded.step
        self.skips.check_rollbacks(loaded.step)
        with self.held.held():
            self.skips.record_rollback(self.state, checkpoint)
            self.reporter.rewind(loaded.step)

    def _draw_grid(self) -> None:
        """Draw with the average in place of the weights. If they cannot be brought back, nothing is saved."""
        start, self.sound = time.perf_counter(), False
        picture: Tensor | None = None
        failure: Exception | None = None
        try:
            with self.ema.swapped(self.engine):
                try:
                    picture = self.grid.draw(self.engine)
                except Exception as error:
                    failure = error
                    self._regroup(error)
            self.sound = True
        finally:
            if failure is not None:
                raise failure
        assert picture is not None
        with self.held.held():
            if self.plan.world.is_main:
                self.grid.save(picture, Path(self.config.run_dir), self.state.step)
                self.reporter.add_image(self.state.step, picture)
        self.reporter.pause(time.perf_counter() - start)

    def _regroup(self, error: Exception) -> None:
        """After an error in collective work: make the engine usable again if all ranks have left that work."""
        if all_ranks_arrive(self.arrivals):
            self.engine.empty_partition_cache()  # a forward pass that was left leaves ZeRO-3's parameters gathered
            return
        logger.error("rank %d failed while others went on", self.plan.world.rank, exc_info=error)
        end_within(ARRIVAL_SECONDS)  # what follows is collective, and may wait for those others

    def _save(self, *, final: bool) -> None:
        """Write a checkpoint, unless this step has one; bad samples since then are met and skipped again.

        A `final` one is on disk when this returns, or the run fails.
        """
        if self.state.step == self.saved_step:
            self.saver.finish(required=final)
            return
        start, self.sound = time.perf_counter(), False
        if self.saver.save(self.engine, self.ema, self.state, required=final):
            self.saved_step = self.state.step
        self.sound = True
        self.budget.saved(time.perf_counter() - start)
        self.reporter.pause(time.perf_counter() - start, save=True)

    def _save_on_the_way_out(self, error: Exception) -> None:
        """After an error: a last checkpoint if the state is sound and every rank gets here. `error` stays the error."""
        step, limit = self.state.step, self.config.train.emergency_save_seconds
        logger.error("rank %d failed after step %d: %r", self.plan.world.rank, step, error)
        try:
            with time_limit(limit):
                self.saver.finish(required=True)  # copies of an earlier step, sound whatever happened since
        except Exception as second:
            error.add_note(f"The save under way failed, too: {second!r}")
        if not self.sound or isinstance(error, DivergedError) or step == self.saved_step:
            return
        with time_limit(limit):
            if not self.agreed and not all_ranks_arrive(self.arrivals):
                return
            try:
                self._save(final=True)
            except Exception as second:
                error.add_note(f"The checkpoint of step {step} could not be saved either: {second!r}")

    def _say(self, message: str, *values: object) -> None:
        if self.plan.world.is_main:
            logger.info(message, *values)
