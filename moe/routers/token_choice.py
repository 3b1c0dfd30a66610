"""Token choice: each token takes its `top_k` experts (GShard, arXiv 2006.16668, algorithm 1).

Without GShard's random second choice; its l_aux is scaled by E^2 as Switch Transformer's (arXiv 2101.03961,
equation 4). Shapes: B pools, S tokens of a pool, E experts, K choices of a token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moe.routers.base import Choice, Router, RouterInput, RouterTraits


class TokenChoice(Router):
    """Each token its `moe.top_k` experts, each of which takes the first `capacity` tokens that come.

    Every expert's rows are filled up to the capacity, so that splits stay equal; what finds its expert full is dropped
    and counted.
    """

    traits = RouterTraits(has_equal_splits=True, has_tie_break=False, initial_std={}, example={})

    def check(self) -> None:
        """`top_k` has to be a number of experts, and the gates of a token need a positive sum."""
        config = self.config
        if not 1 <= config.top_k <= config.num_experts:
            raise ValueError(f"moe.top_k is {config.top_k}: use 1 to moe.num_experts={config.num_experts}")
        if config.gate == "identity":
            raise ValueError(
                "moe.gate=identity has negative gates, whose sum moe.router=token_choice would divide by: "
                "use moe.gate=softmax or sigmoid"
            )

    def choose(self, seen: RouterInput) -> Choice:
        """GShard's choice; gates are the affinities divided by the sum over the token's wishes, met or not."""
        capacity = seen.capacity
        places = place_tokens(seen.affinity_BSE, self.config.top_k, capacity)
        index_BEC, valid_BEC = seen.packed(places.mask_BSE, capacity)
        return Choice(
            index_BEC=index_BEC, valid_BEC=valid_BEC, affinity_BSE=seen.affinity_BSE / places.sum_BS1,
            loss=balance_loss(seen.logits_BSE.softmax(-1), places.first_BSE), dropped=places.dropped,
        )  # fmt: skip

    def multiply_adds(self, num_tokens: int, dim: int) -> int:
        return 0

    def activation_bytes(self, num_tokens: int, dim: int, value_bytes: int) -> float:
        """Softmax, divided affinities and first choices of the balance loss, fp32."""
        return 16 * num_tokens * self.config.num_experts


@dataclass(frozen=True, kw_only=True)
class Places:
    """Which wishes of the tokens were met.

    `mask_BSE` bool, the pairs that found a place; `sum_BS1` of the affinities of each token's K experts;
    `first_BSE` each token's first choice, full or not; `dropped` share of all choices that found no place.
    """

    mask_BSE: Tensor
    sum_BS1: Tensor
    first_BSE: Tensor
    dropped: Tensor


def place_tokens(affinity_BSE: Tensor, top_k: int, capacity: int) -> Places:
    """Each token takes its `top_k` experts; an expert that has `capacity` tokens of the pool is full.

    First choices go before second ones, earlier tokens before later ones (GShard algorithm 1). A choice that found no
    place is lost, not replaced.
    """
    best_BSK = affinity_BSE.detach().topk(top_k, dim=-1).indices
    used_B1E = torch.zeros_like(affinity_BSE[:, :1])
    mask_BSE = torch.zeros_like(affinity_BSE, dtype=torch.bool)
    for choice in range(top_k):
        wish_BSE = functional.one_hot(best_BSK[..., choice], affinity_BSE.shape[-1])
        place_BSE = wish_BSE.cumsum(dim=1) + used_B1E  # 1 for the first token of an expert
        mask_BSE = mask_BSE | ((wish_BSE > 0) & (place_BSE <= capacity))
        used_B1E = used_B1E + wish_BSE.sum(dim=1, keepdim=True)
    return Places(
        mask_BSE=mask_BSE,
        sum_BS1=affinity_BSE.gather(-1, best_BSK).sum(-1, keepdim=True),
        first_BSE=functional.one_hot(best_BSK[..., 0], affinity_BSE.shape[-1]).float(),
        dropped=1 - mask_BSE.sum() / best_BSK.numel(),
    )


def balance_loss(probability_BSE: Tensor, first_BSE: Tensor) -> Tensor:
    """E times the sum over experts of (share of first choices) x (mean probability), per pool: 1 if even."""
    share_BE, mean_BE = first_BSE.mean(1), probability_BSE.mean(1)
    return probability_BSE.shape[-1] * (share_BE * mean_BE).sum(-1).mean()
