"""A run from its checks to its end: plan, lock, folder, loop, close."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from trainer.checkpoint.init_from import check_init_whole, init_notes
from trainer.checkpoint.resume import choose_checkpoint
from trainer.cluster.heartbeat import watch_peers
from trainer.cluster.outcome import Outcome
from trainer.config import ConfigError, TrainConfig, save_config
from trainer.distributed import World, barrier, check_devices, from_main, init_distributed
from trainer.engine.determinism import make_deterministic
from trainer.loop.loop import Trainer
from trainer.loop.run_lock import RunLock
from trainer.loop.signals import StopSignal
from trainer.loop.start_checks import Plan, plan_run, rounded_capacities
from trainer.telemetry.metrics import logger, setup_logging


def train(config: TrainConfig, world: World, stop: StopSignal) -> Outcome:
    """Train from the start or from the newest checkpoint; returns how it ended. Collective over all ranks.

    Raises ConfigError for what the user can mend, before anything is written.
    """
    check_devices(world)
    plan = plan_run(config, world)
    if config.train.deterministic:
        make_deterministic()
    device = init_distributed(world)
    try:
        with watch_peers(world):
            outcome = _train_locked(plan, device, stop)
    except ConfigError:
        # All ranks raise it together. A process that exits with its group alive may abort instead (gloo's threads).
        torch.distributed.destroy_process_group()
        raise
    torch.distributed.destroy_process_group()
    return outcome


def _train_locked(plan: Plan, device: torch.device, stop: StopSignal) -> Outcome:
    """Hold the run folder from the choice of the checkpoint to the end of the loop."""
    config, world = plan.config, plan.world
    lock = RunLock(Path(config.run_dir))
    from_main(world, lock.acquire)
    try:
        checkpoint, notes = choose_checkpoint(config, plan.topology, plan.dataset.info.fingerprint, world)
        plan = replace(plan, checkpoint=checkpoint)
        if plan.init_from is not None:
            check_init_whole(plan.init_from, world)
        from_main(
            world,
            lambda: prepare_run_folder(plan, [*plan.notes, *notes, *init_notes(config, plan.dataset.info, checkpoint)]),
        )
        trainer = Trainer(plan, device, stop, lock)
        try:
            finished = trainer.run()
        except Exception as error:
            _close_after(trainer, error)
            raise
        trainer.close()
        barrier()
        return Outcome(kind="finished" if finished else "stopped", step=trainer.state.step)
    finally:
        lock.release()


def _close_after(trainer: Trainer, error: Exception) -> None:
    """Close the log files without hiding why the run failed (a full disk may be the reason)."""
    try:
        trainer.close()
    except OSError as second:
        error.add_note(f"The log files could not be closed either: {second!r}")


def prepare_run_folder(plan: Plan, notes: Sequence[str] = ()) -> None:
    """Write the resolved configurations and say what starts, and `notes` on it; main process only."""
    config, run_dir = plan.config, Path(plan.config.run_dir)
    save_config(config, run_dir / "config.yaml.tmp")
    os.replace(run_dir / "config.yaml.tmp", run_dir / "config.yaml")
    (run_dir / "ds_config.json.tmp").write_text(json.dumps(plan.deepspeed_config, indent=2) + "\n")
    os.replace(run_dir / "ds_config.json.tmp", run_dir / "ds_config.json")
    setup_logging(run_dir / "train.log")
    logger.info(
        "run %s: %d processes, ep_size %d, ZeRO stage %d, %s",
        config.run_dir, plan.world.size, plan.topology.ep_size, plan.topology.zero_stage, config.train.precision,
    )  # fmt: skip
    for sentence in (*rounded_capacities(config, plan.dataset.info), *notes):
        logger.info(sentence)
    start = f"starting from the weights of {plan.init_from}" if plan.init_from else "starting fresh"
    logger.info(f"resuming from {plan.checkpoint}" if plan.checkpoint else start)
