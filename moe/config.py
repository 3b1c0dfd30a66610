"""Settings of one expert-choice mixture-of-experts layer. Standard library only."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture-of-experts settings, shared by every MoE block of a model.

    `every` places the MoE: block `i` has one when `i % every == every - 1` (the paper's every second
    block is `every=2`); 0 gives the dense twin. `capacity_factor` is the mean number of experts that
    take a token. `pool` is the set of tokens among which an expert chooses its top `capacity`:
    `image` makes a picture's output independent of the other pictures in its batch.

    `tie_break` says which of several tokens with exactly equal affinities an expert takes. `any` leaves it to the
    sort. `rotate` lets expert e of E prefer the tokens from position floor(e S / E) of S on, and round: when all
    affinities are equal, as with a router of zeros, no two experts take the same tokens, and every token is
    taken by exactly `capacity_factor` experts if that is a whole number and the capacity was not rounded. A dense
    model can be continued as a mixture from there (trainer/checkpoint/upcycle.py).
    """

    num_experts: int = 8
    capacity_factor: float = 2.0
    every: int = 2
    pool: Literal["image"] = "image"
    tie_break: Literal["any", "rotate"] = "any"

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ValueError(f"moe.num_experts is {self.num_experts}: use 1 or more")
        if self.every < 0:
            raise ValueError(f"moe.every is {self.every}: use 0 (dense) or the distance of MoE blocks")
        if not 0 < self.capacity_factor <= self.num_experts:
            raise ValueError(
                f"moe.capacity_factor is {self.capacity_factor}: a token can be taken by more than 0 "
                f"and at most moe.num_experts={self.num_experts} experts"
            )

    def has_moe(self, layer: int) -> bool:
        """Whether block number `layer` (from 0) carries the MoE instead of the dense MLP."""
        return self.every > 0 and layer % self.every == self.every - 1

    def capacity(self, num_tokens: int) -> int:
        """Tokens that each expert takes from a pool of `num_tokens`: floor(S * f_c / E), paper section 3.

        Raises ValueError when that is below 1, since such an expert would never see a token.
        """
        capacity = int(self.exact_capacity(num_tokens))
        if capacity < 1:
            raise ValueError(
                f"moe.capacity_factor={self.capacity_factor} and moe.num_experts={self.num_experts} give a "
                f"capacity below 1 on {num_tokens} tokens per image: raise moe.capacity_factor to at least "
                f"{self.num_experts / num_tokens:g} or lower moe.num_experts to at most "
                f"{int(num_tokens * self.capacity_factor)}"
            )
        return capacity

    def exact_capacity(self, num_tokens: int) -> Fraction:
        """S * f_c / E, which `capacity` rounds down when it is not whole."""
        # Fraction of the decimal text, so that 0.7 * 10 is 7 and not 6.999...
        return Fraction(str(self.capacity_factor)) * num_tokens / self.num_experts
