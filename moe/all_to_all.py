"""Exchange of expert rows between the ranks of an expert group: equal splits, differentiable.

With expert choice every expert takes the same number of tokens, so each rank sends each other rank a
block of one fixed size: one collective, no exchange of counts, no host synchronisation, no padding.

Shapes: E experts, e = E / ep_size local experts, R = ep_size, N rows of one expert from one rank, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ExpertGroup:
    """The ranks that together hold all experts of a layer.

    `exchange(output, input)` is a blocking equal-split all-to-all on the first axis. Rank `rank` of the
    group holds experts `rank * E / size` to `(rank + 1) * E / size`.
    """

    size: int
    rank: int
    exchange: Callable[[Tensor, Tensor], Any]

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not in an expert group of {self.size}")


class _AllToAll(torch.autograd.Function):
    """Equal-split all-to-all; its adjoint is the same exchange of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ExpertGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        output = torch.empty_like(x)
        group.exchange(output, x)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        grad = grad_outputs[0].contiguous()
        output = torch.empty_like(grad)
        ctx.group.exchange(output, grad)
        return output, None


def largest(value: int, group: ExpertGroup | None, device: torch.device) -> int:
    """The largest `value` of the ranks of the group. Synchronises the host: only for routers without equal splits."""
    if group is None or group.size == 1:
        return value
    mine = torch.full((group.size,), value, dtype=torch.int64, device=device)
    all_values = torch.empty_like(mine)
    group.exchange(all_values, mine)
    return int(all_values.max())


def to_local_experts(x_END: Tensor, group: ExpertGroup | None) -> Tensor:
    """Send each expert's rows to the rank that holds it: [E, N, D] -> [e, R * N, D].

    Local expert j gets the rows of all ranks, ordered by source rank. Identity without a group.
    """
    if group is None or group.size == 1:
        return x_END
    E, N, D = x_END.shape
    R = group.size
    received: Tensor = _AllToAll.apply(x_END, group)  # block r holds what rank r sent to our experts
    return received.view(R, E // R, N, D).transpose(0, 1).reshape(E // R, R * N, D)


def from_local_experts(y_eMD: Tensor, group: ExpertGroup | None) -> Tensor:
    """Send the outputs back to the ranks their rows came from: [e, R * N, D] -> [E, N, D]."""
    if group is None or group.size == 1:
        return y_eMD
    e, M, D = y_eMD.shape
    R = group.size
    by_source = y_eMD.view(e, R, M // R, D).transpose(0, 1).reshape(R * e, M // R, D)
    returned: Tensor = _AllToAll.apply(by_source, group)
    return returned
