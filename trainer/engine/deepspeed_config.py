"""The native DeepSpeed JSON: its "auto" values are filled from the YAML, everything else is the user's.

DeepSpeed itself drops an unresolved "auto" and uses a default of its own; here that is an error, as is a
value that contradicts the YAML.
"""

import difflib
import json
from functools import partial
from pathlib import Path
from typing import Any

from trainer.config import ConfigError, TrainConfig, leaves, require

REPOSITORY = Path(__file__).parent.parent.parent
# What DeepSpeed 0.19.8 reads at the top of its JSON; it passes over anything else in silence.
KNOWN_KEYS = tuple(
    """
    activation_checkpointing aio amp autotuning bf16 checkpoint comet comms_logger communication_data_type compile
    compression_training csv_monitor curriculum_learning data_efficiency data_types dataloader_drop_last datastates_ckpt
    disable_allgather disable_python_gc dump_state eigenvalue elasticity expert_parallel flops_profiler fp16
    gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor graph_harvesting
    hybrid_engine log_level managed_gradient_accumulation memory_breakdown nebula optimizer pipeline prescale_gradients
    progressive_layer_drop quantize_training scheduler seq_parallel_communication_data_type sparse_attention
    sparse_gradients steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size
    train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb
    weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
    """.split()
)
DEFAULT_LIVE = 1_000_000_000  # DeepSpeed's own stage3_max_live_parameters
SECTIONS = ("bf16", "fp16", "data_types", "zero_optimization")  # those that are looked into below


def _read_json(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file, relative to the working folder or to the repository."""
    found = next((p for p in (Path(path), REPOSITORY / path) if p.is_file()), None)
    if found is None:
        raise ConfigError(f"parallel.deepspeed_config={path}: no such file")
    try:
        content = json.loads(found.read_text())
    except ValueError as error:  # also of what is not UTF-8
        raise ConfigError(f"parallel.deepspeed_config={path} is not strict JSON: {error}") from error
    require(isinstance(content, dict), f"parallel.deepspeed_config={path}: expected a JSON object")
    for key in content:
        close = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
        hint = f"did you mean {close[0]}?" if close else "DeepSpeed has no such setting, so remove it"
        require(key in KNOWN_KEYS, f"{path}: unknown key {key}; {hint}")
    for key in SECTIONS:
        given = content.get(key, {})
        require(isinstance(given, dict), f"{path}: {key} is {given!r}: it is a section with keys of its own")
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
    _fill_accumulation(path, content, config)
    _fill_prefetch(content, config)
    leftovers = [key for key, value in leaves(content).items() if value == "auto"]
    require(not leftovers, f'{path}: {", ".join(leftovers)} is "auto", but nothing here fills it: write a value')
    stage = content.get("zero_optimization", {}).get("stage", 0)
    require(
        stage in (1, 2, 3),
        f"{path}: zero_optimization.stage is {stage}: use 1, 2 or 3 (at stage 0 DeepSpeed clips expert-parallel "
        "gradients by a wrong global norm)",
    )
    _check_offload(path, content)
    _check_zero(path, content["zero_optimization"])
    return content


def accumulation_dtype(precision: str, num_micro_batches: int) -> str:
    """In what gradients are summed: several in fp32, as bf16 drops what is below 1/256 of the sum so far.

    A single one is not summed, so it stays in the precision that it was computed in, and takes no memory more.
    """
    return "fp32" if precision == "fp32" or num_micro_batches > 1 else "bf16"


def _fill_accumulation(path: str, content: dict[str, Any], config: TrainConfig) -> None:
    loop, owner = config.train, content.setdefault("data_types", {})
    if owner.get("grad_accum_dtype", "auto") in ("auto", None):
        owner["grad_accum_dtype"] = accumulation_dtype(loop.precision, loop.gradient_accumulation_steps)
    given, allowed = owner["grad_accum_dtype"], ("fp32",) if loop.precision == "fp32" else ("bf16", "fp32")
    require(
        given in allowed,
        f"{path}: data_types.grad_accum_dtype is {given!r}: with train.precision={loop.precision} use "
        f'{" or ".join(allowed)}, or "auto"',
    )


def largest_block(config: TrainConfig) -> int:
    """Parameters of the largest block that a rank gathers: of an MoE block its own experts only."""
    import torch  # here, as --help must not wait for it

    from moe.layer import MoeLayer
    from trainer.diffusion.model import DitBlock

    moe, size = config.moe, config.model
    kinds = {moe.has_moe(layer) for layer in range(size.num_layers)}
    build = partial(MoeLayer, moe, dim=size.dim, hidden_dim=size.mlp_ratio * size.dim)
    with torch.device("meta"):
        blocks = [DitBlock(size, build if has_moe else None) for has_moe in kinds]
    ep_size = config.parallel.ep_size
    return max(
        sum(p.numel() // (ep_size if ".experts." in name else 1) for name, p in block.named_parameters())
        for block in blocks
    )


def _fill_prefetch(content: dict[str, Any], config: TrainConfig) -> None:
    """Stage 3 gathers a whole block ahead: of less, the rest is gathered only when the block waits for it.

    DeepSpeed gathers ahead no more than its limit of live parameters leaves beside the block that computes.
    """
    zero = content.get("zero_optimization", {})
    names = "stage3_prefetch_bucket_size", "stage3_max_live_parameters"
    if "auto" in [zero.get(name) for name in names]:
        block = largest_block(config)
        for name, value in zip(names, (block, max(DEFAULT_LIVE, 2 * block)), strict=True):
            if zero.get(name) == "auto":
                zero[name] = value


def _check_zero(path: str, content: dict[str, Any]) -> None:
    """Unknown names and wrong values below zero_optimization, by DeepSpeed's own model of it."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # here, as importing it takes seconds
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**content)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise ConfigError(f"{path}: {name} is {first['input']!r}: {first['msg']}") from error


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
