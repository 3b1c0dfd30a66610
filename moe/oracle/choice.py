"""What each router chooses in one pool, by plain loops over tokens and experts; part of `moe.oracle.layer`.

A formula of their own: nothing here is shared with `moe.routing` and `moe.routers`. A router's twin is found by the
router's name in `TWINS`. Shapes: T tokens of a pool, D width, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe.config import MoeConfig


class BareParameters(nn.Module):
    """Parameters of these names and shapes, and nothing else."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))


@dataclass
class Chosen:
    """`experts[t]` took token t; `gates[t, e]` before normalisation; the router's loss and share of lost choices."""

    experts: list[list[int]]
    gates: Tensor
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    dropped: float = 0.0


@dataclass
class ScoredPool:
    """The pool as a router sees it: tokens, logits [T, E] and what the layer learns beside them."""

    layer: Any
    tokens: list[Tensor]
    logits: Tensor

    def affinity(self, config: MoeConfig) -> Tensor:
        """[T, E] by the configured gate."""
        if config.gate == "identity":
            return self.logits
        if config.gate == "sigmoid":
            return 1 / (1 + (-self.logits).exp())
        return torch.stack([row.exp() / row.exp().sum() for row in self.logits])

    def predicted(self) -> Tensor:
        """The capacity predictor's logits [T, E]."""
        up, down = self.layer.predictor["up"], self.layer.predictor["down"]
        hidden = [up(token.detach()) for token in self.tokens]
        return torch.stack([down(h * torch.sigmoid(h)) for h in hidden])

    def threshold(self) -> Tensor:
        """[E] or [1]: ten times the parameter."""
        value: Tensor = 10.0 * dict(self.layer.threshold.named_parameters())["value"]
        return value


Choose = Callable[[ScoredPool, MoeConfig, bool], Chosen]  # the last argument: in training
Learn = Callable[[int, int], dict[str, nn.Module]]  # (D, E) -> what is learned beside the router, by name


def _capacity(config: MoeConfig, num_tokens: int) -> int:
    return int(num_tokens * config.capacity_factor / config.num_experts + 1e-9)


def _top_tokens(affinity: Tensor, config: MoeConfig, expert: int) -> list[int]:
    T = len(affinity)
    turn = expert * T // config.num_experts if config.tie_break == "rotate" else 0
    in_turn = [(turn + j) % T for j in range(T)]
    return sorted(in_turn, key=lambda t: -float(affinity[t, expert].detach()))[: _capacity(config, T)]


def _expert_choice(pool: ScoredPool, config: MoeConfig, training: bool) -> Chosen:
    affinity = pool.affinity(config)
    experts: list[list[int]] = [[] for _ in pool.tokens]
    for e in range(config.num_experts):
        for t in _top_tokens(affinity, config, e):
            experts[t].append(e)
    return Chosen(experts, affinity)


def _token_choice(pool: ScoredPool, config: MoeConfig, training: bool) -> Chosen:
    affinity = pool.affinity(config)
    T, E = affinity.shape
    wishes = [sorted(range(E), key=lambda e: -float(affinity[t, e].detach()))[: config.top_k] for t in range(T)]
    experts: list[list[int]] = [[] for _ in range(T)]
    load = [0] * E
    for choice in range(config.top_k):
        for t in range(T):
            e = wishes[t][choice]
            if load[e] < _capacity(config, T):
                experts[t].append(e)
            load[e] += 1
    gates = torch.stack([affinity[t] / sum(affinity[t, e] for e in wishes[t]) for t in range(T)])
    probability = torch.softmax(pool.logits, -1)
    loss = torch.zeros(())
    for e in range(E):
        first = sum(1 for t in range(T) if wishes[t][0] == e) / T
        loss = loss + E * first * probability[:, e].sum() / T
    lost = 1 - sum(map(len, experts)) / (T * config.top_k)
    return Chosen(experts, gates, loss, lost)


def _diffmoe(pool: ScoredPool, config: MoeConfig, training: bool) -> Chosen:
    affinity, predicted, threshold = pool.affinity(config), pool.predicted(), pool.threshold()
    T, E = affinity.shape
    if not training:
        taken = [[t for t in range(T) if predicted[t, e] > threshold[e]] for e in range(E)]
        if config.sampling_choice == "gate":
            best = [sorted(range(T), key=lambda t: -float(affinity[t, e].detach())) for e in range(E)]
            taken = [best[e][: len(taken[e])] for e in range(E)]
        return Chosen([[e for e in range(E) if t in taken[e]] for t in range(T)], affinity)
    chosen = _expert_choice(pool, config, training)
    for t in range(T):
        for e in range(E):
            p = torch.sigmoid(predicted[t, e])
            chosen.loss = chosen.loss - torch.log(p if e in chosen.experts[t] else 1 - p) / (T * E)
    for e in range(E):
        last = sorted(predicted[:, e].tolist(), reverse=True)[_capacity(config, T) - 1]
        chosen.loss = chosen.loss + 0.5 * (threshold[e] - last) ** 2 / E
    return chosen


def _expert_race(pool: ScoredPool, config: MoeConfig, training: bool) -> Chosen:
    affinity, threshold = pool.affinity(config), pool.threshold()
    T, E = affinity.shape
    if not training:
        return Chosen([[e for e in range(E) if affinity[t, e] > threshold[0]] for t in range(T)], affinity)
    pairs = sorted(((float(affinity[t, e].detach()), t, e) for t in range(T) for e in range(E)), reverse=True)
    taken = pairs[: int(T * config.capacity_factor + 1e-9)]
    experts = [sorted(e for _, at, e in taken if at == t) for t in range(T)]
    probability = torch.softmax(pool.logits, -1)
    own = sum(1 for row in experts for _ in row)
    other = sum(1 for row in experts for i in row for j in row if i != j)
    loss = torch.zeros(())
    for i in range(E):
        for j in range(E):
            both = sum(1 for row in experts if i in row and j in row)
            weight = E * both / own if i == j else (E * E - E) * both / max(1, other)
            loss = loss + weight * (probability[:, i] * probability[:, j]).sum() / T
    loss = loss + 0.5 * ((threshold[0] - taken[-1][0]) ** 2)
    return Chosen(experts, affinity, loss)


def _predictor_and_thresholds(dim: int, num_experts: int) -> dict[str, nn.Module]:
    predictor = nn.ModuleDict({"up": nn.Linear(dim, dim), "down": nn.Linear(dim, num_experts)})
    return {"predictor": predictor, "threshold": BareParameters(value=(num_experts,))}


TWINS: dict[str, tuple[Choose, Learn]] = {
    "expert_choice": (_expert_choice, lambda dim, num_experts: {}),
    "token_choice": (_token_choice, lambda dim, num_experts: {}),
    "diffmoe": (_diffmoe, _predictor_and_thresholds),
    "expert_race": (_expert_race, lambda dim, num_experts: {"threshold": BareParameters(value=(1,))}),
}
