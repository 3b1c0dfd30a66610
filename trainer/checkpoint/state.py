"""`state.json`: everything of a checkpoint that is not a tensor, readable by a person and without torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.position import DataState
from trainer.errors import ConfigError

STATE = "state.json"
FORMAT = 3  # of 2 the weights meant another pairing of channels in the rotary embedding


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How the state is divided: processes in all, how many share the experts of a layer, and the ZeRO stage."""

    world_size: int
    ep_size: int
    zero_stage: int

    def __str__(self) -> str:
        return f"{self.world_size} processes, ep_size {self.ep_size}, ZeRO {self.zero_stage}"


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything a resumed run needs besides weights and optimizer.

    `step` optimizer steps are done; `interval_loss` sums the losses of the `interval_steps` since the last logged one.
    """

    step: int
    data: DataState
    interval_loss: float = 0.0
    interval_steps: int = 0


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Content of `state.json`; ConfigError if this version cannot read the checkpoint."""
    content = dict(json.loads((checkpoint / STATE).read_text()))
    found = content.get("format", 1)
    if found != FORMAT:
        raise ConfigError(f"{checkpoint} has checkpoint format {found}, this version reads {FORMAT}: train it anew")
    return content
