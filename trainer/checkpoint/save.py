"""Saving: every rank writes its pieces, all of it is published at once or not at all.

Training waits for a save, or goes on while a thread writes host copies (`train.async_save`). Both take the same steps
with the same guarantees. The thread has a process group of its own, so that its agreements do not mix with those of
training; one save is under way at a time.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.agree import CheckpointError, agree
from trainer.checkpoint.folder import (
    checkpoint_dir,
    clean,
    prune,
    publish,
    temporary_dir,
    write_durable,
    write_manifest,
)
from trainer.checkpoint.reader import Piece, rank_file, write_pieces
from trainer.checkpoint.snapshot import Snapshot, take_snapshot
from trainer.checkpoint.state import STATE, Topology, TrainState
from trainer.checkpoint.tensorfile import Written
from trainer.config import ConfigError, TrainConfig, save_config
from trainer.data.latents.samples import LatentInfo
from trainer.distributed import World
from trainer.engine.ema import Ema

logger = logging.getLogger("ec_dit")


def write_checkpoint(snapshot: Snapshot, config: TrainConfig, world: World, group: Any = None) -> Path:
    """Write a snapshot to disk, publish it and prune old ones. Collective over `group`, which must span all ranks.

    Raises CheckpointError, the same on all ranks, when one of them cannot write; nothing of it is left then.
    """
    content = snapshot.content
    final = checkpoint_dir(config.run_dir, content["step"])
    temporary = temporary_dir(final)

    # Until `finish` renames the folder nobody takes it for a checkpoint, so a death in the first two phases costs
    # nothing. Each phase is agreed on before the next: no rank writes into a folder that is not there, and the
    # manifest, written last, holds what every rank said that it wrote.
    def prepare() -> None:
        if world.is_main:
            final.parent.mkdir(parents=True, exist_ok=True)
            clean(final.parent)
            temporary.mkdir()
            settings = Path(config.run_dir) / "config.yaml"
            if not settings.exists():  # without it no run goes on in the folder
                logger.warning("%s is missing, maybe the run folder was removed: written anew", settings)
                save_config(config, settings)

    def write() -> Written:
        return write_pieces(temporary / rank_file(world.rank), snapshot.pieces, snapshot.rng)

    def finish() -> None:
        if world.is_main:
            files = {rank_file(rank): part for rank, part in enumerate(written)}
            files[STATE] = write_durable(temporary / STATE, json.dumps(content, indent=1) + "\n")
            write_manifest(temporary, files)
            publish(temporary, final)

    # Old checkpoints go only after the new one has its name: there is always a whole one.
    def tidy() -> None:
        if world.is_main:
            prune(final.parent, final, keep_last=config.train.keep_last, keep_every=config.train.keep_every)

    try:
        agree(prepare, group)
        written = agree(write, group)
        agree(finish, group)
    except CheckpointError as error:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)  # the disk may be full: give the space back
        earlier = "; earlier checkpoints are whole" if final.parent.is_dir() else ""
        message = f"step {content['step']} could not be saved in {final.parent}: {error}{earlier}"
        raise CheckpointError(message, environment=error.environment) from error
    try:
        agree(tidy, group)
    except CheckpointError as error:
        message = f"{final} is saved, but an older checkpoint could not be deleted: {error}"
        raise CheckpointError(message, environment=error.environment) from error
    return final


class Saver:
    """Saves one run's checkpoints. All ranks build and call it together."""

    def __init__(self, config: TrainConfig, topology: Topology, info: LatentInfo, world: World) -> None:
        self.config, self.topology, self.info, self.world = config, topology, info, world
        self.in_background = config.train.async_save
        self.group: Any = torch.distributed.new_group(backend="gloo") if self.in_background else None
        self.copies: dict[tuple[str, str], Tensor] = {}  # host buffers, kept from save to save
        self.pending: Future[Path] | None = None

    def save(self, engine: Any, ema: Ema, state: TrainState, *, required: bool) -> bool:
        """Save this step; first wait for the save before it. Returns whether it was saved or is being written.

        A `required` save is on disk when this returns. Raises ConfigError, the same on all ranks, when the disk
        refuses and the save is required or `train.on_save_error` is `abort`.
        """
        self.finish()  # its copies are the buffers that this save fills again
        start = time.perf_counter()
        snapshot = take_snapshot(engine, ema, state, self.config, self.topology, self.info)
        if not self.in_background:
            return self._settle(lambda: write_checkpoint(snapshot, self.config, self.world), start, required=required)
        snapshot = replace(snapshot, pieces=[self._copied(piece) for piece in snapshot.pieces])
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies are only queued, and the next step changes what they read
        if self.world.is_main:
            logger.info("copied step %d in %.1f s, writing it", state.step, time.perf_counter() - start)
        self.pending = self._start(snapshot)
        return self.finish(required=True) if required else True

    def finish(self, *, required: bool = False) -> bool:
        """Wait for the save under way, if any; errors as in `save`. Returns whether nothing was refused."""
        if self.pending is None:
            return True
        pending, self.pending = self.pending, None
        return self._settle(pending.result, time.perf_counter(), required=required)

    def _settle(self, result: Callable[[], Path], start: float, *, required: bool) -> bool:
        """Log how a save ended; returns whether it succeeded. Only what the disk refuses may cost just a checkpoint."""
        try:
            path = result()
        except CheckpointError as error:
            if not error.environment:
                raise
            if required or self.config.train.on_save_error == "abort":
                raise ConfigError(str(error)) from error
            if self.world.is_main:
                logger.warning("train.on_save_error=continue: %s", error)
            return False
        if self.world.is_main:
            logger.info("saved %s in %.1f s", path, time.perf_counter() - start)
        return True

    def _start(self, snapshot: Snapshot) -> "Future[Path]":
        future: Future[Path] = Future()

        def run() -> None:
            try:
                future.set_result(write_checkpoint(snapshot, self.config, self.world, self.group))
            except BaseException as error:  # raised again by `finish`
                future.set_exception(error)

        # A daemon: a run that ends by an error does not wait for ranks that may be gone.
        Thread(target=run, name="checkpoint", daemon=True).start()
        return future

    @torch.no_grad()
    def _copied(self, piece: Piece) -> Piece:
        key = (piece.kind, piece.name)
        if key not in self.copies:  # kept: pinned memory is slow to get
            self.copies[key] = torch.empty(
                piece.values.shape, dtype=piece.values.dtype, pin_memory=piece.values.is_cuda
            )
        self.copies[key].copy_(piece.values, non_blocking=True)
        return replace(piece, values=self.copies[key])
