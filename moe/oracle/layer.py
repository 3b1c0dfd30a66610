"""The MoE layer as plain loops over images, experts and tokens: the oracle of the tests.

Slow on purpose. It has the same parameters by name and shape as `moe.layer.MoeLayer` and shares nothing else with it:
capacity, choice, experts and combination are written out a second time. What the routers choose is in
`moe.oracle.choice`.
"""

import torch
from torch import Tensor, nn

from moe.config import MoeConfig
from moe.oracle.choice import TWINS, BareParameters, ScoredPool
from moe.routing import RoutingStats


class ReferenceMoe(nn.Module):
    """Algorithm 1 of the paper with any router that has a twin, one token at a time, all experts in one process."""

    def __init__(self, config: MoeConfig, *, dim: int, hidden_dim: int, group: None = None) -> None:
        super().__init__()
        E = config.num_experts
        self.config = config
        self.router = BareParameters(weight=(E, dim if config.router_input == "modulated" else 2 * dim))
        self.experts = BareParameters(w1=(E, hidden_dim, dim), w2=(E, dim, hidden_dim), w3=(E, 1, hidden_dim + dim))
        if config.num_shared_experts:
            width = config.num_shared_experts * hidden_dim
            self.shared = nn.ModuleDict({"up": nn.Linear(dim, width), "down": nn.Linear(width, dim)})
        self.choose, learned = TWINS[config.router]
        for name, module in learned(dim, E).items():
            self.add_module(name, module)

    def expert(self, number: int, x_D: Tensor) -> Tensor:
        """Output of one expert for one token."""
        weights: dict[str, Tensor] = dict(self.experts.named_parameters())
        hidden_dim = weights["w1"].shape[1]
        bias = weights["w3"][number, 0]
        hidden = torch.nn.functional.gelu(weights["w1"][number] @ x_D + bias[:hidden_dim])
        return weights["w2"][number] @ hidden + bias[hidden_dim:]

    def forward(
        self, x_BSD: Tensor, memory: object = None, unmodulated_BSD: Tensor | None = None, time_BD: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats]:
        """Same contract as `MoeLayer.forward`."""
        B, S, _ = x_BSD.shape
        per_pool = {"image": 1, "batch": B}.get(self.config.pool) or int(self.config.pool[6:-1])
        logits = [[self._logits(x_BSD, unmodulated_BSD, time_BD, b, s) for s in range(S)] for b in range(B)]
        out: list[Tensor] = []
        counts, kept, losses, drops = [], torch.zeros(()), [], []
        for first in range(0, B, per_pool):
            images = range(first, first + per_pool)
            tokens = [x_BSD[b, s] for b in images for s in range(S)]
            pool_logits = torch.stack([logits[b][s] for b in images for s in range(S)])
            pool = ScoredPool(self, tokens, pool_logits)
            chosen = self.choose(pool, self.config, self.training)
            for t, token in enumerate(tokens):
                total = sum((chosen.gates[t, e] for e in chosen.experts[t]), torch.zeros(()))
                y = torch.zeros_like(token)
                for e in chosen.experts[t]:
                    gate = chosen.gates[t, e] / total if self.config.normalize_gates else chosen.gates[t, e]
                    y = y + (gate * self.config.gate_scale).to(token.dtype) * self.expert(e, token)
                    kept = kept + torch.softmax(pool_logits[t], -1)[e].detach()
                if self.config.num_shared_experts:
                    y = y + self.shared["down"](torch.nn.functional.gelu(self.shared["up"](token)))
                out.append(y)
                counts.append(len(chosen.experts[t]))
            losses.append(chosen.loss)
            drops.append(chosen.dropped)
        p = torch.stack([torch.softmax(row, -1) for image in logits for row in image]).detach()
        stats = RoutingStats(
            experts_per_token_BS=torch.tensor(counts, dtype=torch.int32).view(B, S),
            gate_entropy=-(p * p.log()).sum(-1).mean(),
            affinity_kept=kept / (B * S),
            dropped=torch.tensor(sum(drops) / len(drops)),
            auxiliary_loss=self.config.auxiliary_weight * torch.stack(losses).mean(),
        )
        return torch.stack(out).view_as(x_BSD), stats

    def _logits(self, x_BSD: Tensor, unmodulated: Tensor | None, time: Tensor | None, b: int, s: int) -> Tensor:
        weight = dict(self.router.named_parameters())["weight"].float()
        if unmodulated is None or time is None or self.config.router_input == "modulated":
            return x_BSD[b, s].float() @ weight.T
        return torch.cat([time[b], unmodulated[b, s]]).float() @ weight.T
