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


def role_of(name: str, parameter: nn.Parameter, config: OptimConfig) -> str:
    """Which parameters share their hyper-parameters, the same on any topology: `decay`, `no_decay`, or `router`.

    Routers are a group of their own only where their learning rate is.
    """
    if config.router_lr_ratio != 1 and name.endswith(".router.weight"):
        return "router"
    return "decay" if decays(name, parameter) else "no_decay"


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or plain SGD over groups by (role, expert); those of experts carry what ZeRO 1 and 2 look for."""
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        members.setdefault((role_of(name, parameter, config), is_expert_parameter(parameter)), []).append(parameter)
    groups: list[dict[str, Any]] = []
    order = ("no_decay", "decay", "router")
    for (role, _), parameters in sorted(members.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        group: dict[str, Any] = {
            "params": parameters,
            "weight_decay": 0.0 if role == "no_decay" else config.weight_decay,
            "role": role,
            "lr_ratio": config.router_lr_ratio if role == "router" else 1.0,
        }
        groups.append(group | optimizer_group_keys(parameters[0]))
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Give all groups the rate of a step, or their share of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]


def learning_rate(step: int, config: OptimConfig, max_steps: int) -> float:
    """Rate of optimizer step number `step` (from 0): linear warm-up, then constant or a half cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    ratio = config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * ratio
