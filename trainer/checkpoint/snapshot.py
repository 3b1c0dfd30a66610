"""What one rank puts into a checkpoint and takes back: pieces, random generators, the content of `state.json`."""

import json
import platform
import random
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from importlib.metadata import version
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.deepspeed_expert import expert_range
from moe.experts import Experts
from trainer.checkpoint.reader import KINDS, Piece
from trainer.checkpoint.state import FORMAT, STATE, SavedCounters, SavedState, Topology, TrainState
from trainer.config import TrainConfig, config_to_dict, require
from trainer.data.latents.samples import LatentInfo
from trainer.engine.ema import Ema
from trainer.engine.optim import decays
from trainer.engine.zero_state import MOMENTS, full_shape, master_pieces, moment_kinds, moment_pieces, optimizer_step
from trainer.files import git_commit

_HYPER_PARAMETERS = ("role", "lr", "weight_decay", "betas", "eps")


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
    packages = ("torch", "deepspeed", "safetensors", "numpy")
    content: dict[str, Any] = {
        "format": FORMAT,
        "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": state.step,
        "interval_loss": state.interval_loss,
        "interval_steps": state.interval_steps,
        "data": asdict(state.data),
        "data_info": asdict(info),  # so that pictures can be drawn where the latents are not
        "topology": asdict(topology),
        "global_batch_size": config.global_batch_size(topology.world_size),
        "engine": {field.name: getattr(engine, field.name) for field in fields(SavedCounters)},
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
    _check_complete(pieces, content["parameters"], engine.device)
    return Snapshot(pieces=pieces, rng=rng_tensors(), content=content)


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
    totals = torch.tensor(counts, device=device)
    torch.distributed.all_reduce(totals)
    for kind, row in zip(KINDS, totals.tolist(), strict=True):
        if kind in MOMENTS and not any(row):  # not every optimizer has both
            continue
        for entry, total in zip(parameters, row, strict=True):
            expected = prod(entry["shape"])
            assert total == expected, f"{kind} {entry['name']}: the ranks hold {total} of {expected} elements"


def restore_counters(engine: Any, saved: SavedState) -> None:
    """Put back the engine's counters and the learning rates of the parameter groups.

    All other hyper-parameters are the configuration's, which may have been changed. The counter of
    micro-batches is set to a step boundary of this run's gradient accumulation.
    """
    for field in fields(SavedCounters):
        setattr(engine, field.name, getattr(saved.engine, field.name))
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    rates = {group.role: group.lr for group in saved.optimizer.groups}
    rates.setdefault("router", rates.get("decay", 0.0))  # a group of their own only by `optim.router_lr_ratio`
    for group in engine.optimizer.param_groups:
        require(group["role"] in rates, f"{STATE} is damaged: it has no parameter group {group['role']}")
        group["lr"] = rates[group["role"]]


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
