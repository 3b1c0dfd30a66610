"""Exponential moving average of the weights, in pieces like the optimizer's state: no communication to keep it.

Each rank averages the pieces of fp32 master weights that ZeRO left it. Checkpoints keep the pieces with their
places, so that any topology can go on with them, and any process can put the whole average together.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainer.config import EmaConfig
from trainer.engine.zero_state import copy_masters, flat_masters, master_pieces, publish_master


class Ema:
    """The average over this rank's pieces: `average[name]` is fp32 and flat, a view of a copy of ZeRO's tensors."""

    def __init__(self, engine: Any, config: EmaConfig) -> None:
        self.config = config
        self.flats, self.average = copy_masters(engine)

    @torch.no_grad()
    def update(self, engine: Any, step: int) -> None:
        """Move the average towards the weights after optimizer step number `step` (from 1)."""
        # A young average would be mostly initial weights: so at first it forgets faster.
        decay = min(self.config.decay, (1 + step) / (10 + step))
        # Whole flat tensors: to go through hundreds of pieces by name takes the host a tenth of a step.
        torch._foreach_lerp_(self.flats, [flat.detach() for flat in flat_masters(engine)], 1 - decay)

    @contextmanager
    def swapped(self, engine: Any) -> Iterator[None]:
        """Inside, the engine computes with the average; afterwards with exactly its own weights again."""
        self._exchange(engine)
        try:
            yield
        finally:
            self._exchange(engine)

    @torch.no_grad()
    def _exchange(self, engine: Any) -> None:
        # Piece by piece, so that beside weights and average only one piece more takes memory.
        for name, piece in master_pieces(engine):
            weights = piece.values.clone()
            piece.values.copy_(self.average[name])
            self.average[name].copy_(weights)
        publish_master(engine)
