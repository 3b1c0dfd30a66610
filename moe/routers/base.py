"""What a router is: one abstract class with all in which ways of choosing tokens differ.

The layer, the initial values, the FLOPs that MFU is made of, the planner's memory and the benchmarks ask the router and
know none by name. What would make a number wrong if it were forgotten is required.

Shapes: B pools (images, or groups of them), S tokens of a pool, D width, E experts, C rows of an expert.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe.all_to_all import ExpertGroup, largest
from moe.config import MoeConfig
from moe.routing import ChoiceMemory


def fixed_capacity(num_tokens: int, num_experts: int, factor: float) -> int:
    """`MoeConfig.capacity` as a function of numbers only, whose result a compiler may take as it is."""
    return MoeConfig(num_experts=num_experts, capacity_factor=factor).capacity(num_tokens)


@dataclass(frozen=True, kw_only=True)
class RouterInput:
    """What a router sees in one forward pass of one layer.

    `logits_BSE` are the linear map's, fp32; `affinity_BSE` the same through `moe.gate`; `x_BSD` the tokens that the
    experts would get. `learned` are the layer's modules that `Router.learned_modules` made. `memory` holds the choice
    that has to be repeated, if there is one.
    """

    logits_BSE: Tensor
    affinity_BSE: Tensor
    x_BSD: Tensor
    capacity_factor: float
    training: bool
    learned: Mapping[str, nn.Module]
    memory: ChoiceMemory
    group: ExpertGroup | None

    @property
    def capacity(self) -> int:
        """Tokens of a pool that each expert takes: floor(S * f_c / E)."""
        _, num_tokens, num_experts = self.logits_BSE.shape
        return fixed_capacity(num_tokens, num_experts, self.capacity_factor)

    def packed(self, mask_BSE: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
        """Rows of a choice given as a mask, or of the memory: (index_BEC, valid_BEC), see `pack`.

        Without a width every expert gets as many rows as the fullest one in the whole expert group: an exchange and a
        host synchronisation, for routers without equal splits.
        """
        if self.memory.index_BEC is not None and self.memory.valid_BEC is not None:
            return self.memory.index_BEC, self.memory.valid_BEC
        if width is None:
            fullest = max(1, int(mask_BSE.sum(1).max()))
            width = largest(fullest, self.group, mask_BSE.device)
        return pack(mask_BSE, width)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a router decided.

    `index_BEC` are int64 positions in the pool's S tokens; where `valid_BEC` is False a row only fills up an expert's
    share: its gate is 0 (None: all rows count). `affinity_BSE` becomes the gates, `loss` is the router's own,
    unweighted, and `dropped` the share of a token's choices that found their expert full.
    """

    index_BEC: Tensor
    affinity_BSE: Tensor
    valid_BEC: Tensor | None = None
    loss: Tensor | None = None
    dropped: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class RouterTraits:
    """What is known of a router without its settings."""

    has_equal_splits: bool
    """Whether every expert takes the same number of rows in training (filled up with rows of gate 0): exchanges need no
    counts, and memory does not depend on the data."""
    has_tie_break: bool
    """Whether the router knows `moe.tie_break: rotate`."""
    initial_std: Mapping[str, float]
    """Standard deviation of initial values (0: zeros) by parameter of `learned_modules`, as "threshold.value"; those
    not named follow the model's rule: biases 0, matrices 1 / sqrt(fan in)."""
    example: Mapping[str, Any]
    """Settings of `MoeConfig` with which benchmarks show the router, where the defaults do not suit it."""
    waits_when_sampling: bool = False
    """Whether sampling asks the device how many rows it needs (`RouterInput.packed` without a width): such a layer is
    not compiled then."""
    has_sampling_choice: bool = False
    """Whether the router knows `moe.sampling_choice: gate`."""


class Router(ABC):
    """One way of choosing which tokens go to which experts; `config.router` names it in `moe.routers.registry`.

    An instance holds settings only. The linear map from tokens to logits, which all routers have, belongs to the layer
    (`moe.routers.modules`), and so do the modules that a router learns beside it.
    """

    traits: ClassVar[RouterTraits]

    def __init__(self, config: MoeConfig) -> None:
        if not self.traits.has_tie_break and config.tie_break != "any":
            raise ValueError(
                f"moe.tie_break={config.tie_break} is for moe.router=expert_choice, but moe.router is {config.router}: "
                "use moe.tie_break=any"
            )
        if not self.traits.has_sampling_choice and config.sampling_choice != "prediction":
            raise ValueError(
                f"moe.sampling_choice={config.sampling_choice} is for moe.router=diffmoe, but moe.router is "
                f"{config.router}: use moe.sampling_choice=prediction"
            )
        self.config = config
        self.check()

    def check(self) -> None:
        """Raise ValueError with one sentence if `self.config` has settings that this router cannot work with."""
        return

    def learned_modules(self, dim: int) -> dict[str, nn.Module]:
        """What is learned beside the linear map, by its name in the layer; each parameter gets a gradient each step."""
        return {}

    @abstractmethod
    def choose(self, seen: RouterInput) -> Choice:
        """Choose rows, in training or sampling; repeats `seen.memory` where that holds a choice."""

    @abstractmethod
    def multiply_adds(self, num_tokens: int, dim: int) -> int:
        """Of the matrix products of `learned_modules`, forward, on the tokens of one image."""

    @abstractmethod
    def activation_bytes(self, num_tokens: int, dim: int, value_bytes: int) -> float:
        """What `choose` keeps for the backward pass beyond logits, affinities and gates; `value_bytes` of a token."""


def pack(mask_BSE: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Token positions of each expert in order, filled up to `width` rows: int64 [B, E, C] and bool (row counts).

    `width` must be at least the largest number of tokens of an expert in a pool, or tokens are lost.
    """
    mask_BES = mask_BSE.transpose(1, 2)
    order = (~mask_BES).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :width]
    count_BE1 = mask_BES.sum(-1, keepdim=True)
    return order, torch.arange(width, device=order.device) < count_BE1
