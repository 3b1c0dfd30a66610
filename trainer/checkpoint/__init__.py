"""Checkpoints that are whole or absent: DeepSpeed's ZeRO shards, EMA shards, state and a manifest.

`RUN/checkpoints/step_00000010/` is written as `step_00000010.tmp`, hashed, flushed to disk and renamed;
then the pointer `latest` is replaced. Readers take the newest whole one.
"""

import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trainer.config import ConfigError, TrainConfig, config_to_dict, require
from trainer.data.dataset import DataState, LatentInfo
from trainer.distributed import World, barrier
from trainer.ema import Ema, ema_file

MANIFEST = "MANIFEST.json"
STATE = "state.json"
logger = logging.getLogger("ec_dit")


@dataclass(frozen=True, kw_only=True)
class Topology:
    """What the sharded files depend on."""

    world_size: int
    ep_size: int
    zero_stage: int


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything a resumed run needs besides weights and optimizer.

    `step` optimizer steps are done; `interval_loss` sums the losses since the last logged step.
    """

    step: int
    data: DataState
    interval_loss: float = 0.0


def checkpoint_dir(run_dir: str | Path, step: int) -> Path:
    """Folder of the checkpoint after optimizer step `step`."""
    return Path(run_dir) / "checkpoints" / f"step_{step:08d}"


def save_checkpoint(
    engine: Any, ema: Ema, state: TrainState, config: TrainConfig, topology: Topology, info: LatentInfo, world: World
) -> Path:
    """Write one checkpoint and prune old ones. Collective over all ranks."""
    final = checkpoint_dir(config.run_dir, state.step)
    temporary = final.with_suffix(".tmp")
    if world.is_main:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    barrier()
    engine.save_checkpoint(str(temporary.parent), tag=temporary.name, save_latest=False)
    for script in ("zero_to_fp32.py", "zero_to_torch.py") if world.is_main else ():
        (temporary.parent / script).unlink(missing_ok=True)  # they refuse expert-parallel shards
    ema.save(engine, temporary / ema_file(world.rank))
    if world.is_main:
        _write_json(temporary / STATE, _describe(state, config, topology, info))
    barrier()
    _write_manifest(temporary, world)
    if world.is_main:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _flush(final.parent)
        pointer = final.parent / "latest.tmp"
        pointer.write_text(final.name + "\n")
        os.replace(pointer, final.parent / "latest")
        _prune(final.parent, config.train.keep_checkpoints)
    barrier()
    return final


def _describe(state: TrainState, config: TrainConfig, topology: Topology, info: LatentInfo) -> dict[str, Any]:
    packages = ("torch", "deepspeed", "safetensors", "numpy")
    return {
        "step": state.step,
        "interval_loss": state.interval_loss,
        "data": state.data.to_dict(),
        "data_info": asdict(info),  # so that pictures can be drawn where the latents are not
        "topology": asdict(topology),
        "global_batch_size": config.global_batch_size(topology.world_size),
        "config": config_to_dict(config),
        "git_commit": git_commit(),
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
    }


def git_commit() -> str:
    """Commit of the source tree, empty outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(folder: Path, world: World) -> None:
    """Size and checksum of each file; the ranks share the hashing. Collective."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    mine = {}
    for path in files[world.rank :: world.size]:
        mine[str(path.relative_to(folder))] = {"size": path.stat().st_size, "sha256": _sha256(path)}
        _flush(path)
    parts: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(parts, mine)
    if world.is_main:
        _write_json(folder / MANIFEST, {k: v for part in parts for k, v in sorted(part.items())})
        _flush(folder / MANIFEST)
        _flush(folder)


def _prune(folder: Path, keep: int) -> None:
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders in order of their step; unfinished `.tmp` ones are not among them."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir() and not p.suffix)


def fault(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, in a few words; empty if it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError):
        return f"{MANIFEST} is missing or unreadable"
    for name, expected in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
        if _sha256(path) != expected["sha256"]:
            return f"{name} has a wrong checksum"
    return "" if STATE in manifest else f"{STATE} is missing"


def newest_whole(folders: Iterable[Path]) -> Path | None:
    """The last whole checkpoint of a list; broken ones that it passes over are logged."""
    for path in reversed(list(folders)):
        problem = fault(path)
        if not problem:
            return path
        logger.warning("passed over checkpoint %s: %s", path, problem)
    return None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a user names: a step folder, or a run folder (its newest whole one)."""
    require(path.is_dir(), f"{path}: no such run folder or checkpoint")
    if (path / STATE).is_file():
        problem = fault(path)
        require(not problem, f"{path} is not whole: {problem}")
        return path
    found = newest_whole(list_checkpoints(path / "checkpoints"))
    if found is None:
        raise ConfigError(f"{path} has no whole checkpoint in {path / 'checkpoints'}: is it the folder of a run?")
    return found


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Content of `state.json`."""
    return dict(json.loads((checkpoint / STATE).read_text()))


def check_resumable(checkpoint: Path, config: TrainConfig, topology: Topology, fingerprint: str) -> None:
    """Refuse a checkpoint that this configuration cannot continue, naming the first difference."""
    saved = read_state(checkpoint)
    for name, value in asdict(topology).items():
        old = saved["topology"][name]
        require(old == value, f"{checkpoint} was written with {name} {old}, this run has {name} {value}: use {old}")
    old_batch, batch = saved["global_batch_size"], config.global_batch_size(topology.world_size)
    require(
        old_batch == batch,
        f"{checkpoint} was trained with a global batch of {old_batch}, this run has {batch}: adapt "
        "train.micro_batch_size or train.gradient_accumulation_steps, or start a new run_dir",
    )
    now = config_to_dict(config)
    for key in ("seed", "model", "moe", "train.precision", "optim.name", "data.caption_dropout"):
        old, new = _pick(saved["config"], key), _pick(now, key)
        if isinstance(new, dict):
            key, old, new = next(((f"{key}.{k}", old[k], new[k]) for k in new if old[k] != new[k]), (key, 0, 0))
        require(old == new, f"{key} is {new} but {checkpoint} was trained with {old}: restore it, or use a new run_dir")
    require(
        saved["data_info"]["fingerprint"] == fingerprint,
        f"data.latents={config.data.latents} is not the data set that {checkpoint} was trained on: restore it, "
        "or use a new run_dir",
    )


def _pick(content: dict[str, Any], key: str) -> Any:
    value: Any = content
    for part in key.split("."):
        value = value[part]
    return value


def load_checkpoint(checkpoint: Path, engine: Any, ema: Ema, world: World) -> TrainState:
    """Restore weights, optimizer and EMA on the topology that wrote them. Collective."""
    engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    ema.load(checkpoint / ema_file(world.rank))
    saved = read_state(checkpoint)
    return TrainState(step=saved["step"], data=DataState.from_dict(saved["data"]), interval_loss=saved["interval_loss"])
