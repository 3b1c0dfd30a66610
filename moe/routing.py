"""Routing as all routers share it: affinities, gates, the memory of a choice, and what a router did.

Shapes: B pools (images, or groups of them), S image tokens of a pool, E experts, C capacity (rows of an expert).
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass
class ChoiceMemory:
    """Keeps the chosen tokens of one forward pass for its recomputation (activation checkpointing).

    Recomputed affinities may differ in the last bit, and tied ones may be ordered differently; the
    shapes stay equal, so a changed choice would go unnoticed and give wrong gradients.
    """

    index_BEC: Tensor | None = None
    valid_BEC: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class RoutingStats:
    """What a router did to one batch; detached except `auxiliary_loss`, on the device of the tokens.

    `experts_per_token_BS` int32, how many experts took each token of each image. `gate_entropy` mean entropy of the
    softmax over experts, in nats (log E is uniform). `affinity_kept` share of the softmax's mass that
    lies on chosen (token, expert) pairs; `entropy_B` and `kept_B` are both for each image. `load_E` share of the rows
    that each expert took, `mass_E` share of the kept mass. `together_EE` share of the tokens that both experts took;
    `alike_EE` cosine of two experts' affinities over all tokens. `dropped` share of a token's choices that found
    their expert full.
    `auxiliary_loss` is the router's own loss, weighted, to be added to the model's.
    """

    experts_per_token_BS: Tensor
    gate_entropy: Tensor
    affinity_kept: Tensor
    entropy_B: Tensor = field(default_factory=lambda: torch.zeros(0))
    kept_B: Tensor = field(default_factory=lambda: torch.zeros(0))
    load_E: Tensor = field(default_factory=lambda: torch.zeros(0))
    mass_E: Tensor = field(default_factory=lambda: torch.zeros(0))
    alike_EE: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    together_EE: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    dropped: Tensor = field(default_factory=lambda: torch.zeros(()))
    auxiliary_loss: Tensor = field(default_factory=lambda: torch.zeros(()))

    def coverage(self, max_experts: int) -> Tensor:
        """Share of tokens taken by 0, 1, ..., `max_experts` experts or more, [max_experts + 1]."""
        count = self.experts_per_token_BS.flatten().clamp(max=max_experts).long()
        share = torch.zeros(max_experts + 1, device=count.device)
        return share.scatter_add_(0, count, torch.ones_like(count, dtype=share.dtype)) / count.numel()


def affinity_of(logits_BSE: Tensor, gate: Literal["softmax", "sigmoid", "identity"]) -> Tensor:
    """Affinity of each token for each expert, fp32: softmax over the experts (EC-DIT equation 5), sigmoid (as
    Nucleus-Image) or the logit itself (as Expert Race, arXiv 2503.16057, section 4).
    """
    if gate == "softmax":
        return logits_BSE.softmax(dim=-1)
    return logits_BSE.sigmoid() if gate == "sigmoid" else logits_BSE


def gated(
    affinity_BSE: Tensor,
    index_BEC: Tensor,
    valid_BEC: Tensor | None = None,
    *,
    normalize: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """The gates of chosen rows: affinities of the pairs, fp32 with gradient, 0 for rows that count for nothing.

    `normalize` divides a token's gates by their sum over the experts that took it, `scale` multiplies all
    (Nucleus-Image: raw softmax affinities shrink as experts are added).
    """
    gate_BEC = affinity_BSE.transpose(1, 2).gather(2, index_BEC)
    if valid_BEC is not None:
        gate_BEC = gate_BEC * valid_BEC
    if normalize:
        B, S, _ = affinity_BSE.shape
        flat = index_BEC.flatten(1)
        sum_BS = gate_BEC.new_zeros(B, S).scatter_add(1, flat, gate_BEC.flatten(1))
        gate_BEC = gate_BEC / (sum_BS.gather(1, flat).view_as(gate_BEC) + 1e-12)
    return gate_BEC if scale == 1 else gate_BEC * scale


def chosen_mask(index_BEC: Tensor, valid_BEC: Tensor | None, num_tokens: int) -> Tensor:
    """Which expert took which token, [B, S, E] fp32 zeros and ones; a token's rows for one expert count once."""
    B, E, _ = index_BEC.shape
    taken = torch.ones_like(index_BEC, dtype=torch.float32) if valid_BEC is None else valid_BEC.float()
    mask_BES = taken.new_zeros(B, E, num_tokens).scatter_add(2, index_BEC, taken)
    return mask_BES.clamp(max=1).transpose(1, 2)


@torch.no_grad()
def routing_stats(
    affinity_BSE: Tensor,
    index_BEC: Tensor,
    valid_BEC: Tensor | None = None,
    *,
    num_images: int | None = None,
    dropped: Tensor | None = None,
    auxiliary_loss: Tensor | None = None,
) -> RoutingStats:
    """Coverage, entropy, kept affinity and sharing of one choice; no host synchronisation.

    `affinity_BSE` is the softmax over the experts; `num_images` the images of all pools together (default: one each).
    """
    B, S, _ = affinity_BSE.shape
    mask_BSE = chosen_mask(index_BEC, valid_BEC, S)
    flat_NE = mask_BSE.flatten(0, 1)
    entropy_BS = -(affinity_BSE * affinity_BSE.clamp_min(1e-30).log()).sum(-1)
    kept_BSE = affinity_BSE * mask_BSE
    mass_E = kept_BSE.sum((0, 1))
    direction_NE = affinity_BSE.flatten(0, 1) / affinity_BSE.flatten(0, 1).norm(dim=0).clamp_min(1e-12)
    zero = affinity_BSE.new_zeros(())
    return RoutingStats(
        experts_per_token_BS=mask_BSE.sum(-1).to(torch.int32).view(num_images or B, -1),
        gate_entropy=entropy_BS.mean(),
        affinity_kept=mass_E.sum() / (B * S),
        entropy_B=entropy_BS.view(num_images or B, -1).mean(1),
        kept_B=kept_BSE.sum(-1).view(num_images or B, -1).mean(1),
        mass_E=mass_E / mass_E.sum().clamp_min(1e-12),
        alike_EE=direction_NE.T @ direction_NE,
        load_E=flat_NE.sum(0) / flat_NE.sum().clamp_min(1),
        together_EE=flat_NE.T @ flat_NE / (B * S),
        dropped=zero if dropped is None else dropped,
        auxiliary_loss=zero if auxiliary_loss is None else auxiliary_loss,
    )


@dataclass(frozen=True, kw_only=True)
class Routed:
    """What a layer's router decided in one pass, and its own loss, weighted (zero where it has none).

    Statistics are dozens of small kernels, so they are computed only when somebody asks, and outside the layer: what a
    layer runs is then the same in steps that are reported and in others. The tensors but the loss are detached.
    """

    logits_BSE: Tensor
    index_BEC: Tensor
    valid_BEC: Tensor | None
    dropped: Tensor | None
    auxiliary_loss: Tensor
    num_images: int

    def statistics(self) -> RoutingStats:
        """What the router did, detached."""
        return routing_stats(
            self.logits_BSE.softmax(-1), self.index_BEC, self.valid_BEC, num_images=self.num_images,
            dropped=self.dropped, auxiliary_loss=self.auxiliary_loss.detach(),
        )  # fmt: skip
