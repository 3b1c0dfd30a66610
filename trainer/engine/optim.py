"""Parameter groups, the optimizer and the learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from moe.deepspeed_expert import is_expert_parameter, optimizer_group_keys
from trainer.config import OptimConfig


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay acts on matrices; norm scales, biases and modulation offsets are left alone."""
    num_axes = len(getattr(parameter, "ds_shape", parameter.shape))
    return num_axes >= 2 and not name.endswith(("bias", "modulation", ".w3"))


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or plain SGD over groups by (decay, expert); those of experts carry what ZeRO 1 and 2 look for."""
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        members.setdefault((decays(name, parameter), is_expert_parameter(parameter)), []).append(parameter)
    groups: list[dict[str, Any]] = []
    for (decay, _), parameters in sorted(members.items(), key=lambda item: item[0]):
        group: dict[str, Any] = {
            "params": parameters,
            "weight_decay": config.weight_decay if decay else 0.0,
            "role": "decay" if decay else "no_decay",  # the same on any topology
        }
        groups.append(group | optimizer_group_keys(parameters[0]))
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.eps, fused=True)


def learning_rate(step: int, config: OptimConfig, max_steps: int) -> float:
    """Rate of optimizer step number `step` (from 0): linear warm-up, then constant or a half cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    ratio = config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * ratio
