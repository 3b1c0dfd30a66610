"""`state.json`: everything of a checkpoint that is not a tensor, readable by a person and without torch."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt, TypeAdapter

from trainer.checkpoint.members import read_json
from trainer.data.latents.samples import LatentInfo
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


@dataclass(frozen=True, kw_only=True)
class SavedCounters:
    """The engine's own counters."""

    global_steps: NonNegativeInt
    global_samples: NonNegativeInt
    skipped_steps: NonNegativeInt


@dataclass(frozen=True, kw_only=True)
class SavedGroup:
    """Of a parameter group what is restored."""

    role: str
    lr: float


@dataclass(frozen=True, kw_only=True)
class SavedOptimizer:
    """Steps done, which moments the files hold, the parameter groups."""

    step: float
    moments: list[Literal["exp_avg", "exp_avg_sq"]]
    groups: list[SavedGroup]


@dataclass(frozen=True, kw_only=True)
class SavedParameter:
    """Name and full shape of a parameter, all experts included."""

    name: str
    shape: list[NonNegativeInt]


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """What is read of `state.json`; `trainer.checkpoint.snapshot` writes it, and more for people."""

    step: NonNegativeInt
    saved_at: datetime
    interval_loss: float
    interval_steps: NonNegativeInt | None = None
    data: DataState
    data_info: LatentInfo
    topology: Topology
    global_batch_size: PositiveInt
    engine: SavedCounters
    optimizer: SavedOptimizer
    parameters: list[SavedParameter]
    config: dict[str, Any]
    git_commit: str = ""

    def steps_since_report(self) -> int:
        """Steps that `interval_loss` sums; of a checkpoint that does not say it, by its own cadence of reports."""
        since: int = self.step % self.config["train"]["log_every"]
        return since if self.interval_steps is None else self.interval_steps


_ANY, _STATE = TypeAdapter(dict[str, Any]), TypeAdapter(SavedState)


def read_state(checkpoint: Path) -> SavedState:
    """Content of `state.json`; ConfigError if it is damaged, or of a checkpoint that this version cannot read."""
    found = read_json(checkpoint, STATE, _ANY).get("format", 1)
    if found != FORMAT:
        raise ConfigError(f"{checkpoint} has checkpoint format {found!r}, this version reads {FORMAT}: train it anew")
    return read_json(checkpoint, STATE, _STATE)
