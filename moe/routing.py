"""Expert-choice routing as pure functions (EC-DIT, arXiv 2410.02098, section 3, equations 5-6, algorithm 1).

Shapes: B images, S image tokens, E experts, C capacity (tokens that an expert takes from an image).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Which tokens each expert takes, and how much its output counts.

    `index_BEC` int64 positions in the image's S tokens; `gate_BEC` fp32 weights with gradient.
    """

    index_BEC: Tensor
    gate_BEC: Tensor


@dataclass(frozen=True, kw_only=True)
class RoutingStats:
    """What a router did to one batch; detached, on the device of the tokens.

    `experts_per_token_BS` int32, how many experts took each token. `gate_entropy` mean entropy of the
    affinity over experts, in nats (log E is uniform). `affinity_kept` share of the affinity mass that
    lies on chosen (token, expert) pairs.
    """

    experts_per_token_BS: Tensor
    gate_entropy: Tensor
    affinity_kept: Tensor

    def coverage(self, max_experts: int) -> Tensor:
        """Share of tokens taken by 0, 1, ..., `max_experts` experts or more, [max_experts + 1]."""
        count = self.experts_per_token_BS.flatten().clamp(max=max_experts).long()
        share = torch.zeros(max_experts + 1, device=count.device)
        return share.scatter_add_(0, count, torch.ones_like(count, dtype=share.dtype)) / count.numel()


def choose_tokens(affinity_BSE: Tensor, capacity: int) -> Tensor:
    """Top-`capacity` tokens of each expert in each image (equation 6), [B, E, C] int64.

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


def expert_choice(
    affinity_BSE: Tensor,
    capacity: int,
    index_BEC: Tensor | None = None,
    tie_break: Literal["any", "rotate"] = "any",
) -> Routing:
    """Route by expert choice: the gate is the raw affinity of each chosen pair (equation 8).

    Pass `index_BEC` to repeat an earlier choice (activation checkpointing): the choice among tied or
    nearly tied affinities must not change between the forward pass and its recomputation.
    """
    if index_BEC is None:
        choose = choose_tokens_in_turn if tie_break == "rotate" else choose_tokens
        index_BEC = choose(affinity_BSE, capacity)
    gate_BEC = affinity_BSE.transpose(1, 2).gather(2, index_BEC)
    return Routing(index_BEC=index_BEC, gate_BEC=gate_BEC)


@torch.no_grad()
def routing_stats(affinity_BSE: Tensor, routing: Routing) -> RoutingStats:
    """Coverage, entropy and kept affinity of one routing; no host synchronisation."""
    B, S, _ = affinity_BSE.shape
    index = routing.index_BEC.flatten(1)
    count_BS = torch.zeros(B, S, dtype=torch.int32, device=index.device)
    count_BS.scatter_add_(1, index, torch.ones_like(index, dtype=torch.int32))
    entropy = -(affinity_BSE * affinity_BSE.clamp_min(1e-30).log()).sum(-1).mean()
    return RoutingStats(
        experts_per_token_BS=count_BS,
        gate_entropy=entropy,
        affinity_kept=routing.gate_BEC.sum() / (B * S),
    )
