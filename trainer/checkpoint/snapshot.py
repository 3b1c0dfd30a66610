"""What one rank puts into a checkpoint: its pieces of the state, and its random generators."""

import json
import random
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.checkpoint.reader import KINDS, Piece
from trainer.checkpoint.state import Topology, TrainState, describe
from trainer.config import TrainConfig
from trainer.data.latents.samples import LatentInfo
from trainer.distributed import all_reduce_sum
from trainer.engine.ema import Ema
from trainer.engine.zero_state import MOMENTS, master_pieces, moment_pieces


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
    pieces = engine_pieces(engine, ema)  # views, not copies: a save for which training waits needs no memory
    content = describe(engine, state, config, topology, info)
    _check_complete(pieces, content["parameters"], engine.device)
    return Snapshot(pieces=pieces, rng=rng_tensors(), content=content)


def engine_pieces(engine: Any, ema: Ema) -> list[Piece]:
    """This rank's pieces of weights, average and moments: live views, in the order of the file."""
    found = [("weight", name, piece) for name, piece in master_pieces(engine)]
    found += [("ema", name, replace(piece, values=ema.average[name])) for _, name, piece in found]
    found += moment_pieces(engine)
    return [Piece(kind=k, name=n, offset=p.offset, shape=p.logical_shape, values=p.values) for k, n, p in found]


def _check_complete(pieces: list[Piece], parameters: list[dict[str, Any]], device: torch.device) -> None:
    """Assert that the pieces of all ranks make up each tensor: ZeRO left nothing out. Collective."""
    held = {(piece.kind, piece.name): piece.values.numel() for piece in pieces}
    counts = [[held.get((kind, entry["name"]), 0) for entry in parameters] for kind in KINDS]
    totals = all_reduce_sum(torch.tensor(counts, device=device)).tolist()
    for kind, row in zip(KINDS, totals, strict=True):
        if kind in MOMENTS and not any(row):  # not every optimizer has both
            continue
        for entry, total in zip(parameters, row, strict=True):
            expected = prod(entry["shape"])
            assert total == expected, f"{kind} {entry['name']}: the ranks hold {total} of {expected} elements"


def rng_tensors() -> dict[str, Tensor]:
    """{entry: uint8 tensor}: states of torch's generators (host and this process's GPU), numpy's and Python's.

    Training draws from generators keyed by seed and sample, so these matter only to what a user adds.
    """
    kind, keys, *rest = np.random.get_state(legacy=True)
    tensors = {
        "rng/torch": torch.get_rng_state(),
        "rng/python": _packed(random.getstate()),
        "rng/numpy": _packed([kind, np.asarray(keys).tolist(), *rest]),
    }
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_rng(tensors: dict[str, Tensor]) -> None:
    """Inverse of `rng_tensors`, for the entries that are there."""
    torch.set_rng_state(tensors["rng/torch"])
    version, internal, gauss = json.loads(tensors["rng/python"].numpy().tobytes())
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(json.loads(tensors["rng/numpy"].numpy().tobytes())))
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])


def _packed(content: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
