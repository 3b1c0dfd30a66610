"""The expert-choice layer as plain loops over images, experts and tokens: the oracle of the tests.

Slow on purpose. It shares the parameters' names and shapes with `moe.layer.ExpertChoiceMoe`, and
nothing else: capacity, choice, experts and combination are written out a second time.
"""

import torch
from torch import Tensor, nn

from moe.config import MoeConfig
from moe.routing import RoutingStats


class _Weights(nn.Module):
    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))


class ReferenceMoe(nn.Module):
    """Algorithm 1 of the paper, one token at a time, all experts in one process."""

    def __init__(self, config: MoeConfig, *, dim: int, hidden_dim: int, group: None = None) -> None:
        super().__init__()
        E = config.num_experts
        self.config = config
        self.router = _Weights(weight=(E, dim))
        self.experts = _Weights(w1=(E, hidden_dim, dim), w2=(E, dim, hidden_dim), w3=(E, 1, hidden_dim + dim))

    def expert(self, number: int, x_D: Tensor) -> Tensor:
        """Output of one expert for one token."""
        weights: dict[str, Tensor] = dict(self.experts.named_parameters())
        hidden_dim = weights["w1"].shape[1]
        bias = weights["w3"][number, 0]
        hidden = torch.nn.functional.gelu(weights["w1"][number] @ x_D + bias[:hidden_dim])
        return weights["w2"][number] @ hidden + bias[hidden_dim:]

    def forward(self, x_BSD: Tensor, memory: object = None) -> tuple[Tensor, RoutingStats]:
        """Same contract as `ExpertChoiceMoe.forward`."""
        B, S, _ = x_BSD.shape
        E = self.config.num_experts
        capacity = int(S * self.config.capacity_factor / E + 1e-9)
        router_weight = dict(self.router.named_parameters())["weight"]
        affinity_BSE = torch.stack([torch.softmax(x_SD.float() @ router_weight.float().T, -1) for x_SD in x_BSD])
        count_BS = torch.zeros(B, S, dtype=torch.int32)
        kept = torch.zeros(())
        images = []
        for b in range(B):
            tokens = [torch.zeros_like(x_BSD[b, s]) for s in range(S)]
            for i in range(E):
                turn = i * S // E if self.config.tie_break == "rotate" else 0
                tokens_in_turn = [(turn + j) % S for j in range(S)]
                best = sorted(tokens_in_turn, key=lambda s: -float(affinity_BSE[b, s, i].detach()))[:capacity]
                for s in best:
                    gate = affinity_BSE[b, s, i]
                    tokens[s] = tokens[s] + gate.to(x_BSD.dtype) * self.expert(i, x_BSD[b, s])
                    count_BS[b, s] += 1
                    kept = kept + gate.detach()
            images.append(torch.stack(tokens))
        p = affinity_BSE.detach()
        stats = RoutingStats(
            experts_per_token_BS=count_BS,
            gate_entropy=-(p * p.log()).sum(-1).mean(),
            affinity_kept=kept / (B * S),
        )
        return torch.stack(images), stats
