"""Settings of one mixture-of-experts layer. Standard library only."""

import re
from dataclasses import dataclass, field
from fractions import Fraction
from math import gcd
from typing import Literal

from moe.ranges import at_least, check_ranges, more_than

_GROUP = re.compile(r"group\(([1-9]\d*)\)")


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture-of-experts settings, shared by every MoE block of a model.

    | `router`        | who chooses                                                                              |
    |-----------------|------------------------------------------------------------------------------------------|
    | `expert_choice` | each expert its top `capacity` tokens (EC-DIT, arXiv 2410.02098, equation 6)             |
    | `token_choice`  | each token its `top_k` experts, which take the first `capacity` (GShard, arXiv 2006.16668) |
    | `diffmoe`       | as `expert_choice`; when sampling a learned predictor decides (DiffMoE, arXiv 2503.14487) |
    | `expert_race`   | the best pairs of all; when sampling a learned threshold decides (arXiv 2503.16057)      |
    """

    num_experts: int = field(default=8, metadata=at_least(1))
    """Experts of each MoE block; 1 or more, a multiple of `parallel.ep_size`."""
    capacity_factor: float = field(default=2.0, metadata=more_than(0))
    """Mean number of experts that take a token; above 0, at most `num_experts`. Sets the FLOPs of a block."""
    every: int = field(default=2, metadata=at_least(0))
    """Distance of MoE blocks: block i (from 0) has one when i % every == every - 1; 2 is the paper's every second
    block, 0 the dense twin."""
    router: str = "expert_choice"
    """Who chooses which tokens go to which experts: `expert_choice`, `token_choice`, `diffmoe`, `expert_race`, or what
    else moe/routers/registry.py lists."""
    pool: str = "image"
    """Tokens among which is chosen: those of an `image` (its output then does not depend on the others in its batch),
    of `group(n)` pictures (n divides the micro-batch), or of the whole micro-batch of a rank (`batch`)."""
    tie_break: Literal["any", "rotate"] = "any"
    """Which of several tokens with exactly equal affinities an expert takes: whichever the sort puts first (`any`), or
    from position floor(e S / E) of S on for expert e of E, and round (`rotate`, expert choice only). With a router of
    zeros, all affinities are equal: `rotate` then gives no two experts the same tokens, and each token to exactly
    `capacity_factor` experts if that is whole and no capacity was rounded, from where a dense model can be continued
    as a mixture (trainer/checkpoint/upcycle.py)."""
    top_k: int = field(default=2, metadata=at_least(1))
    """Experts that a token asks for; 1 to `num_experts`. Token choice only."""
    sampling_choice: Literal["prediction", "gate"] = "prediction"
    """Tokens that an expert takes when sampling, DiffMoE only: those whose prediction is above its threshold
    (`prediction`), so that pictures drawn together do not touch; or as many as these of the whole pool, those with the
    highest affinities, as the authors' code does (`gate`)."""
    gate: Literal["softmax", "sigmoid", "identity"] = "softmax"
    """What turns a token's logits into affinities, which become the weights of the experts' outputs."""
    normalize_gates: bool = False
    """Divide the gates of a token by their sum, as Nucleus-Image (arXiv 2604.12163); not with `gate: identity`."""
    gate_scale: float = field(default=1.0, metadata=more_than(0))
    """Multiplies all gates; above 0."""
    router_input: Literal["modulated", "unmodulated"] = "modulated"
    """What the router reads: the token as the experts get it, or the token before the timestep's modulation beside the
    timestep's embedding, as Nucleus-Image."""
    num_shared_experts: int = field(default=0, metadata=at_least(0))
    """MLPs of an expert's size that see every token beside the chosen ones; 0 or more."""
    capacity_factor_start: float = field(default=0.0, metadata=at_least(0))
    """Capacity factor of the first step, from which it falls in a line to `capacity_factor`; at least that and at most
    `num_experts`. 0: no schedule."""
    capacity_anneal_steps: int = field(default=0, metadata=at_least(0))
    """Optimizer steps that the fall takes; 0: no schedule. Belongs together with `capacity_factor_start`."""
    auxiliary_weight: float = field(default=0.01, metadata=at_least(0))
    """Weight of the router's own loss in the model's, where it has one; 0 or more."""

    def __post_init__(self) -> None:  # what holds for every router; a router refuses the rest when it is built
        check_ranges(self, "moe.")
        if self.pool not in ("image", "batch") and not _GROUP.fullmatch(self.pool):
            raise ValueError(f"moe.pool is {self.pool}: use image, batch or group(n) with a number of images n")
        if self.gate == "identity" and self.normalize_gates:
            raise ValueError(
                "moe.gate=identity has negative gates, whose sum moe.normalize_gates=true would divide by: "
                "use moe.gate=softmax or sigmoid"
            )
        if self.capacity_factor > self.num_experts:
            raise ValueError(
                f"moe.capacity_factor is {self.capacity_factor}: a token can be taken by more than 0 "
                f"and at most moe.num_experts={self.num_experts} experts"
            )
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

    @property
    def group_size(self) -> int:
        """Images of a pool: n of `group(n)`, 1 of `image`, 0 (all there are) of `batch`."""
        found = _GROUP.fullmatch(self.pool)
        return int(found[1]) if found else int(self.pool == "image")

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
