"""Writing a checkpoint: every rank its pieces, all of it published at once or not at all."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
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
from trainer.checkpoint.reader import KINDS, Piece, rank_file, write_pieces
from trainer.checkpoint.rng import rng_tensors
from trainer.checkpoint.state import STATE, Topology, TrainState, describe
from trainer.checkpoint.tensorfile import Written
from trainer.config import TrainConfig
from trainer.data.dataset import LatentInfo
from trainer.distributed import World, all_reduce_sum
from trainer.engine.ema import Ema
from trainer.engine.zero_state import MOMENTS, TensorPiece, master_pieces, moment_pieces


def engine_pieces(engine: Any, ema: Ema) -> Iterator[Piece]:
    """This rank's pieces of weights, average and moments: live views, in the order of the file."""
    for name, piece in master_pieces(engine):
        yield _piece("weight", name, piece)
    for name, piece in master_pieces(engine):
        yield _piece("ema", name, replace(piece, values=ema.average[name]))
    for kind, name, piece in moment_pieces(engine):
        yield _piece(kind, name, piece)


def _piece(kind: str, name: str, piece: TensorPiece) -> Piece:
    return Piece(kind=kind, name=name, offset=piece.offset, shape=piece.logical_shape, values=piece.values)


def check_complete(pieces: list[Piece], parameters: list[dict[str, Any]], device: torch.device) -> None:
    """Assert that the pieces of all ranks make up each tensor: ZeRO left nothing out. Collective."""
    held = {(piece.kind, piece.name): piece.values.numel() for piece in pieces}
    counts = [[held.get((kind, entry["name"]), 0) for entry in parameters] for kind in KINDS]
    totals = all_reduce_sum(torch.tensor(counts, device=device)).tolist()
    for kind, row in zip(KINDS, totals, strict=True):
        if kind in MOMENTS and not any(row):
            continue
        for entry, total in zip(parameters, row, strict=True):
            expected = prod(entry["shape"])
            assert total == expected, f"{kind} {entry['name']}: the ranks hold {total} of {expected} elements"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What one rank writes: its pieces, its random generators, and the content of `state.json`."""

    pieces: list[Piece]
    rng: dict[str, Tensor]
    content: dict[str, Any]


def take_snapshot(
    engine: Any, ema: Ema, state: TrainState, config: TrainConfig, topology: Topology, info: LatentInfo
) -> Snapshot:
    """The state of the engine as live views; valid until the next step. Collective over all ranks."""
    pieces = list(engine_pieces(engine, ema))
    content = describe(engine, state, config, topology, info)
    check_complete(pieces, content["parameters"], engine.device)
    return Snapshot(pieces=pieces, rng=rng_tensors(), content=content)


def save_checkpoint(
    engine: Any, ema: Ema, state: TrainState, config: TrainConfig, topology: Topology, info: LatentInfo, world: World
) -> Path:
    """Write one checkpoint and prune old ones. Collective over all ranks.

    Raises CheckpointError, the same on all ranks, when one of them cannot write; nothing of it is left then.
    """
    return write_checkpoint(take_snapshot(engine, ema, state, config, topology, info), config, world)


def write_checkpoint(snapshot: Snapshot, config: TrainConfig, world: World, group: Any = None) -> Path:
    """Write a snapshot to disk, publish it and prune. Collective over `group`, which must span all ranks."""
    content = snapshot.content
    final = checkpoint_dir(config.run_dir, content["step"])
    temporary = temporary_dir(final)

    def prepare() -> None:
        if world.is_main:
            final.parent.mkdir(parents=True, exist_ok=True)
            clean(final.parent)
            temporary.mkdir()

    def write() -> Written:
        return write_pieces(temporary / rank_file(world.rank), snapshot.pieces, snapshot.rng)

    def finish() -> None:
        if world.is_main:
            files = {rank_file(rank): part for rank, part in enumerate(written)}
            files[STATE] = write_durable(temporary / STATE, json.dumps(content, indent=1) + "\n")
            write_manifest(temporary, files)
            publish(temporary, final)

    def tidy() -> None:
        if world.is_main:
            prune(final.parent, final, keep_last=config.train.keep_last, keep_every=config.train.keep_every)

    try:
        agree(prepare, group)
        written = agree(write, group)
        agree(finish, group)
    except CheckpointError as error:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        message = f"step {content['step']} could not be saved in {final.parent}: {error}; earlier checkpoints are whole"
        raise CheckpointError(message, environment=error.environment) from error
    try:
        agree(tidy, group)
    except CheckpointError as error:
        message = f"{final} is saved, but an older checkpoint could not be deleted: {error}"
        raise CheckpointError(message, environment=error.environment) from error
    return final
