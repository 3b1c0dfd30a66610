"""The rivals of expert choice as pure functions: token choice, Expert Race, and DiffMoE's rules.

| rival        | paper, equation                                                                       |
|--------------|---------------------------------------------------------------------------------------|
| token choice | GShard, arXiv 2006.16668, algorithm 1 (top 2, without the random second choice)         |
| balance loss | its l_aux, scaled by E^2 as Switch Transformer's (arXiv 2101.03961, equation 4)         |
| Expert Race  | arXiv 2503.16057, section 4: one top-K over all (token, expert) pairs                   |
| similarity   | its router similarity loss, section 5, equations 9-11                                  |
| DiffMoE      | arXiv 2503.14487, section 3: batch pool, capacity predictor trained by cross entropy   |

Shapes: B pools, S tokens of a pool, E experts, C rows of an expert, K choices of a token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class TokenChoice:
    """`mask_BSE` bool, the pairs that found a place; `sum_BS1` of the affinities of each token's K experts;
    `first_BSE` each token's first choice, full or not; `dropped` share of all choices that found no place."""

    mask_BSE: Tensor
    sum_BS1: Tensor
    first_BSE: Tensor
    dropped: Tensor


def token_choice(affinity_BSE: Tensor, top_k: int, capacity: int) -> TokenChoice:
    """Each token takes its `top_k` experts; an expert that has `capacity` tokens of the pool is full.

    First choices go before second ones, earlier tokens before later ones (GShard algorithm 1). The gates are the
    affinities divided by `sum_BS1`: a choice that found no place is lost, not replaced.
    """
    best_BSK = affinity_BSE.detach().topk(top_k, dim=-1).indices
    used_B1E = torch.zeros_like(affinity_BSE[:, :1])
    mask_BSE = torch.zeros_like(affinity_BSE, dtype=torch.bool)
    for choice in range(top_k):
        wish_BSE = functional.one_hot(best_BSK[..., choice], affinity_BSE.shape[-1])
        place_BSE = wish_BSE.cumsum(dim=1) + used_B1E  # 1 for the first token of an expert
        mask_BSE = mask_BSE | ((wish_BSE > 0) & (place_BSE <= capacity))
        used_B1E = used_B1E + wish_BSE.sum(dim=1, keepdim=True)
    return TokenChoice(
        mask_BSE=mask_BSE,
        sum_BS1=affinity_BSE.gather(-1, best_BSK).sum(-1, keepdim=True),
        first_BSE=functional.one_hot(best_BSK[..., 0], affinity_BSE.shape[-1]).float(),
        dropped=1 - mask_BSE.sum() / best_BSK.numel(),
    )


def balance_loss(probability_BSE: Tensor, first_BSE: Tensor) -> Tensor:
    """E times the sum over experts of (share of first choices) x (mean probability), per pool: 1 if even."""
    share_BE, mean_BE = first_BSE.mean(1), probability_BSE.mean(1)
    return probability_BSE.shape[-1] * (share_BE * mean_BE).sum(-1).mean()


def race(score_BSE: Tensor, num_pairs: int) -> tuple[Tensor, Tensor]:
    """The `num_pairs` best (token, expert) pairs of each pool: bool [B, S, E], and the last taken score [B]."""
    flat_BN = score_BSE.detach().flatten(1)
    best = flat_BN.topk(num_pairs, dim=-1)
    mask = torch.zeros_like(flat_BN, dtype=torch.bool).scatter_(1, best.indices, True)
    return mask.view_as(score_BSE), best.values[:, -1]


def similarity_loss(logits_BSE: Tensor, mask_BSE: Tensor) -> Tensor:
    """(1 / S) sum_ij W_ij (P^T P)_ij in each pool, with P the softmax over experts; mean over pools.

    W weighs the diagonal by E M_ii / sum M_ii and the rest by (E^2 - E) M_ij / sum M_ij, M = mask^T mask: the first
    evens the load of experts, the second parts experts that take the same tokens.
    """
    probability_BSE, taken_BSE = logits_BSE.softmax(-1), mask_BSE.to(logits_BSE.dtype)
    S, E = taken_BSE.shape[1:]
    both_BEE = taken_BSE.transpose(1, 2) @ taken_BSE
    diagonal_EE = torch.eye(E, device=both_BEE.device)
    own, other = both_BEE * diagonal_EE, both_BEE * (1 - diagonal_EE)
    weight_BEE = E * own / own.sum((1, 2), keepdim=True).clamp_min(1)
    weight_BEE = weight_BEE + (E * E - E) * other / other.sum((1, 2), keepdim=True).clamp_min(1)
    return (weight_BEE * (probability_BSE.transpose(1, 2) @ probability_BSE)).sum((1, 2)).mean() / S


def prediction_loss(predicted_BSE: Tensor, mask_BSE: Tensor) -> Tensor:
    """Cross entropy of the capacity predictor's logits against what the experts took."""
    return functional.binary_cross_entropy_with_logits(predicted_BSE, mask_BSE.to(predicted_BSE.dtype))


def threshold_loss(threshold: Tensor, target: Tensor) -> Tensor:
    """Half the squared distance of the threshold to each pool's last taken score; see `Threshold`."""
    return 0.5 * (threshold - target.detach()).square().mean()


def last_taken(predicted_BSE: Tensor, capacity: int) -> Tensor:
    """Prediction of the `capacity`-th token of each expert in each pool, [B, E]."""
    return predicted_BSE.detach().transpose(1, 2).topk(capacity, dim=-1).values[..., -1]


def pack(mask_BSE: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Token positions of each expert in order, filled up to `width` rows: int64 [B, E, C] and bool (row counts).

    `width` must be at least the largest number of tokens of an expert in a pool, or tokens are lost.
    """
    mask_BES = mask_BSE.transpose(1, 2)
    order = (~mask_BES).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :width]
    count_BE1 = mask_BES.sum(-1, keepdim=True)
    return order, torch.arange(width, device=order.device) < count_BE1
