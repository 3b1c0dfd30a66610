"""Reading a checkpoint into an engine of any topology: each rank reads the ranges that ZeRO gives it."""

from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.agree import agree, refused
from trainer.checkpoint.members import member
from trainer.checkpoint.reader import CheckpointReader, Piece, check_same_model, rank_file
from trainer.checkpoint.snapshot import describe_parameters, engine_pieces, restore_counters, restore_rng
from trainer.checkpoint.state import SavedState, TrainState, read_state
from trainer.checkpoint.tensorfile import CHUNK_BYTES, TensorFile
from trainer.config import ConfigError
from trainer.distributed import World
from trainer.engine.ema import Ema
from trainer.engine.zero_state import prepare_moments, publish_master
from trainer.formats.progress_bar import ProgressBar


def load_checkpoint(checkpoint: Path, engine: Any, ema: Ema, world: World) -> TrainState:
    """Restore weights, optimizer, EMA and counters, on the topology that wrote them or any other. Collective.

    On the same number of processes the random generators are restored too. Raises ConfigError on all ranks when
    one of them cannot read it, or when it is of another model.
    """
    saved = read_state(checkpoint)
    with refused(f"{checkpoint} cannot be loaded"):
        agree(lambda: _fill(checkpoint, engine, ema, saved, world))
        if saved.topology.world_size == world.size:
            agree(lambda: _restore_rng(member(checkpoint, rank_file(world.rank))))
    publish_master(engine)  # the model computes with rounded copies, which still are the initial values
    restore_counters(engine, saved)
    return TrainState(
        step=saved.step, data=saved.data, interval_loss=saved.interval_loss, interval_steps=saved.steps_since_report()
    )


@torch.no_grad()
def _fill(checkpoint: Path, engine: Any, ema: Ema, saved: SavedState, world: World) -> None:
    there = {entry.name: entry.shape for entry in saved.parameters}
    here = {entry["name"]: entry["shape"] for entry in describe_parameters(engine)}
    check_same_model(checkpoint, there, here)
    # Moments come into being in an optimizer's first step; without this there would be nothing to fill.
    prepare_moments(engine, saved.optimizer.moments, saved.optimizer.step)
    pieces = engine_pieces(engine, ema)
    reader = _reader(checkpoint, pieces, world)
    targets = ((piece.values, piece.offset, partial(reader.read_into, piece.kind, piece.name)) for piece in pieces)
    fill(targets, shown=world.is_main)
    reader.close()


@torch.no_grad()
def fill(targets: Iterable[tuple[Tensor, int, Callable[[int, Tensor], None]]], *, shown: bool = False) -> None:
    """Fill flat fp32 tensors of any device: of each its values, where they begin in the full tensor, and a reader.

    The reader fills a flat host tensor with the elements from a start on. With `shown` there is a bar.
    """
    buffer: Tensor | None = None
    for values, offset, read in ProgressBar(list(targets), "load", unit="tensor", shown=shown, leave=False):
        if values.device.type == "cpu":
            read(offset, values)
            continue
        if buffer is None:  # one for all tensors: pinned memory is slow to get, and the copies of one are in order
            buffer = torch.empty(CHUNK_BYTES // 4, dtype=torch.float32, pin_memory=True)
        for start in range(0, values.numel(), buffer.numel()):
            part = values[start : start + buffer.numel()]
            read(offset + start, buffer[: part.numel()])
            part.copy_(buffer[: part.numel()])


def _reader(checkpoint: Path, pieces: list[Piece], world: World) -> CheckpointReader:
    """On the topology that saved, a reader of this rank's file alone; else of all files.

    Then N ranks open N files and not N * N, which is what network file systems are slow at.
    """
    reader = CheckpointReader(checkpoint, [rank_file(world.rank)])
    if all(reader.holds(piece) for piece in pieces):
        return reader
    reader.close()
    return CheckpointReader(checkpoint)


def _restore_rng(path: Path) -> None:
    with closing(TensorFile(path)) as file:
        names = [name for name in file.places if name.startswith("rng/")]
        tensors = {name: torch.empty(file.length(name), dtype=torch.uint8) for name in names}
        try:
            for name, tensor in tensors.items():
                file.read_into(name, 0, tensor)
            if tensors:
                restore_rng(tensors)
        except (LookupError, ValueError, TypeError, RuntimeError, StopIteration) as error:  # of torch, numpy, Python
            raise ConfigError(f"{path} is damaged: its random generators cannot be restored") from error
