"""Small checkpoints without a training run: made-up tensors in ZeRO's real pieces, written by the real code."""

import json
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from checkpoint_layout import layout_places
from torch import Tensor

from trainer.checkpoint.folder import checkpoint_dir, publish, temporary_dir, write_durable, write_manifest
from trainer.checkpoint.reader import KINDS, Piece, rank_file, write_pieces
from trainer.checkpoint.state import FORMAT, Topology
from trainer.config import TrainConfig, TrainLoopConfig, config_to_dict
from trainer.data.latents.samples import LatentInfo
from trainer.diffusion.model import EcDit, ModelShape

TOPOLOGY = Topology(world_size=4, ep_size=2, zero_stage=3)
PARAMETERS: list[dict[str, Any]] = [
    {"name": "embed.weight", "shape": [6, 5], "decays": True, "expert": False},
    {"name": "embed.bias", "shape": [5], "decays": False, "expert": False},
    {"name": "mlp.experts.w1", "shape": [8, 3, 7], "decays": True, "expert": True},
    {"name": "mlp.experts.w3", "shape": [8, 1, 3], "decays": False, "expert": True},
    {"name": "scale", "shape": [1], "decays": False, "expert": False},
    {"name": "out.weight", "shape": [3, 11], "decays": True, "expert": False},
]


INFO = LatentInfo(
    channels=3, height=8, width=8, text_dim=384, max_tokens=24, codec="pixel", text_encoder="minilm",
    fingerprint="same", mean=[0.1] * 3, std=[0.5] * 3,
)  # fmt: skip


def sample_config(run_dir: Path, **train: Any) -> TrainConfig:
    return replace(TrainConfig(), run_dir=str(run_dir), train=TrainLoopConfig(**train))


def sample_tensor(kind: str, name: str, step: int) -> Tensor:
    shape = next(entry["shape"] for entry in PARAMETERS if entry["name"] == name)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{kind} {name} {step}".encode()))
    return torch.randn(shape, generator=generator)


def sample_pieces(topology: Topology, rank: int, step: int) -> list[Piece]:
    shapes = {entry["name"]: tuple(entry["shape"]) for entry in PARAMETERS}
    return [
        Piece(
            kind=kind, name=place.name, offset=place.offset, shape=shapes[place.name],
            values=sample_tensor(kind, place.name, step).flatten()[place.offset : place.offset + place.length],
        )
        for kind in KINDS
        for place in layout_places(PARAMETERS, topology)[rank]
    ]  # fmt: skip


def sample_state(topology: Topology, step: int, config: TrainConfig, info: LatentInfo = INFO) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "saved_at": "2030-01-02T03:04:05+00:00",
        "step": step,
        "interval_loss": 0.0,
        "data": {"seed": 0, "epoch": 0, "consumed": 0, "samples_seen": 0},
        "engine": {"global_steps": step, "global_samples": step, "skipped_steps": 0},
        "optimizer": {"step": step, "moments": ["exp_avg", "exp_avg_sq"], "groups": []},
        "topology": asdict(topology),
        "global_batch_size": config.global_batch_size(topology.world_size),
        "data_info": asdict(info),
        "parameters": PARAMETERS,
        "config": config_to_dict(config),
    }


def write_sample(
    run_dir: Path, step: int, topology: Topology = TOPOLOGY, config: TrainConfig | None = None, info: LatentInfo = INFO
) -> Path:
    """A checkpoint of all ranks, without a process group."""
    config = config or sample_config(run_dir)
    final = checkpoint_dir(run_dir, step)
    temporary = temporary_dir(final)
    temporary.mkdir(parents=True)
    files = {
        rank_file(rank): write_pieces(temporary / rank_file(rank), sample_pieces(topology, rank, step), {})
        for rank in range(topology.world_size)
    }
    files["state.json"] = write_durable(
        temporary / "state.json", json.dumps(sample_state(topology, step, config, info))
    )
    write_manifest(temporary, files)
    publish(temporary, final)
    return final


def model_tensors(config: TrainConfig, info: LatentInfo, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a real model, none of them zero, small enough that its output stays near 1."""
    shape = ModelShape.of(info)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.5 * value.shape[-1] ** -0.5 * torch.randn(value.shape, generator=generator)
        for name, value in EcDit(config.model, config.moe, shape).named_parameters()
    }


def write_checkpoint(
    run_dir: Path, config: TrainConfig, info: LatentInfo, tensors: dict[str, dict[str, Tensor]], step: int = 3
) -> Path:
    """A checkpoint of given tensors, {kind: {name: full tensor}}, in the pieces of `TOPOLOGY`."""
    parameters = [
        {"name": name, "shape": list(value.shape), "decays": value.ndim > 1, "expert": ".experts." in name}
        for name, value in next(iter(tensors.values())).items()
    ]
    final = checkpoint_dir(run_dir, step)
    temporary = temporary_dir(final)
    temporary.mkdir(parents=True)
    files = {}
    for rank, places in enumerate(layout_places(parameters, TOPOLOGY)):
        pieces = [
            Piece(
                kind=kind, name=place.name, offset=place.offset, shape=tuple(values[place.name].shape),
                values=values[place.name].flatten()[place.offset : place.offset + place.length],
            )
            for kind, values in tensors.items()
            for place in places
        ]  # fmt: skip
        files[rank_file(rank)] = write_pieces(temporary / rank_file(rank), pieces, {})
    state = sample_state(TOPOLOGY, step, config, info) | {"parameters": parameters}
    files["state.json"] = write_durable(temporary / "state.json", json.dumps(state))
    write_manifest(temporary, files)
    publish(temporary, final)
    return final
