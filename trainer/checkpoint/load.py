"""Reading a checkpoint into an engine of any topology: each rank reads the ranges that ZeRO gives it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.agree import CheckpointError, agree
from trainer.checkpoint.reader import CheckpointReader, rank_file
from trainer.checkpoint.rng import restore_rng
from trainer.checkpoint.save import engine_pieces
from trainer.checkpoint.state import TrainState, read_state, restore_counters
from trainer.checkpoint.tensorfile import CHUNK_BYTES, TensorFile
from trainer.config import ConfigError, require
from trainer.data.dataset import DataState
from trainer.distributed import World
from trainer.ema import Ema
from trainer.shards import MOMENTS, prepare_moments, publish_master


def load_checkpoint(checkpoint: Path, engine: Any, ema: Ema, world: World) -> TrainState:
    """Restore weights, optimizer, EMA and counters, on the topology that wrote them or any other. Collective.

    On the same number of processes the random generators are restored too. Raises ConfigError on all ranks when
    one of them cannot read it, or when it is of another model.
    """
    saved = read_state(checkpoint)
    try:
        agree(lambda: _fill(checkpoint, engine, ema, saved))
    except CheckpointError as error:
        if not error.environment:
            raise
        raise ConfigError(f"{checkpoint} cannot be loaded: {error}") from error
    publish_master(engine)
    restore_counters(engine, saved)
    if saved["topology"]["world_size"] == world.size and (rng := _rng_tensors(checkpoint / rank_file(world.rank))):
        restore_rng(rng)
    return TrainState(step=saved["step"], data=DataState.from_dict(saved["data"]), interval_loss=saved["interval_loss"])


@torch.no_grad()
def _fill(checkpoint: Path, engine: Any, ema: Ema, saved: dict[str, Any]) -> None:
    reader = CheckpointReader(checkpoint)
    expected = sorted(name for name, _ in engine.module.named_parameters())
    require(reader.names("weight") == expected, f"{checkpoint} holds the parameters of another model")
    prepare_moments(engine, [kind for kind in MOMENTS if reader.names(kind)], saved["optimizer"]["step"])
    buffer: Tensor | None = None
    for piece in engine_pieces(engine, ema):
        require(
            reader.shape(piece.name) == piece.shape,
            f"{checkpoint}: {piece.name} has shape {reader.shape(piece.name)}, the model's is {piece.shape}",
        )
        if piece.values.device.type == "cpu":
            reader.read_into(piece.kind, piece.name, piece.offset, piece.values)
            continue
        if buffer is None:
            buffer = torch.empty(CHUNK_BYTES // 4, dtype=torch.float32, pin_memory=True)
        for start in range(0, piece.values.numel(), buffer.numel()):
            part = piece.values[start : start + buffer.numel()]
            reader.read_into(piece.kind, piece.name, piece.offset + start, buffer[: part.numel()])
            part.copy_(buffer[: part.numel()])
    reader.close()


def _rng_tensors(path: Path) -> dict[str, Tensor]:
    file = TensorFile(path)
    tensors = {}
    for name, (length, _) in file.tensors.items():
        if name.startswith("rng/"):
            tensors[name] = torch.empty(length, dtype=torch.uint8)
            file.read_into(name, 0, tensors[name])
    file.close()
    return tensors
