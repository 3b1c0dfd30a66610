"""Reading a checkpoint into an engine of any topology: each rank reads the ranges that ZeRO gives it."""

from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.agree import agree, refused
from trainer.checkpoint.reader import CheckpointReader, Piece, rank_file
from trainer.checkpoint.snapshot import describe_parameters, engine_pieces, restore_counters, restore_rng
from trainer.checkpoint.state import TrainState, read_state
from trainer.checkpoint.tensorfile import CHUNK_BYTES, TensorFile
from trainer.config import require
from trainer.data.position import DataState
from trainer.distributed import World
from trainer.engine.ema import Ema
from trainer.engine.zero_state import prepare_moments, publish_master


def load_checkpoint(checkpoint: Path, engine: Any, ema: Ema, world: World) -> TrainState:
    """Restore weights, optimizer, EMA and counters, on the topology that wrote them or any other. Collective.

    On the same number of processes the random generators are restored too. Raises ConfigError on all ranks when
    one of them cannot read it, or when it is of another model.
    """
    saved = read_state(checkpoint)
    with refused(f"{checkpoint} cannot be loaded"):
        agree(lambda: _fill(checkpoint, engine, ema, saved, world))
    publish_master(engine)  # the model computes with rounded copies, which still are the initial values
    restore_counters(engine, saved)
    if saved["topology"]["world_size"] == world.size and (rng := _rng_tensors(checkpoint / rank_file(world.rank))):
        restore_rng(rng)
    since_report = saved["step"] % saved["config"]["train"]["log_every"]  # in checkpoints that do not say it
    return TrainState(
        step=saved["step"], data=DataState(**saved["data"]), interval_loss=saved["interval_loss"],
        interval_steps=saved.get("interval_steps", since_report),
    )  # fmt: skip


@torch.no_grad()
def _fill(checkpoint: Path, engine: Any, ema: Ema, saved: dict[str, Any], world: World) -> None:
    there = {entry["name"]: entry["shape"] for entry in saved["parameters"]}
    here = {entry["name"]: entry["shape"] for entry in describe_parameters(engine)}
    for name in sorted(there.keys() | here.keys()):
        old, new = there.get(name, "absent"), here.get(name, "absent")
        require(old == new, f"{checkpoint} is of another model: {name} is {old} there and {new} here")
    # Moments come into being in an optimizer's first step; without this there would be nothing to fill.
    prepare_moments(engine, saved["optimizer"]["moments"], saved["optimizer"]["step"])
    pieces = engine_pieces(engine, ema)
    reader = _reader(checkpoint, pieces, world)
    fill((piece.values, piece.offset, partial(reader.read_into, piece.kind, piece.name)) for piece in pieces)
    reader.close()


@torch.no_grad()
def fill(targets: Iterable[tuple[Tensor, int, Callable[[int, Tensor], None]]]) -> None:
    """Fill flat fp32 tensors of any device: of each its values, where they begin in the full tensor, and a reader.

    The reader fills a flat host tensor with the elements from a start on.
    """
    buffer: Tensor | None = None
    for values, offset, read in targets:
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
    own = checkpoint / rank_file(world.rank)
    if own.exists():
        reader = CheckpointReader(checkpoint, [own])
        if all(reader.holds(piece) for piece in pieces):
            return reader
        reader.close()
    return CheckpointReader(checkpoint)


def _rng_tensors(path: Path) -> dict[str, Tensor]:
    with closing(TensorFile(path)) as file:
        names = [name for name in file.places if name.startswith("rng/")]
        tensors = {name: torch.empty(file.length(name), dtype=torch.uint8) for name in names}
        for name, tensor in tensors.items():
            file.read_into(name, 0, tensor)
    return tensors
