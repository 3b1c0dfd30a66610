"""A toy router with its plain loops and a toy codec, registered as a newcomer would; `tests/test_seams.py` uses them.

`python tests/toy_parts.py MODULE ...` registers them and runs a command of the repository.
"""

import runpy
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe.config import MoeConfig
from moe.oracle.choice import TWINS, Chosen, ScoredPool
from moe.routers.base import Choice, Router, RouterInput, RouterTraits
from moe.routers.expert_choice import choose_tokens
from moe.routers.registry import ROUTERS
from trainer.encoders.build import CODECS, Registered
from trainer.encoders.protocols import ImageCodec


class ToyRouter(Router):
    """Expert choice by the affinity plus a learned bonus, which its loss keeps small."""

    traits = RouterTraits(
        has_equal_splits=True, has_tie_break=False, initial_std={"bonus.weight": 0.5}, example={"pool": "batch"}
    )

    def check(self) -> None:
        if self.config.num_experts % 2:
            raise ValueError(f"moe.num_experts is {self.config.num_experts}: the toy router needs an even number")

    def learned_modules(self, dim: int) -> dict[str, nn.Module]:
        return {"bonus": nn.Linear(dim, self.config.num_experts)}

    def choose(self, seen: RouterInput) -> Choice:
        bonus_BSE = seen.learned["bonus"](seen.x_BSD).float()
        score_BSE = seen.affinity_BSE + bonus_BSE.square()
        index_BEC = seen.memory.index_BEC
        if index_BEC is None:
            index_BEC = choose_tokens(score_BSE, self.config.capacity(seen.x_BSD.shape[1], seen.capacity_factor))
        return Choice(index_BEC=index_BEC, affinity_BSE=score_BSE, loss=bonus_BSE.square().mean())

    def multiply_adds(self, num_tokens: int, dim: int) -> int:
        return num_tokens * dim * self.config.num_experts

    def activation_bytes(self, num_tokens: int, dim: int, value_bytes: int) -> float:
        return 12 * num_tokens * self.config.num_experts


def toy_loops(pool: ScoredPool, config: MoeConfig, training: bool) -> Chosen:
    """The toy router's choice in one pool."""
    bonus = torch.stack([pool.layer.bonus(token) for token in pool.tokens])
    score = pool.affinity(config) + bonus * bonus
    T, E = score.shape
    experts: list[list[int]] = [[] for _ in range(T)]
    for e in range(E):
        best = sorted(range(T), key=lambda t: -float(score[t, e].detach()))
        for t in best[: int(T * config.capacity_factor / E + 1e-9)]:
            experts[t].append(e)
    return Chosen(experts, score, (bonus * bonus).mean())


class ToyCodec(ImageCodec):
    """Four pixels as one place of twelve channels."""

    channels, factor = 12, 2

    def fingerprint(self) -> str:
        return "toy-1"

    def posterior(self, rgb_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        return functional.pixel_unshuffle(rgb_BCHW, 2), None

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        return functional.pixel_shuffle(latent_BCHW, 2)


def register() -> None:
    """One line each, and the router's plain loops."""
    ROUTERS["toy"] = "toy_parts:ToyRouter"
    CODECS.append(Registered(pattern="toy", path="toy_parts:ToyCodec", usage="toy"))
    TWINS["toy"] = toy_loops, lambda dim, num_experts: {"bonus": nn.Linear(dim, num_experts)}


def unregister() -> None:
    """As if there had been no toys."""
    ROUTERS.pop("toy")
    CODECS.pop()
    TWINS.pop("toy")


if __name__ == "__main__":
    register()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
