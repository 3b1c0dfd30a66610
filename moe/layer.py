"""The expert-choice MoE layer: router, dispatch, all-to-all, experts, all-to-all, combine.

This file knows nothing of DeepSpeed: without a group all experts are local, and under ZeRO the layer is
a plain module. `moe.deepspeed_expert` adds what DeepSpeed needs for expert parallelism.

Shapes: B images, S tokens, D width, E experts, e local experts, C capacity, N = B * C.
"""

from collections.abc import Callable

from torch import Tensor, nn

from moe.all_to_all import ExpertGroup, from_local_experts, to_local_experts
from moe.config import MoeConfig
from moe.dispatch import combine, dispatch, flat_index
from moe.experts import Experts
from moe.router import Router
from moe.routing import RoutingStats, expert_choice, routing_stats


class ChoiceMemory:
    """Keeps the chosen tokens of one forward pass for its recomputation (activation checkpointing).

    Recomputed affinities may differ in the last bit, and tied ones may be ordered differently; the
    shapes stay equal, so a changed choice would go unnoticed and give wrong gradients.
    """

    def __init__(self) -> None:
        self.index_BEC: Tensor | None = None


class ExpertChoiceMoe(nn.Module):
    """Drop-in for a transformer's MLP in which experts choose tokens (EC-DIT algorithm 1, pool `image`)."""

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
        self.router = Router(dim, config.num_experts)
        self.experts = Experts(self.num_local_experts, dim, hidden_dim, tag)

    def forward(self, x_BSD: Tensor, memory: ChoiceMemory | None = None) -> tuple[Tensor, RoutingStats]:
        """[B, S, D] -> the sum of gate times expert output [B, S, D], and what the router did.

        All ranks of an expert group must call this with the same B and S. What lies between `rows` and
        the return is one function of (x, rows, gate, experts): the seam for a fused autograd node.
        """
        affinity_BSE = self.router(x_BSD)
        capacity = self.config.capacity(x_BSD.shape[1])
        chosen = memory.index_BEC if memory else None
        routing = expert_choice(affinity_BSE, capacity, chosen, self.config.tie_break)
        if memory is not None:
            memory.index_BEC = routing.index_BEC
        rows = flat_index(routing.index_BEC, x_BSD.shape[1])
        x_eMD = to_local_experts(dispatch(x_BSD, rows, self.num_experts), self.group)
        y_END = from_local_experts(self.experts(x_eMD), self.group)
        y_BSD = combine(y_END, routing.gate_BEC, rows, x_BSD)
        return y_BSD, routing_stats(affinity_BSE, routing)
