"""The MoE layer: router, dispatch, all-to-all, experts, all-to-all, combine.

This file knows nothing of DeepSpeed: without a group all experts are local, and under ZeRO the layer is
a plain module. `moe.deepspeed_expert` adds what DeepSpeed needs for expert parallelism.

Shapes: B images (in routing: pools of images), S tokens, D width, E experts, e local experts, C rows of an expert,
N = B * C.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe.all_to_all import ExpertGroup, from_local_experts, largest, to_local_experts
from moe.config import MoeConfig
from moe.dispatch import combine, dispatch, expert_rows
from moe.experts import Experts, Mlp
from moe.routers.modules import CapacityPredictor, Router, Threshold
from moe.routers.rivals import (
    balance_loss,
    last_taken,
    pack,
    prediction_loss,
    race,
    similarity_loss,
    threshold_loss,
    token_choice,
)
from moe.routing import (
    RoutingStats,
    affinity_of,
    choose_tokens,
    choose_tokens_in_turn,
    chosen_mask,
    gated,
    no_stats,
    routing_stats,
)


class ChoiceMemory:
    """Keeps the chosen tokens of one forward pass for its recomputation (activation checkpointing).

    Recomputed affinities may differ in the last bit, and tied ones may be ordered differently; the
    shapes stay equal, so a changed choice would go unnoticed and give wrong gradients.
    """

    def __init__(self) -> None:
        self.index_BEC: Tensor | None = None
        self.valid_BEC: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """What a router decided: rows (see `Routing`), affinities that become gates, its own loss, share dropped."""

    index_BEC: Tensor
    affinity_BSE: Tensor
    valid_BEC: Tensor | None = None
    loss: Tensor | None = None
    dropped: Tensor | None = None


class MoeLayer(nn.Module):
    """Drop-in for a transformer's MLP: expert choice (EC-DIT algorithm 1) and, by `config.router`, its rivals.

    Expert choice, token choice and DiffMoE in training give every expert equally many rows, filled up with rows of
    gate 0 by token choice: equal splits, no exchange of counts, memory that does not depend on the data. Expert Race,
    and DiffMoE when sampling, cannot: they fill up every expert to the fullest one of the group, and pay for it with a
    host synchronisation per layer and rows that count for nothing.
    """

    def __init__(
        self,
        config: MoeConfig,
        *,
        dim: int,
        hidden_dim: int,
        group: ExpertGroup | None = None,
        tag: Callable[[nn.Parameter], None] | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not super(): a subclass has a second base with another signature
        self.config = config
        self.group = group
        self.num_experts = config.num_experts
        self.ep_size = group.size if group else 1
        self.num_local_experts = config.num_experts // self.ep_size
        self.capacity_factor = config.factor_at(0)  # in training; the trainer moves it along the schedule
        self.collects_statistics = True  # the trainer asks for them in steps that it reports
        self.router = Router(dim, config.num_experts, reads_time=config.router_input == "unmodulated")
        self.experts = Experts(self.num_local_experts, dim, hidden_dim, tag)
        self.shared = Mlp(dim, config.num_shared_experts * hidden_dim, dim) if config.num_shared_experts else None
        self.predictor = CapacityPredictor(dim, config.num_experts) if config.router == "diffmoe" else None
        sizes = {"diffmoe": config.num_experts, "expert_race": 1}
        self.threshold = Threshold(sizes[config.router]) if config.router in sizes else None

    def forward(
        self,
        x_BSD: Tensor,
        memory: ChoiceMemory | None = None,
        unmodulated_BSD: Tensor | None = None,
        time_BD: Tensor | None = None,
    ) -> tuple[Tensor, RoutingStats]:
        """[B, S, D] -> the sum of gate times expert output [B, S, D], and what the router did (if that is collected).

        `unmodulated_BSD` and `time_BD` are read by a router with `router_input: unmodulated`. All ranks of an expert
        group must call this with the same B and S. What lies between `rows` and `combine` is one function of
        (x, rows, gate, experts): the seam for a fused autograd node.
        """
        B, _, D = x_BSD.shape
        seen_BSD = x_BSD if self.config.router_input == "modulated" else unmodulated_BSD
        assert seen_BSD is not None, "this router reads the token before its modulation"
        pools = B // self.config.pool_images(B)
        logits_BSE = self.router(seen_BSD, time_BD).reshape(pools, -1, self.num_experts)
        pool_BSD = x_BSD.reshape(pools, -1, D)
        choice = self._choose(logits_BSE, pool_BSD, memory or ChoiceMemory())
        routing = gated(
            choice.affinity_BSE, choice.index_BEC, choice.valid_BEC,
            normalize=self.config.normalize_gates, scale=self.config.gate_scale,
        )  # fmt: skip
        rows = expert_rows(routing.index_BEC, pool_BSD.shape[1])
        x_eMD = to_local_experts(dispatch(pool_BSD, rows, self.num_experts), self.group)
        y_END = from_local_experts(self.experts(x_eMD), self.group)
        y_BSD = combine(y_END, routing.gate_BEC, rows, x_BSD)
        if self.shared is not None:
            y_BSD = y_BSD + self.shared(x_BSD)
        loss = None if choice.loss is None else self.config.auxiliary_weight * choice.loss
        if not self.collects_statistics:
            return y_BSD, no_stats(y_BSD.device, loss)
        stats = routing_stats(
            logits_BSE.detach().softmax(-1), routing, num_images=B, dropped=choice.dropped, auxiliary_loss=loss
        )  # fmt: skip
        return y_BSD, stats

    def _choose(self, logits_BSE: Tensor, x_BSD: Tensor, memory: ChoiceMemory) -> _Choice:
        """Ask the configured router, or repeat what `memory` holds."""
        affinity_BSE = affinity_of(logits_BSE, self.config.gate)
        factor = self.capacity_factor if self.training else self.config.capacity_factor
        choose = {
            "expert_choice": self._expert_choice,
            "token_choice": self._token_choice,
            "diffmoe": self._diffmoe,
            "expert_race": self._expert_race,
        }[self.config.router]
        choice = choose(logits_BSE, affinity_BSE, x_BSD, factor, memory)
        memory.index_BEC, memory.valid_BEC = choice.index_BEC, choice.valid_BEC
        return choice

    def _expert_choice(
        self, logits_BSE: Tensor, affinity_BSE: Tensor, x_BSD: Tensor, factor: float, memory: ChoiceMemory
    ) -> _Choice:
        """EC-DIT equation 6."""
        index_BEC = memory.index_BEC
        if index_BEC is None:
            choose = choose_tokens_in_turn if self.config.tie_break == "rotate" else choose_tokens
            index_BEC = choose(affinity_BSE, self.config.capacity(x_BSD.shape[1], factor))
        return _Choice(index_BEC=index_BEC, affinity_BSE=affinity_BSE)

    def _token_choice(
        self, logits_BSE: Tensor, affinity_BSE: Tensor, x_BSD: Tensor, factor: float, memory: ChoiceMemory
    ) -> _Choice:
        """GShard: shares filled up to the capacity, so that splits stay equal; overflow is dropped and counted."""
        capacity = self.config.capacity(x_BSD.shape[1], factor)
        chosen = token_choice(affinity_BSE, self.config.top_k, capacity)
        index_BEC, valid_BEC = self._packed(chosen.mask_BSE, capacity, memory)
        return _Choice(
            index_BEC=index_BEC, valid_BEC=valid_BEC, affinity_BSE=affinity_BSE / chosen.sum_BS1,
            loss=balance_loss(logits_BSE.softmax(-1), chosen.first_BSE), dropped=chosen.dropped,
        )  # fmt: skip

    def _diffmoe(
        self, logits_BSE: Tensor, affinity_BSE: Tensor, x_BSD: Tensor, factor: float, memory: ChoiceMemory
    ) -> _Choice:
        """Expert choice in training; when sampling, token s goes to expert e if its prediction is above e's threshold.

        So a picture's output does not depend on its batch mates, as the paper's fixed count per batch would make it.
        """
        assert self.predictor is not None and self.threshold is not None
        predicted_BSE, threshold_E = self.predictor(x_BSD), self.threshold()
        if not self.training:
            index_BEC, valid_BEC = self._packed(predicted_BSE > threshold_E, None, memory)
            return _Choice(index_BEC=index_BEC, valid_BEC=valid_BEC, affinity_BSE=affinity_BSE)
        choice = self._expert_choice(logits_BSE, affinity_BSE, x_BSD, factor, memory)
        mask_BSE = chosen_mask(choice.index_BEC, None, x_BSD.shape[1])
        target_BE = last_taken(predicted_BSE, choice.index_BEC.shape[-1])
        loss = prediction_loss(predicted_BSE, mask_BSE) + threshold_loss(threshold_E, target_BE)
        return _Choice(index_BEC=choice.index_BEC, affinity_BSE=affinity_BSE, loss=loss)

    def _expert_race(
        self, logits_BSE: Tensor, affinity_BSE: Tensor, x_BSD: Tensor, factor: float, memory: ChoiceMemory
    ) -> _Choice:
        """One top-K over all pairs of a pool in training, a threshold when sampling; never equal splits."""
        assert self.threshold is not None
        threshold_1 = self.threshold()
        if not self.training:
            index_BEC, valid_BEC = self._packed(affinity_BSE > threshold_1, None, memory)
            return _Choice(index_BEC=index_BEC, valid_BEC=valid_BEC, affinity_BSE=affinity_BSE)
        num_pairs = int(self.config.exact_capacity(x_BSD.shape[1], factor) * self.num_experts)
        mask_BSE, last_B = race(affinity_BSE, num_pairs)
        index_BEC, valid_BEC = self._packed(mask_BSE, None, memory)
        loss = similarity_loss(logits_BSE, chosen_mask(index_BEC, valid_BEC, x_BSD.shape[1]))
        loss = loss + threshold_loss(threshold_1, last_B)
        return _Choice(index_BEC=index_BEC, valid_BEC=valid_BEC, affinity_BSE=affinity_BSE, loss=loss)

    def _packed(self, mask_BSE: Tensor, width: int | None, memory: ChoiceMemory) -> tuple[Tensor, Tensor]:
        """Rows of a mask, or of the memory; without a width, of the fullest expert of the group."""
        if memory.index_BEC is not None and memory.valid_BEC is not None:
            return memory.index_BEC, memory.valid_BEC
        if width is None:
            fullest = max(1, int(mask_BSE.sum(1).max()))
            width = largest(fullest, self.group, mask_BSE.device)
        return pack(mask_BSE, width)


def set_capacity_factor(model: nn.Module, factor: float) -> None:
    """Set the capacity factor of training in every MoE layer of a model (`MoeConfig.factor_at`)."""
    for module in model.modules():
        if isinstance(module, MoeLayer):
            module.capacity_factor = factor


def collect_statistics(model: nn.Module, wanted: bool) -> None:
    """Whether the MoE layers of a model say what their routers did: dozens of small kernels in each layer."""
    for module in model.modules():
        if isinstance(module, MoeLayer):
            module.collects_statistics = wanted


def auxiliary_loss(stats: list[RoutingStats]) -> Tensor | None:
    """Sum of the routers' own losses over the layers, None if no router has one."""
    losses = [s.auxiliary_loss for s in stats if s.auxiliary_loss.requires_grad]
    return torch.stack(losses).sum() if losses else None
