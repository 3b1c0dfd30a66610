"""The training loop: optimizer steps, and what happens between them.

Within a step nothing may be saved. Between steps the state is sound; what fails there ends the run with a checkpoint
if every rank can take part (trainer/loop/leaving.py). At the end of each step the ranks exchange one small vector
(`StepReport`): loss, router statistics, and whether a rank was asked to stop, failed, or lost the run folder.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from moe.layer import set_capacity_factor
from trainer.checkpoint.folder import list_checkpoints, newest_whole
from trainer.checkpoint.init_from import load_init
from trainer.checkpoint.load import load_checkpoint
from trainer.checkpoint.save import Saver
from trainer.checkpoint.state import TrainState
from trainer.cluster.incidents import failure, record_incident
from trainer.cluster.progress import LEAVING, Progress
from trainer.cluster.watchdog import ARRIVAL_SECONDS, end_within, time_limit
from trainer.data.position import DataState
from trainer.diffusion.flow import NoisedBatch
from trainer.distributed import from_main
from trainer.engine.ema import Ema
from trainer.engine.engine import build_engine
from trainer.engine.optim import learning_rate
from trainer.errors import writing
from trainer.loop.bad_steps import DivergedError, SkipPolicy
from trainer.loop.leaving import HeldErrors, all_ranks_arrive, build_arrival_group
from trainer.loop.run_lock import LockLostError, RunLock
from trainer.loop.sample_grid import GridSampler
from trainer.loop.signals import StopSignal
from trainer.loop.start_checks import CheckedRun
from trainer.loop.step import StepReport, StepResult, gather_suspects, next_step, noised_batches, train_step
from trainer.loop.switches import Switches
from trainer.loop.time_budget import TimeBudget
from trainer.telemetry.reporter import Reporter
from trainer.telemetry.step_timer import StepTimer

logger = logging.getLogger("ec_dit")


class Trainer:
    """The state of a running loop. All ranks build and run it together.

    `sound`: weights, average, moments and counters are those of one step, so that they may be saved.
    `agreed`: all ranks know of the error that ends the run, and come to the last save together.
    """

    def __init__(
        self, checked: CheckedRun, device: torch.device, stop: StopSignal, lock: RunLock,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        config, world, info = checked.config, checked.world, checked.dataset.info
        self.checked, self.config, self.device, self.stop, self.lock = checked, config, device, stop, lock
        self.progress = progress or Progress()
        self.engine = build_engine(
            config, checked.deepspeed_config, checked.model_shape, device, compiling=self._compiling
        )
        if checked.init_from is not None:
            load_init(checked.init_from, self.engine, config)
        self.ema = Ema(self.engine, config.ema)  # after the initial weights, from which the average starts
        self.state = TrainState(step=0, data=DataState(seed=config.seed, epoch=0, consumed=0, samples_seen=0))
        self.saver = Saver(config, checked.topology, info, world)
        if checked.checkpoint is not None:
            self.state = self._load(checked.checkpoint)
        self.saved_step = self.state.step
        self.skips = SkipPolicy(checked, self.state)
        # A roll-back to this very checkpoint may have moved on in the data; the batches below start there.
        self.state = replace(self.state, data=self.skips.start)
        self.grid = GridSampler(config, info, world, device)
        self.reporter = Reporter(config, info, world, device, self.state.step)
        self.batches = noised_batches(
            checked.dataset, config, rank=world.rank, world_size=world.size, state=self.state.data
        )
        self.upcoming: list[NoisedBatch] = []
        self.held = HeldErrors()
        self.budget = TimeBudget.from_environment()
        self.switches, self.save_asked = Switches(Path(config.run_dir), is_main=world.is_main), False
        self.timer = StepTimer(device, self.progress.enter)
        self.arrivals = build_arrival_group()
        self.sound, self.agreed = True, False

    def run(self) -> bool:
        """Steps until `max_steps`, `stop_at_step` or a stop; always ends with a checkpoint.

        A stop is a signal, `RUN/stop`, or too little time left before the deadline. Returns whether the last step was
        reached.
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
        why = "RUN/stop" if stopped and self.switches.stop else why
        self.switches.saved()
        self._say("ended after step %d of %d (%s)", self.state.step, loop.max_steps, why)
        return self.state.step >= last

    def _run_until(self, last: int) -> bool:
        """Step until `last` or a stop; returns whether it was a stop."""
        loop = self.config.train
        stopping = self._settle(self._read_and_report(more=True))
        while self.state.step < last and not stopping:
            before, start = self.state.step, time.perf_counter()
            self.progress.step = before + 1
            with self.progress.within("step"):
                stopping = self._step(last)
            self.budget.stepped(time.perf_counter() - start)
            step = self.state.step
            applied = step > before  # not skipped, and not back at an older checkpoint
            if applied and loop.sample_every and (step % loop.sample_every == 0 or step == loop.max_steps):
                with self.progress.within("samples"):
                    self._draw_grid()
            final = stopping or step == last
            asked = self.save_asked
            if final or asked or (applied and loop.checkpoint_every and step % loop.checkpoint_every == 0):
                with self.progress.within("save"):
                    self._save(final=final)
            if asked:
                self.saver.finish()  # who asked sees by the file that the checkpoint is on disk
                self.switches.saved()
        # What failed on one rank after the last step's report, such as writing its grid, must not pass in silence.
        self._settle(self._read_and_report(more=False))
        return stopping

    def _step(self, last: int) -> bool:
        """Try one optimizer step; returns whether any rank was asked to stop."""
        step, loop, used = self.state.step, self.config.train, self.upcoming
        # Until all ranks have counted this step alike, what a save would write belongs to two steps.
        with self._unsound():
            rate = learning_rate(step, self.config.optim, loop.max_steps)
            set_capacity_factor(self.engine.module, self.config.moe.factor_at(step))
            with self.timer.measuring(self.engine, bool(loop.profile_every) and (step + 1) % loop.profile_every == 0):
                result = train_step(
                    self.engine, used, rate, self.device, self.timer, patch_size=self.config.model.patch_size,
                    statistics=(step + 1) % loop.log_every == 0,
                )  # fmt: skip
                if result.applied:  # a skipped step left the weights alone, and so must leave the average
                    with self.timer.section("optimizer"):
                        self.ema.update(self.engine, step + 1)
                found = self._read_and_report(more=step + result.applied < last, result=result)
            # Also a skipped step has used up its samples: tried again, they would be as bad.
            batch_size = self.checked.global_batch_size
            data = self.state.data.advance(batch_size, len(self.checked.dataset), batch_size)
            if result.applied:
                self._advance(data, found, rate, result)
            else:
                self._skip(data, found, gather_suspects(result, used))
        # Only now, so that an error of one rank finds a state that all of them can save.
        return self._settle(found)

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """A graph is made in the middle of a step or of a grid: no part of its speed, and no sign that it hangs."""
        start, around = time.perf_counter(), self.progress.phase
        with self.progress.within("compile"):
            yield
        self.progress.enter(around)
        if around != "samples":  # whose whole time is left out already
            self.reporter.pause(time.perf_counter() - start)

    def _read_and_report(self, *, more: bool, result: StepResult | None = None) -> StepReport:
        """Read the data of the next step if there are `more`, then tell all ranks how this one went. Collective.

        Reading comes first, so that a rank whose data cannot be read says so before others wait for it.
        """
        if more:
            with self.held.held(), self.timer.section("data"):
                number = self.state.step + (result is not None and result.applied)
                self.upcoming = next_step(self.batches, self.config, number)
        if self.lock.lost and self.held.error is None:
            self.held.error = self.lock.loss()
        self.switches.look()
        self.progress.enter("report")
        mine = StepReport(
            loss=torch.zeros(()) if result is None else result.losses.mean(),
            stop=self.stop.received or self.budget.is_spent() or self.switches.stop,
            save=self.switches.save,
            failed=self.held.error is not None,
            lock_lost=isinstance(self.held.error, LockLostError),
            router=result.router
            if result is not None and len(result.router)
            else torch.zeros(self.reporter.router_size),
        )
        return mine.exchange(self.device)

    def _settle(self, found: StepReport) -> bool:
        """Raise if a rank failed; returns whether one was asked to stop."""
        if found.failed:
            # Who lost the lock must not write into the folder, and no rank can save without the others.
            self.sound, self.agreed = self.sound and not found.lock_lost, True
            self.held.raise_everywhere()
        self.save_asked = found.save
        return found.stop

    @contextmanager
    def _unsound(self) -> Iterator[None]:
        """The state must not be saved while the block runs, nor ever if an error leaves it."""
        self.sound = False
        yield
        self.sound = True

    def _advance(self, data: DataState, found: StepReport, rate: float, result: StepResult) -> None:
        """Count an applied step, report at the interval."""
        step, every = self.state.step + 1, self.config.train.log_every
        # Counted, not `every`: a resumed run may report at other steps than the one that began the interval.
        total, count = self.state.interval_loss + float(found.loss), self.state.interval_steps + 1
        kept = (0.0, 0) if step % every == 0 else (total, count)
        self.state = replace(self.state, step=step, data=data, interval_loss=kept[0], interval_steps=kept[1])
        self.skips.bad.step_applied()
        # A full disk on the main process must not leave the others waiting.
        with self.held.held(), writing(f"run_dir={self.config.run_dir}"):
            if step % every == 0:
                self.reporter.report(
                    step, loss=total / count, norm=self.engine.get_global_grad_norm(), rate=rate,
                    epoch=data.epoch, bad_steps=self.skips.bad.num_skipped, router=found.router.tolist(),
                    stats=result.stats, times=self.timer.take(),
                )  # fmt: skip
            self.reporter.advance()

    def _skip(self, data: DataState, found: StepReport, suspected: list[int]) -> None:
        """Count a skipped step; go back to the newest checkpoint after too many in a row."""
        with self.held.held(), writing(f"run_dir={self.config.run_dir}"):
            self.skips.record_skip(self.state, data, loss=float(found.loss), suspected=suspected)
        self.state = replace(self.state, data=data)
        if self.skips.bad.streak >= self.config.train.max_bad_steps:
            self._roll_back()

    def _roll_back(self) -> None:
        """Load the newest whole checkpoint, keep the data position."""
        self.saver.finish()  # the newest may still be on its way to the disk
        folder = Path(self.config.run_dir) / "checkpoints"
        newest = from_main(self.checked.world, lambda: newest_whole(list_checkpoints(folder)))
        checkpoint = self.skips.check_can_roll_back(newest)
        loaded = self._load(checkpoint)
        self.state = replace(loaded, data=self.state.data)
        self.saved_step = loaded.step
        with self.held.held(), writing(f"run_dir={self.config.run_dir}"):
            self.skips.record_rollback(self.state, checkpoint)
            self.reporter.rewind(loaded.step)

    def _load(self, checkpoint: Path) -> TrainState:
        with self.progress.within("load"):
            return load_checkpoint(checkpoint, self.engine, self.ema, self.checked.world)

    def _draw_grid(self) -> None:
        """Draw with the average in place of the weights. If they cannot be brought back, nothing is saved."""
        start = time.perf_counter()
        failed: Exception | None = None
        try:
            with self._unsound(), self.ema.swapped(self.engine):
                try:
                    picture = self.grid.draw(self.engine)
                except Exception as error:  # held back: bringing the weights back is collective work, too
                    failed = error
                    self._regroup(error)
        finally:
            if failed is not None:
                raise failed
        with self.held.held(), writing(f"run_dir={self.config.run_dir}"):
            if self.checked.world.is_main:
                self.grid.save(picture, Path(self.config.run_dir), self.state.step)
                self.reporter.add_image(self.state.step, picture)
        self.reporter.pause(time.perf_counter() - start)

    def _regroup(self, error: Exception) -> None:
        """After an error in collective work: make the engine usable again if all ranks have left that work."""
        if all_ranks_arrive(self.arrivals):
            self.engine.empty_partition_cache()  # a forward pass that was left leaves ZeRO-3's parameters gathered
            return
        logger.error("rank %d failed while others went on", self.checked.world.rank, exc_info=error)
        end_within(ARRIVAL_SECONDS)  # what follows is collective, and may wait for those others

    def _save(self, *, final: bool) -> None:
        """Write a checkpoint, unless this step has one; bad samples since then are met and skipped again.

        A `final` one is on disk when this returns, or the run fails.
        """
        if self.state.step == self.saved_step:
            self.saver.finish(required=final)
            return
        start = time.perf_counter()
        with self._unsound():  # an error in the middle of a save is no reason to begin another
            if self.saver.save(self.engine, self.ema, self.state, required=final):
                self.saved_step = self.state.step
        self.budget.saved(time.perf_counter() - start)
        self.reporter.pause(time.perf_counter() - start, save=True)

    def _save_on_the_way_out(self, error: Exception) -> None:
        """After an error: a last checkpoint if the state is sound and every rank gets here. `error` stays the error."""
        self.progress.enter(LEAVING)
        step, limit = self.state.step, self.config.train.emergency_save_seconds
        logger.error("rank %d failed after step %d: %r", self.checked.world.rank, step, error)
        # Now: the launcher may end this process during the save.
        record_incident(failure(self.checked.world.rank, error))
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
        if self.checked.world.is_main:
            logger.info(message, *values)
