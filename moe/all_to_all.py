"""Exchange of expert rows between the ranks of an expert group: equal splits, differentiable, beside other work.

With expert choice every expert takes the same number of tokens, so each rank sends each other rank a
block of one fixed size: one collective, no exchange of counts, no host synchronisation, no padding.

An exchange has a begin and an end, and what the host does between them runs beside it. Begin and end are each the
other's adjoint: in the backward pass the end sends the gradient off, and the begin waits for it. Autograd runs what was
recorded last first, so that what lay between the two in the forward pass lies between them in the backward pass, too.
A compiler must be told to keep it so: `COMPILER_OPTIONS`.

Shapes: E experts, e = E / ep_size local experts, R = ep_size, N rows of one expert from one rank, n of them in a
chunk, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Of `torch.compile`. As it is, inductor puts ends right behind their begins in the backward pass, to hold less at once.
# With these it moves ends down and begins up; exchanges keep their order, which must be that of the other ranks.
COMPILER_OPTIONS: dict[str, Any] = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["sink_waits", "raise_comms"],
}


@dataclass(frozen=True, kw_only=True)
class ExpertGroup:
    """The ranks that together hold all experts of a layer.

    `begin(tensor)` sends row block r to rank r and gives a tensor in which row block r is going to be what rank r sent;
    `end(tensor)` is that tensor when it has come, and nothing else may read it before. All ranks must begin their
    exchanges in the same order. Rank `rank` of the group holds experts `rank * E / size` to `(rank + 1) * E / size`.
    The rows of an expert go in `chunks` exchanges, the first of which are computed with while others are under way.
    """

    size: int
    rank: int
    begin: Callable[[Tensor], Tensor]
    end: Callable[[Tensor], Tensor]
    chunks: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not in an expert group of {self.size}")


class _Begin(torch.autograd.Function):
    """Rows that leave -> rows under way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ExpertGroup) -> Tensor:
        ctx.group = group
        return group.begin(x.contiguous())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.group.end(grad_outputs[0]), None


class _End(torch.autograd.Function):
    """Rows under way -> rows that have come."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ExpertGroup) -> Tensor:
        ctx.group = group
        return group.end(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.group.begin(grad_outputs[0].contiguous()), None


def largest(value: int, group: ExpertGroup | None, device: torch.device) -> int:
    """The largest `value` of the ranks of the group. Synchronises the host: only for routers without equal splits."""
    if group is None or group.size == 1:
        return value
    mine = torch.full((group.size,), value, dtype=torch.int64, device=device)
    return int(group.end(group.begin(mine)).max())


def send_rows(x_END: Tensor, group: ExpertGroup | None) -> list[Tensor]:
    """Begin to send each expert's rows to the rank that holds it: [E, N, D] -> chunks [E, n, D] that are under way.

    Without a group the rows themselves.
    """
    if group is None or group.size == 1:
        return [x_END]
    # The first chunk's outputs go back behind the last chunk's rows, so that the network never waits for an expert.
    return [_Begin.apply(part, group) for part in x_END.chunk(group.chunks, dim=1)]


def through_experts(sent: list[Tensor], experts: Callable[[Tensor], Tensor], group: ExpertGroup | None) -> Tensor:
    """What the experts make of the rows of `send_rows`, back on the ranks that these came from, [E, N, D].

    `experts` maps rows [e, R * n, D] of all ranks, ordered by source rank, to outputs of that shape; with chunks it is
    called once for each.
    """
    if group is None or group.size == 1:
        return experts(sent[0])
    R = group.size
    returning = []
    for part in sent:
        received: Tensor = _End.apply(part, group)  # block r holds what rank r sent to our experts
        E, n, D = received.shape
        x_eMD = received.view(R, E // R, n, D).transpose(0, 1).reshape(E // R, R * n, D)
        y_eMD = experts(x_eMD)
        by_source = y_eMD.view(E // R, R, n, D).transpose(0, 1).reshape(E, n, D)
        returning.append(_Begin.apply(by_source, group))
    returned = [_End.apply(part, group) for part in returning]
    return torch.cat(returned, dim=1) if len(returned) > 1 else returned[0]
