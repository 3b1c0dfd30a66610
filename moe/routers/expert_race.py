"""Expert Race (arXiv 2503.16057): one top-K over all (token, expert) pairs of a pool, section 4.

Shapes: B pools, S tokens of a pool, E experts, N = S E pairs.
"""

import torch
from torch import Tensor, nn

from moe.routers.base import Choice, Router, RouterInput, RouterTraits
from moe.routers.modules import Threshold, threshold_loss
from moe.routing import chosen_mask


class ExpertRace(Router):
    """The best pairs of all in training, the pairs above a learned threshold when sampling.

    Experts take unequal numbers of tokens, so all are filled up to the fullest one of the group: rows that count for
    nothing, and a host synchronisation in each layer.
    """

    traits = RouterTraits(
        has_equal_splits=False, has_tie_break=False, initial_std={"threshold.value": 0.0},
        example={"gate": "identity", "pool": "batch"}, waits_when_sampling=True,
    )  # fmt: skip

    def learned_modules(self, dim: int) -> dict[str, nn.Module]:
        """One threshold for all experts."""
        return {"threshold": Threshold(1)}

    def choose(self, seen: RouterInput) -> Choice:
        """As many pairs as expert choice would take; the loss parts the experts and trains the threshold."""
        threshold_1 = seen.learned["threshold"]()
        if not seen.training:
            index_BEC, valid_BEC = seen.packed(seen.affinity_BSE > threshold_1)
            return Choice(index_BEC=index_BEC, valid_BEC=valid_BEC, affinity_BSE=seen.affinity_BSE)
        num_tokens = seen.x_BSD.shape[1]
        num_pairs = int(self.config.exact_capacity(num_tokens, seen.capacity_factor) * self.config.num_experts)
        mask_BSE, last_B = race(seen.affinity_BSE, num_pairs)
        index_BEC, valid_BEC = seen.packed(mask_BSE)
        loss = similarity_loss(seen.logits_BSE, chosen_mask(index_BEC, valid_BEC, num_tokens))
        loss = loss + threshold_loss(threshold_1, last_B)
        return Choice(index_BEC=index_BEC, valid_BEC=valid_BEC, affinity_BSE=seen.affinity_BSE, loss=loss)

    def multiply_adds(self, num_tokens: int, dim: int) -> int:
        return 0  # the products of the loss do not count

    def activation_bytes(self, num_tokens: int, dim: int, value_bytes: int) -> float:
        """Softmax and mask of the similarity loss and the products with them, fp32."""
        return 16 * num_tokens * self.config.num_experts


def race(score_BSE: Tensor, num_pairs: int) -> tuple[Tensor, Tensor]:
    """The `num_pairs` best (token, expert) pairs of each pool: bool [B, S, E], and the last taken score [B]."""
    flat_BN = score_BSE.detach().flatten(1)
    best = flat_BN.topk(num_pairs, dim=-1)
    mask = torch.zeros_like(flat_BN, dtype=torch.bool).scatter_(1, best.indices, True)
    return mask.view_as(score_BSE), best.values[:, -1]


def similarity_loss(logits_BSE: Tensor, mask_BSE: Tensor) -> Tensor:
    """(1 / S) sum_ij W_ij (P^T P)_ij in each pool, with P the softmax over experts; mean over pools.

    The paper's section 5, equations 9-11. W weighs the diagonal by E M_ii / sum M_ii and the rest by
    (E^2 - E) M_ij / sum M_ij, M = mask^T mask: the first evens the load of experts, the second parts experts that take
    the same tokens.
    """
    probability_BSE, taken_BSE = logits_BSE.softmax(-1), mask_BSE.to(logits_BSE.dtype)
    S, E = taken_BSE.shape[1:]
    both_BEE = taken_BSE.transpose(1, 2) @ taken_BSE
    diagonal_EE = torch.eye(E, device=both_BEE.device)
    own, other = both_BEE * diagonal_EE, both_BEE * (1 - diagonal_EE)
    weight_BEE = E * own / own.sum((1, 2), keepdim=True).clamp_min(1)
    weight_BEE = weight_BEE + (E * E - E) * other / other.sum((1, 2), keepdim=True).clamp_min(1)
    return (weight_BEE * (probability_BSE.transpose(1, 2) @ probability_BSE)).sum((1, 2)).mean() / S
