"""What is planned: a model counted without memory, its data, and one way to lay it out over processes."""

from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any

import torch

from moe.experts import Experts
from trainer.config import TrainConfig
from trainer.diffusion.model import DitBlock, EcDit, ModelShape
from trainer.settings.tokens import num_image_tokens, num_kept_tokens
from trainer.telemetry.flops import training_flops


@dataclass(frozen=True)
class Term:
    """One number with the formula that gave it, in symbols and in figures."""

    name: str
    value: float
    unit: str
    formula: str
    figures: str = ""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Parameters: of all experts, of everything else, of one expert in one layer; activated ones per token.

    Of everything else those of the largest block, outside of blocks (`ends`), and so small that ranks keep them whole.
    """

    experts: int
    rest: int
    one_expert: int
    num_moe: int
    largest_block: int
    ends: int
    persistent: int
    active: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.experts + self.rest


def meta_model(config: TrainConfig, shape: ModelShape) -> EcDit:
    """The model without memory: shapes only, in seconds at any size."""
    with torch.device("meta"):
        return EcDit(config.model, config.moe, shape)


def count_parameters(config: TrainConfig, shape: ModelShape, persistent_below: int = 100_000) -> Counts:
    """Count the model's parameters by building it on the meta device.

    A token activates all that is no expert, and the capacity factor's number of experts in each MoE layer.
    """
    model = meta_model(config, shape)
    experts = sum(p.numel() for m in model.modules() if isinstance(m, Experts) for p in m.parameters())
    total = sum(p.numel() for p in model.parameters())
    num_moe = sum(block.has_moe for block in model.blocks if isinstance(block, DitBlock))
    one = experts // (num_moe * config.moe.num_experts) if num_moe else 0
    in_blocks = [sum(p.numel() for n, p in block.named_parameters() if ".experts." not in n) for block in model.blocks]
    small = [p.numel() for n, p in model.named_parameters() if p.numel() < persistent_below and ".experts." not in n]
    return Counts(
        experts=experts,
        rest=total - experts,
        one_expert=one,
        num_moe=num_moe,
        largest_block=max(in_blocks),
        ends=total - experts - sum(in_blocks),
        persistent=sum(small),
        active=total - experts + round(num_moe * one * config.moe.capacity_factor),
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """A configuration with the shape of its data and the DeepSpeed settings that cost memory."""

    config: TrainConfig
    shape: ModelShape
    text_tokens: int
    zero: dict[str, Any]  # zero_optimization of the DeepSpeed settings
    grad_accum_dtype: str = ""  # data_types.grad_accum_dtype where it is not what the default would be

    @cached_property
    def counts(self) -> Counts:
        """Parameters of the model."""
        return count_parameters(
            self.config, self.shape, int(self.zero.get("stage3_param_persistence_threshold", 100_000))
        )

    @cached_property
    def flops_per_image(self) -> int:
        """Of one image's forward and backward pass."""
        config = self.config
        return training_flops(config.model, config.moe, self.shape, self.num_tokens, self.text_tokens)

    @property
    def num_tokens(self) -> int:
        """Image tokens of a training sample: the kept ones if masked to the end, else all (the heaviest stage)."""
        diffusion = self.config.diffusion
        whole = num_image_tokens(self.shape.height, self.shape.width, self.config.model.patch_size)
        return num_kept_tokens(whole, 0.0 if diffusion.unmask_at_step else diffusion.mask_ratio)

    @cached_property
    def compiled(self) -> bool:
        """Whether blocks are compiled; where the recipe leaves that open they are, as plans are for GPUs."""
        return self.config.train.compile is not False

    @property
    def num_bytes(self) -> int:
        """Of one working value: weights, gradients, activations."""
        return 2 if self.config.train.precision == "bf16" else 4


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Processes and how they share the model. `recompute` is train.activation_checkpointing."""

    world_size: int
    ep_size: int
    stage: int
    micro_batch_size: int
    accumulation: int
    recompute: bool

    @property
    def edp_size(self) -> int:
        """Ranks that hold the same experts. With ep_size 1 experts are shared like everything else."""
        return self.world_size // self.ep_size

    @property
    def global_batch_size(self) -> int:
        """Images per optimizer step."""
        return self.micro_batch_size * self.accumulation * self.world_size

    def __str__(self) -> str:
        return (
            f"ep_size {self.ep_size}, ZeRO {self.stage}, micro-batch {self.micro_batch_size} x "
            f"{self.accumulation}{', recompute' if self.recompute else ''}"
        )


def configured_layout(config: TrainConfig, world_size: int, stage: int) -> tuple[Layout, str]:
    """The layout that the configuration asks for, and why it cannot be started ("": it can).

    An ep_size that does not divide the processes is no error here: the question is what would.
    """
    ep_size = config.parallel.ep_size
    layout = Layout(
        world_size=world_size, ep_size=gcd(ep_size, world_size), stage=stage,
        micro_batch_size=config.train.micro_batch_size, accumulation=config.train.gradient_accumulation_steps,
        recompute=config.train.activation_checkpointing,
    )  # fmt: skip
    return layout, f"parallel.ep_size={ep_size} does not divide {world_size} processes" if world_size % ep_size else ""
