"""Exponential moving average of the weights, sharded like the optimizer: no communication to keep it.

Each rank averages the pieces of fp32 master weights that ZeRO left it. Written one file per rank, with the
place of each piece, so that any process can put the whole average together without the training topology.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.config import ConfigError, EmaConfig
from trainer.shards import Shard, assemble, master_shards, publish_master


class Ema:
    """The average over this rank's pieces: `average[name]` is fp32 and flat."""

    def __init__(self, engine: Any, config: EmaConfig) -> None:
        self.config = config
        self.average = {name: shard.values.clone() for name, shard in master_shards(engine)}

    @torch.no_grad()
    def update(self, engine: Any, step: int) -> None:
        """Move the average towards the weights after optimizer step number `step` (from 1)."""
        decay = min(self.config.decay, (1 + step) / (10 + step))
        live = dict(master_shards(engine))
        torch._foreach_lerp_(list(self.average.values()), [live[n].values for n in self.average], 1 - decay)

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
        for name, shard in master_shards(engine):
            weights = shard.values.clone()
            shard.values.copy_(self.average[name])
            self.average[name].copy_(weights)
        publish_master(engine)

    def save(self, engine: Any, path: Path) -> None:
        """Write this rank's pieces and their places."""
        places = {
            name: [shard.start, list(shard.shape), shard.first_expert, shard.num_experts]
            for name, shard in master_shards(engine)
        }
        save_file({n: t.cpu() for n, t in self.average.items()}, path, metadata={"places": json.dumps(places)})

    def load(self, path: Path) -> None:
        """Read the pieces back on the same topology."""
        with safe_open(path, framework="pt") as file:
            for name, tensor in self.average.items():
                tensor.copy_(file.get_tensor(name))


def ema_file(rank: int) -> str:
    """Name of one rank's file inside a checkpoint."""
    return f"ema_rank_{rank:05d}.safetensors"


def read_ema(checkpoint: Path) -> dict[str, Tensor]:
    """Put the whole average together from all ranks' files: {name: full fp32 tensor, all experts}.

    Raises ConfigError when the files do not cover a parameter completely.
    """
    try:
        return assemble(_pieces(checkpoint))
    except ValueError as error:
        raise ConfigError(f"{checkpoint}: EMA files: {error}") from error


def _pieces(checkpoint: Path) -> Iterator[tuple[str, Shard]]:
    for path in sorted(checkpoint.glob("ema_rank_*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name, (start, shape, first_expert, num_experts) in json.loads(file.metadata()["places"]).items():
                values = file.get_tensor(name)
                yield (
                    name,
                    Shard(
                        values=values,
                        start=start,
                        shape=tuple(shape),
                        first_expert=first_expert,
                        num_experts=num_experts,
                    ),
                )
