"""The fp32 weights of a distributed model put together on every rank, for comparisons of small models."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trainer.distributed import gather
from trainer.engine.zero_state import TensorPiece, master_pieces


def gather_master(engine: Any) -> dict[str, Tensor]:
    """{name: full fp32 tensor, all experts} on every rank, through host memory. Collective.

    Asserts that the pieces of all ranks cover each tensor exactly once.
    """
    mine = [(name, replace(piece, values=piece.values.cpu().clone())) for name, piece in master_pieces(engine)]
    places: dict[tuple[str, int], TensorPiece] = {}  # what is not partitioned is on several ranks, and counts once
    for part in gather(mine):
        places |= {(name, piece.offset): piece for name, piece in part}
    full: dict[str, Tensor] = {}
    missing: dict[str, int] = {}
    for (name, offset), piece in places.items():
        if name not in full:
            full[name] = torch.empty(piece.logical_shape, dtype=torch.float32)
            missing[name] = full[name].numel()
        full[name].view(-1)[offset : offset + piece.values.numel()] = piece.values
        missing[name] -= piece.values.numel()
    assert full and not any(missing.values()), f"the pieces do not cover {[name for name in missing if missing[name]]}"
    return full
