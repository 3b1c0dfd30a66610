"""Settings of one mixture-of-experts layer. Standard library only."""

import re
from dataclasses import dataclass
from fractions import Fraction
from math import gcd
from typing import Literal

_GROUP = re.compile(r"group\(([1-9]\d*)\)")


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture-of-experts settings, shared by every MoE block of a model.

    `every` places the MoE: block `i` has one when `i % every == every - 1` (the paper's every second
    block is `every=2`); 0 gives the dense twin. `capacity_factor` is the mean number of experts that
    take a token.

    | `router`        | who chooses                                                                              |
    |-----------------|------------------------------------------------------------------------------------------|
    | `expert_choice` | each expert its top `capacity` tokens (EC-DIT, arXiv 2410.02098, equation 6)             |
    | `token_choice`  | each token its `top_k` experts, which take the first `capacity` (GShard, arXiv 2006.16668) |
    | `diffmoe`       | as `expert_choice`; when sampling a learned predictor decides (DiffMoE, arXiv 2503.14487) |
    | `expert_race`   | the best pairs of all; when sampling a learned threshold decides (arXiv 2503.16057)      |

    `pool` is the set of tokens among which is chosen: `image` makes a picture's output independent of the other
    pictures in its batch, `group(n)` is n pictures, `batch` is all pictures of a rank's micro-batch.
    `gate` turns logits into affinities; `normalize_gates` divides the gates of a token by their sum, `gate_scale`
    multiplies them. `router_input: unmodulated` lets the router read the timestep's embedding and the token before its
    modulation, `num_shared_experts` MLPs see every token; these and normalised gates are Nucleus-Image's
    (arXiv 2604.12163). The capacity factor can fall from `capacity_factor_start` to `capacity_factor` over the first
    `capacity_anneal_steps` steps of training. `auxiliary_weight` weighs the router's own loss, where it has one.

    `tie_break` says which of several tokens with exactly equal affinities an expert takes. `any` leaves it to the
    sort. `rotate` lets expert e of E prefer the tokens from position floor(e S / E) of S on, and round: when all
    affinities are equal, as with a router of zeros, no two experts take the same tokens, and every token is
    taken by exactly `capacity_factor` experts if that is a whole number and the capacity was not rounded. A dense
    model can be continued as a mixture from there (trainer/checkpoint/upcycle.py).
    """

    num_experts: int = 8
    capacity_factor: float = 2.0
    every: int = 2
    router: Literal["expert_choice", "token_choice", "diffmoe", "expert_race"] = "expert_choice"
    pool: str = "image"
    tie_break: Literal["any", "rotate"] = "any"
    top_k: int = 2
    gate: Literal["softmax", "sigmoid", "identity"] = "softmax"
    normalize_gates: bool = False
    gate_scale: float = 1.0
    router_input: Literal["modulated", "unmodulated"] = "modulated"
    num_shared_experts: int = 0
    capacity_factor_start: float = 0.0
    capacity_anneal_steps: int = 0
    auxiliary_weight: float = 0.01

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ValueError(f"moe.num_experts is {self.num_experts}: use 1 or more")
        if self.every < 0:
            raise ValueError(f"moe.every is {self.every}: use 0 (dense) or the distance of MoE blocks")
        if self.pool not in ("image", "batch") and not _GROUP.fullmatch(self.pool):
            raise ValueError(f"moe.pool is {self.pool}: use image, batch or group(n) with a number of images n")
        if self.num_shared_experts < 0:
            raise ValueError(f"moe.num_shared_experts is {self.num_shared_experts}: use 0 or more")
        if self.auxiliary_weight < 0:
            raise ValueError(f"moe.auxiliary_weight is {self.auxiliary_weight}: use 0 or more")
        if not self.gate_scale > 0:
            raise ValueError(f"moe.gate_scale is {self.gate_scale}: use more than 0")
        self._check_factors()
        self._check_combinations()

    def _check_factors(self) -> None:
        if not 0 < self.capacity_factor <= self.num_experts:
            raise ValueError(
                f"moe.capacity_factor is {self.capacity_factor}: a token can be taken by more than 0 "
                f"and at most moe.num_experts={self.num_experts} experts"
            )
        if self.capacity_anneal_steps < 0:
            raise ValueError(f"moe.capacity_anneal_steps is {self.capacity_anneal_steps}: use 0 (off) or more")
        start = self.capacity_factor_start
        if (start != 0) != (self.capacity_anneal_steps > 0):
            raise ValueError(
                f"moe.capacity_factor_start={start:g} and moe.capacity_anneal_steps={self.capacity_anneal_steps} "
                "belong together: set both or neither"
            )
        if start and not self.capacity_factor <= start <= self.num_experts:
            raise ValueError(
                f"moe.capacity_factor_start is {start:g}: it falls to moe.capacity_factor={self.capacity_factor:g}, "
                f"so use that or more, at most moe.num_experts={self.num_experts}"
            )

    def _check_combinations(self) -> None:
        """Refuse settings that contradict each other, naming both."""
        if self.router == "token_choice" and not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"moe.top_k is {self.top_k}: use 1 to moe.num_experts={self.num_experts}")
        if self.router != "expert_choice" and self.tie_break != "any":
            raise ValueError(
                f"moe.tie_break={self.tie_break} is for moe.router=expert_choice, but moe.router is {self.router}: "
                "use moe.tie_break=any"
            )
        if self.gate == "identity" and (self.normalize_gates or self.router == "token_choice"):
            other = "moe.normalize_gates=true" if self.normalize_gates else "moe.router=token_choice"
            raise ValueError(
                f"moe.gate=identity has negative gates, whose sum {other} would divide by: "
                "use moe.gate=softmax or sigmoid"
            )
        if self.router == "diffmoe" and self.pool == "image":
            raise ValueError(
                "moe.router=diffmoe learns how much compute a picture deserves among others, but moe.pool=image gives "
                "each the same: use moe.pool=batch or group(n)"
            )

    @property
    def group_size(self) -> int:
        """Images of a pool: n of `group(n)`, 1 of `image`, 0 (all there are) of `batch`."""
        found = _GROUP.fullmatch(self.pool)
        return int(found[1]) if found else int(self.pool == "image")

    @property
    def has_equal_splits(self) -> bool:
        """Whether every expert takes the same number of rows in training, so that exchanges need no counts."""
        return self.router != "expert_race"

    def pool_images(self, num_images: int) -> int:
        """How many images of a batch share a pool; a batch that `group(n)` does not divide has smaller groups."""
        return gcd(self.group_size, num_images)

    def has_moe(self, layer: int) -> bool:
        """Whether block number `layer` (from 0) carries the MoE instead of the dense MLP."""
        return self.every > 0 and layer % self.every == self.every - 1

    def factor_at(self, step: int) -> float:
        """Capacity factor of optimizer step number `step` (from 0): a line down to `capacity_factor`."""
        if step >= self.capacity_anneal_steps:
            return self.capacity_factor
        share = step / self.capacity_anneal_steps
        return self.capacity_factor_start + share * (self.capacity_factor - self.capacity_factor_start)

    def capacity(self, num_tokens: int, factor: float | None = None) -> int:
        """Tokens that each expert takes from a pool of `num_tokens`: floor(S * f_c / E), paper section 3.

        Raises ValueError when that is below 1, since such an expert would never see a token.
        """
        capacity = int(self.exact_capacity(num_tokens, factor))
        if capacity < 1:
            raise ValueError(
                f"moe.capacity_factor={self.capacity_factor} and moe.num_experts={self.num_experts} give a "
                f"capacity below 1 on {num_tokens} tokens per image: raise moe.capacity_factor to at least "
                f"{self.num_experts / num_tokens:g} or lower moe.num_experts to at most "
                f"{int(num_tokens * self.capacity_factor)}"
            )
        return capacity

    def exact_capacity(self, num_tokens: int, factor: float | None = None) -> Fraction:
        """S * f_c / E, which `capacity` rounds down when it is not whole; `factor` replaces the setting."""
        # Fraction of the decimal text, so that 0.7 * 10 is 7 and not 6.999...
        chosen = self.capacity_factor if factor is None else factor
        return Fraction(str(chosen)) * num_tokens / self.num_experts
