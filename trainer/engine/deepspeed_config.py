"""The native DeepSpeed JSON: its "auto" values are filled from the YAML, everything else is the user's.

DeepSpeed itself drops an unresolved "auto" and uses a default of its own; here that is an error, as is a
value that contradicts the YAML.
"""

import json
from pathlib import Path
from typing import Any

from trainer.config import ConfigError, TrainConfig, leaves, require

REPOSITORY = Path(__file__).parent.parent.parent


def _read_json(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file, relative to the working folder or to the repository."""
    found = next((p for p in (Path(path), REPOSITORY / path) if p.is_file()), None)
    if found is None:
        raise ConfigError(f"parallel.deepspeed_config={path}: no such file")
    try:
        content = json.loads(found.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"parallel.deepspeed_config={path} is not strict JSON: {error}") from error
    require(isinstance(content, dict), f"parallel.deepspeed_config={path}: expected a JSON object")
    return dict(content)


def load_deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """The resolved DeepSpeed configuration; ConfigError on conflicts, leftovers and unsupported stages."""
    path = config.parallel.deepspeed_config
    content = _read_json(path)
    loop = config.train
    batch_settings = "train.micro_batch_size * train.gradient_accumulation_steps * processes"
    for key, setting, value in (
        ("train_micro_batch_size_per_gpu", "train.micro_batch_size", loop.micro_batch_size),
        ("gradient_accumulation_steps", "train.gradient_accumulation_steps", loop.gradient_accumulation_steps),
        ("train_batch_size", batch_settings, config.global_batch_size(world_size)),
        ("gradient_clipping", "optim.max_grad_norm", config.optim.max_grad_norm),
        ("bf16.enabled", "train.precision", loop.precision == "bf16"),
    ):
        section, _, leaf = key.rpartition(".")
        owner = content.setdefault(section, {}) if section else content
        given = owner.get(leaf, "auto")
        require(
            given == "auto" or given == value,
            f'{path}: {key} is {given!r} but {setting} gives {value!r}: write "auto" there, or make them agree',
        )
        owner[leaf] = value
    for name in ("optimizer", "scheduler"):
        require(name not in content, f"{path}: {name} belongs in the YAML (optim.*): remove it")
    _check_guard(path, content)
    leftovers = [key for key, value in leaves(content).items() if value == "auto"]
    require(not leftovers, f'{path}: {", ".join(leftovers)} is "auto", but nothing here fills it: write a value')
    stage = content.get("zero_optimization", {}).get("stage", 0)
    require(
        stage in (1, 2, 3),
        f"{path}: zero_optimization.stage is {stage}: use 1, 2 or 3 (at stage 0 DeepSpeed clips expert-parallel "
        "gradients by a wrong global norm)",
    )
    _check_offload(path, content)
    return content


def _check_offload(path: str, content: dict[str, Any]) -> None:
    """The average and checkpoints read the optimizer's state where it is: all of it in memory, in one optimizer."""
    offload = content["zero_optimization"].get("offload_optimizer", {})
    for leaf, allowed, default in (("device", ("none", "cpu"), "none"), ("ratio", (1, 1.0), 1.0)):
        value = offload.get(leaf, default)
        require(
            value in allowed,
            f"{path}: zero_optimization.offload_optimizer.{leaf} is {value!r}, which keeps optimizer state where the "
            f"EMA and checkpoints cannot read it: use {allowed[-1]!r}",
        )


def _check_guard(path: str, content: dict[str, Any]) -> None:
    """Refuse what would blind the guard against non-finite steps (trainer/loop/step.py), or skip steps by itself."""
    for section, leaf in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        require(
            content.get(section, {}).get(leaf, True) is True,
            f"{path}: {section}.{leaf} is off, but non-finite steps are skipped by what it computes: remove it",
        )
    require(
        not content.get("fp16", {}).get("enabled", False),
        f"{path}: fp16 is on, whose loss scaling skips steps of its own: use train.precision=bf16",
    )


def zero_stage(deepspeed_config: dict[str, Any]) -> int:
    """ZeRO stage of a resolved configuration."""
    return int(deepspeed_config["zero_optimization"]["stage"])
