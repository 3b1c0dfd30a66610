"""Expert choice: each expert takes its `capacity` best tokens (EC-DIT, arXiv 2410.02098, section 3, equation 6).

No loss of its own: the load is even by construction. Shapes: B pools, S tokens of a pool, E experts, C capacity.
"""

import torch
from torch import Tensor

from moe.routers.base import Choice, Router, RouterInput, RouterTraits


class ExpertChoice(Router):
    """Each expert its top `capacity` tokens of the pool, in training and sampling alike."""

    traits = RouterTraits(has_equal_splits=True, has_tie_break=True, initial_std={}, example={})

    def choose(self, seen: RouterInput) -> Choice:
        """Equation 6; the gate is the raw affinity of each chosen pair (equation 8)."""
        index_BEC = seen.memory.index_BEC
        if index_BEC is None:
            choose = choose_tokens_in_turn if self.config.tie_break == "rotate" else choose_tokens
            index_BEC = choose(seen.affinity_BSE, seen.capacity)
        return Choice(index_BEC=index_BEC, affinity_BSE=seen.affinity_BSE)

    def multiply_adds(self, num_tokens: int, dim: int) -> int:
        return 0

    def activation_bytes(self, num_tokens: int, dim: int, value_bytes: int) -> float:
        return 0.0


def choose_tokens(affinity_BSE: Tensor, capacity: int) -> Tensor:
    """Top-`capacity` tokens of each expert in each pool (equation 6), [B, E, C] int64.

    The positions are sorted, so that the gather reads rows in order; which expert output comes first
    does not matter to the sum.
    """
    index_BEC = affinity_BSE.detach().transpose(1, 2).topk(capacity, dim=-1, sorted=False).indices
    return index_BEC.sort(dim=-1).values


def choose_tokens_in_turn(affinity_BSE: Tensor, capacity: int) -> Tensor:
    """`choose_tokens` with `tie_break: rotate`: equal affinities go to expert e from floor(e S / E) on.

    A stable sort of the tokens in the order of each expert's preference, [B, S, E] -> [B, E, C] int64.
    """
    B, S, E = affinity_BSE.shape
    device = affinity_BSE.device
    first_E1 = torch.arange(E, device=device).unsqueeze(1) * S // E
    order_BES = ((first_E1 + torch.arange(S, device=device)) % S).expand(B, E, S)
    turned_BES = affinity_BSE.detach().transpose(1, 2).gather(2, order_BES)
    best_BEC = turned_BES.sort(dim=-1, descending=True, stable=True).indices[..., :capacity]
    return order_BES.gather(2, best_BEC).sort(dim=-1).values
