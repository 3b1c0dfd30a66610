"""The MoE layer: router, dispatch, all-to-all, experts, all-to-all, combine.

Without a group all experts are local, and under ZeRO the layer is a plain module; `moe.deepspeed_expert` adds what
DeepSpeed needs for expert parallelism.

Shapes: B images (in routing: pools of images), S tokens, D width, E experts, e local experts, C rows of an expert,
N = B * C.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe.all_to_all import ExpertGroup, send_rows, through_experts
from moe.config import MoeConfig
from moe.dispatch import combine, dispatch, expert_rows
from moe.experts import Experts, Mlp
from moe.routers.base import Choice, RouterInput
from moe.routers.modules import RouterLinear
from moe.routers.registry import build_router
from moe.routing import ChoiceMemory, Routed, affinity_of, gated


class MoeLayer(nn.Module):
    """Drop-in for a transformer's MLP: a router chooses tokens, experts compute, gates weigh (EC-DIT algorithm 1)."""

    def __init__(
        self,
        config: MoeConfig,
        *,
        dim: int,
        hidden_dim: int,
        group: ExpertGroup | None = None,
        tag: Callable[[nn.Parameter], None] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.group = group
        self.num_experts = config.num_experts
        self.capacity_factor = config.factor_at(0)  # in training; the trainer moves it along the schedule
        self.strategy = build_router(config)
        self.router = RouterLinear(dim, config.num_experts, reads_time=config.router_input == "unmodulated")
        self.experts = Experts(config.num_experts // (group.size if group else 1), dim, hidden_dim, tag)
        self.shared = Mlp(dim, config.num_shared_experts * hidden_dim, dim) if config.num_shared_experts else None
        learned = self.strategy.learned_modules(dim)
        for name, module in learned.items():
            self.add_module(name, module)
        self.learned_names = tuple(learned)

    def forward(
        self,
        x_BSD: Tensor,
        memory: ChoiceMemory | None = None,
        unmodulated_BSD: Tensor | None = None,
        time_BD: Tensor | None = None,
    ) -> tuple[Tensor, Routed]:
        """[B, S, D] -> the sum of gate times expert output [B, S, D], and what the router decided.

        `unmodulated_BSD` and `time_BD` are read by a router with `router_input: unmodulated`. All ranks of an expert
        group must call this with the same B and S.
        """
        B, _, D = x_BSD.shape
        seen_BSD = x_BSD if self.config.router_input == "modulated" else unmodulated_BSD
        assert seen_BSD is not None, "this router reads the token before its modulation"

        # Tokens compete within a pool only, so from here on the leading axis is pools: images that share one lie
        # behind each other on the token axis, and no router needs to know what a pool is.
        pools = B // self.config.pool_images(B)
        logits_BSE = self.router(seen_BSD, time_BD).reshape(pools, -1, self.num_experts)
        pool_BSD = x_BSD.reshape(pools, -1, D)

        # The choice has no gradient; the router learns through the gates, which are affinities of the chosen pairs.
        choice = self._choose(logits_BSE, pool_BSD, memory or ChoiceMemory())
        gate_BEC = gated(
            choice.affinity_BSE, choice.index_BEC, choice.valid_BEC,
            normalize=self.config.normalize_gates, scale=self.config.gate_scale,
        )  # fmt: skip

        # Between `rows` and `combine` lies one function of (x, rows, gate, experts): the seam for a fused autograd
        # node. Rows are expert-major, so what goes to one rank is one block; gates stay here, on the way back they
        # weigh outputs that have returned, and the exchange carries nothing but rows.
        rows = expert_rows(choice.index_BEC, pool_BSD.shape[1])
        sent = send_rows(dispatch(pool_BSD, rows, self.num_experts), self.group)
        shared_BSD = None if self.shared is None else self.shared(x_BSD)  # while rows are under way
        y_BSD = combine(through_experts(sent, self.experts, self.group), gate_BEC, rows, x_BSD)
        if shared_BSD is not None:
            y_BSD = y_BSD + shared_BSD

        own = choice.loss
        loss = y_BSD.new_zeros((), dtype=torch.float32) if own is None else self.config.auxiliary_weight * own
        return y_BSD, Routed(
            logits_BSE=logits_BSE.detach(), index_BEC=choice.index_BEC, valid_BEC=choice.valid_BEC,
            dropped=choice.dropped, auxiliary_loss=loss, num_images=B,
        )  # fmt: skip

    def _choose(self, logits_BSE: Tensor, x_BSD: Tensor, memory: ChoiceMemory) -> Choice:
        """Ask the router, which repeats what `memory` holds, and keep its choice there."""
        choice = self.strategy.choose(
            RouterInput(
                logits_BSE=logits_BSE, affinity_BSE=affinity_of(logits_BSE, self.config.gate), x_BSD=x_BSD,
                capacity_factor=self.capacity_factor if self.training else self.config.capacity_factor,
                training=self.training, learned={name: getattr(self, name) for name in self.learned_names},
                memory=memory, group=self.group,
            )
        )  # fmt: skip
        memory.index_BEC, memory.valid_BEC = choice.index_BEC, choice.valid_BEC
        return choice


def set_capacity_factor(model: nn.Module, factor: float) -> None:
    """Set the capacity factor of training in every MoE layer of a model (`MoeConfig.factor_at`)."""
    for module in model.modules():
        if isinstance(module, MoeLayer):
            module.capacity_factor = factor


def auxiliary_loss(routed: list[Routed]) -> Tensor | None:
    """Sum of the routers' own losses over the layers, None if no router has one."""
    losses = [layer.auxiliary_loss for layer in routed if layer.auxiliary_loss.requires_grad]
    return torch.stack(losses).sum() if losses else None
