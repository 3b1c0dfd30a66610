"""A run from its checks to its end: checks, lock, folder, log, loop, close."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from trainer.checkpoint.init_from import check_init_whole, init_notes
from trainer.checkpoint.resume import choose_checkpoint
from trainer.cluster.heartbeat import watch_peers
from trainer.cluster.outcome import Kind, Outcome
from trainer.cluster.progress import Progress
from trainer.config import TrainConfig, save_config
from trainer.distributed import World, barrier, check_devices, from_main, process_group
from trainer.engine.determinism import make_deterministic
from trainer.errors import writing
from trainer.files import write_json
from trainer.formats.progress_bar import BesideBars
from trainer.loop.loop import Trainer
from trainer.loop.run_lock import RunLock
from trainer.loop.signals import StopSignal
from trainer.loop.start_checks import CheckedRun, check_start, rounded_capacities
from trainer.loop.switches import check_not_stopped
from trainer.telemetry.run_history import LOG, WARNING_MARK

logger = logging.getLogger("ec_dit")


def train(config: TrainConfig, world: World, stop: StopSignal) -> Outcome:
    """Train from the start or from the newest checkpoint; returns how it ended. Collective over all ranks.

    Raises ConfigError for what the user can mend, before anything is written.
    """
    check_devices(world)
    checked = check_start(config, world)
    if config.train.deterministic:
        make_deterministic()
    with process_group(world) as device:
        progress = Progress(config.train.hang_seconds)
        with watch_peers(world, progress, Path(config.run_dir)):
            return _train_locked(checked, device, stop, progress)


def _train_locked(checked: CheckedRun, device: torch.device, stop: StopSignal, progress: Progress) -> Outcome:
    """Hold the run folder from the choice of the checkpoint to the end of the loop."""
    config, world, info = checked.config, checked.world, checked.dataset.info
    lock = RunLock(Path(config.run_dir))
    from_main(world, lock.acquire)
    try:
        from_main(world, lambda: check_not_stopped(Path(config.run_dir)))
        # Chosen again under the lock, and verified whole: another job may have written while `check_start` looked.
        checkpoint, notes = choose_checkpoint(config, checked.topology, info, world)
        checked = replace(checked, checkpoint=checkpoint)
        if checked.init_from is not None:
            check_init_whole(checked.init_from, world)
        notes = [*checked.notes, *notes, *init_notes(config, info, checkpoint)]
        from_main(world, lambda: prepare_run_folder(checked, notes))
        trainer = Trainer(checked, device, stop, lock, progress)
        try:
            finished = trainer.run()
        except Exception as error:
            try:
                trainer.reporter.close()
            except OSError as second:  # a full disk may be the very reason: it must not hide why the run failed
                # A removed folder is what the error says; a last checkpoint may have made it anew.
                if not isinstance(second, FileNotFoundError):
                    error.add_note(f"The log files could not be closed either: {second!r}")
            raise
        progress.enter("end")
        trainer.reporter.close()
        barrier()  # no rank gives the lock back, and exits, while another one still writes
        # The main process's alone is recorded, which is the one that knows of RUN/stop.
        kind: Kind = "finished" if finished else "halted" if trainer.switches.stop else "stopped"
        return Outcome(kind=kind, step=trainer.state.step)
    finally:
        lock.release()


def setup_logging(path: Path) -> None:
    """Log to the run's `train.log`, and to the terminal beside the progress bar."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers.clear()
    for handler in (logging.FileHandler(path), BesideBars(sys.stdout)):
        handler.addFilter(_mark)
        handler.setFormatter(logging.Formatter("%(asctime)s %(mark)s%(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)


def _mark(record: logging.LogRecord) -> bool:
    """Mark what a person should look at, for the run's page too."""
    record.mark = WARNING_MARK if record.levelno >= logging.WARNING else ""
    return True


def prepare_run_folder(checked: CheckedRun, notes: Sequence[str] = ()) -> None:
    """Write the resolved configurations and say what starts, and `notes` on it; main process only."""
    config, topology, run_dir = checked.config, checked.topology, Path(checked.config.run_dir)
    with writing(f"run_dir={run_dir}"):
        save_config(config, run_dir / "config.yaml")
        write_json(run_dir / "ds_config.json", checked.deepspeed_config)
        setup_logging(run_dir / LOG)
    logger.info(
        "run %s: %d processes, ep_size %d, ZeRO stage %d, %s",
        config.run_dir, topology.world_size, topology.ep_size, topology.zero_stage, config.train.precision,
    )  # fmt: skip
    for sentence in (*rounded_capacities(config, checked.dataset.info), *notes):
        logger.info(sentence)
    start = f"starting from the weights of {checked.init_from}" if checked.init_from else "starting fresh"
    logger.info(f"resuming from {checked.checkpoint}" if checked.checkpoint else start)
