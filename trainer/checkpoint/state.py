"""`state.json`: everything of a checkpoint that is not a tensor, readable by a person and without torch."""

import json
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moe.deepspeed_expert import expert_range
from moe.experts import Experts
from trainer.config import ConfigError, TrainConfig, config_to_dict
from trainer.data.latents.samples import LatentInfo
from trainer.data.position import DataState
from trainer.engine.optim import decays
from trainer.engine.zero_state import full_shape, moment_kinds, optimizer_step
from trainer.files import git_commit

STATE = "state.json"
FORMAT = 3  # of 2 the weights meant another pairing of channels in the rotary embedding
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_HYPER_PARAMETERS = ("role", "lr", "weight_decay", "betas", "eps")


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


def describe(
    engine: Any, state: TrainState, config: TrainConfig, topology: Topology, info: LatentInfo
) -> dict[str, Any]:
    """The content of `state.json`."""
    packages = ("torch", "deepspeed", "safetensors", "numpy")
    return {
        "format": FORMAT,
        "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": state.step,
        "interval_loss": state.interval_loss,
        "interval_steps": state.interval_steps,
        "data": state.data.to_dict(),
        "data_info": asdict(info),  # so that pictures can be drawn where the latents are not
        "topology": asdict(topology),
        "global_batch_size": config.global_batch_size(topology.world_size),
        "engine": {name: getattr(engine, name) for name in _COUNTERS},
        "optimizer": {
            "step": optimizer_step(engine),
            "moments": moment_kinds(engine),
            "groups": group_settings(engine),
        },
        "parameters": describe_parameters(engine),
        "config": config_to_dict(config),
        "git_commit": git_commit(),
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
    }


def group_settings(engine: Any) -> list[dict[str, Any]]:
    """The hyper-parameters of each parameter group."""
    return [{key: group[key] for key in _HYPER_PARAMETERS if key in group} for group in engine.optimizer.param_groups]


def describe_parameters(engine: Any) -> list[dict[str, Any]]:
    """Name, full shape, weight decay and kind of each parameter, in the model's order; ZeRO divides them by these."""
    content = []
    for name, parameter in engine.module.named_parameters():
        _, num_experts = expert_range(parameter)
        shape = full_shape(parameter)
        logical = [num_experts, *shape[1:]] if num_experts else list(shape)
        expert = isinstance(engine.module.get_submodule(name.rpartition(".")[0]), Experts)
        content.append({"name": name, "shape": logical, "decays": decays(name, parameter), "expert": expert})
    return content


def restore_counters(engine: Any, saved: dict[str, Any]) -> None:
    """Put back the engine's counters and the learning rates of the parameter groups.

    All other hyper-parameters are the configuration's, which may have been changed. The counter of
    micro-batches is set to a step boundary of this run's gradient accumulation.
    """
    for name in _COUNTERS:
        setattr(engine, name, saved["engine"][name])
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    rates = {group["role"]: group["lr"] for group in saved["optimizer"]["groups"]}
    for group in engine.optimizer.param_groups:
        group["lr"] = rates[group["role"]]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Content of `state.json`; ConfigError if this version cannot read the checkpoint."""
    content = dict(json.loads((checkpoint / STATE).read_text()))
    found = content.get("format", 1)
    if found != FORMAT:
        raise ConfigError(f"{checkpoint} has checkpoint format {found}, this version reads {FORMAT}: train it anew")
    return content
