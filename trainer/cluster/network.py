"""Measures the network between the processes of a job: collectives must be right, pairs of nodes may be slow.

Works on gloo and NCCL alike. Bandwidths in GB/s per direction, the best of a few tries: the first opens connections.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from trainer.distributed import gather

TRIES = 3
MAX_ROUNDS = 16  # of pairs; with more nodes each is measured against that many others
SLOW, BROKEN = 1 / 2, 1 / 4  # of the median node's bandwidth


@dataclass(frozen=True, kw_only=True)
class Network:
    """`wrong`: sentences on wrong results; `pair`: bandwidths by the numbers of both nodes; `clock`: each Unix time."""

    wrong: list[str]
    all_reduce: float
    all_to_all: float
    pair: dict[int, dict[int, float]]
    clock: list[float]


def measure(rank: int, world_size: int, local_size: int, device: torch.device) -> Network:
    """Measure on all processes together; each of them gets the whole result."""
    length = (1 << 22) if device.type == "cpu" else (1 << 26)
    wrong = [*_check_sum(rank, world_size, device), *_check_exchange(rank, world_size, device)]
    values = torch.ones(length, device=device)
    received = torch.empty(length - length % world_size, device=device)
    sent = torch.ones_like(received)
    reduced = _best(lambda: dist.all_reduce(values), device)
    exchanged = _best(lambda: dist.all_to_all_single(received, sent), device)
    pair = _pairs(rank, world_size // local_size, local_size, length, device)
    dist.barrier()
    clock = time.time()
    parts = gather((wrong, pair, clock))
    factor = 2 * (world_size - 1) / world_size * 4e-9 * length  # what a ring sends per process, in GB
    return Network(
        wrong=[f"rank {number}: {words}" for number, part in enumerate(parts) for words in part[0]],
        all_reduce=factor / reduced,
        all_to_all=(world_size - 1) / world_size * 4e-9 * received.numel() / exchanged,
        pair={number // local_size: part[1] for number, part in enumerate(parts) if number % local_size == 0},
        clock=[part[2] for part in parts],
    )


def _check_sum(rank: int, world_size: int, device: torch.device) -> list[str]:
    values = torch.full((4097,), rank + 1.0, device=device)
    dist.all_reduce(values)
    expected = world_size * (world_size + 1) / 2
    return [] if bool((values == expected).all()) else [f"all-reduce gave {values[0].item()} instead of {expected}"]


def _check_exchange(rank: int, world_size: int, device: torch.device) -> list[str]:
    sent = (rank * world_size + torch.arange(world_size, device=device)).repeat_interleave(513)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    expected = (torch.arange(world_size, device=device) * world_size + rank).repeat_interleave(513)
    return [] if torch.equal(received, expected) else ["all-to-all delivered values of other processes"]


def _best(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest try, all processes starting together."""
    seconds = []
    for _ in range(TRIES):
        dist.barrier()
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def rounds(num_nodes: int) -> list[list[tuple[int, int]]]:
    """A tournament: each round pairs the nodes, and no pair meets twice. All pairs, up to `MAX_ROUNDS` rounds."""
    places: list[int | None] = [*range(num_nodes), *([None] if num_nodes % 2 else [])]
    half, plan = len(places) // 2, []
    for _ in range(min(len(places) - 1, MAX_ROUNDS)):
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        plan.append([(a, b) for a, b in pairs if a is not None and b is not None])
        places = [places[0], places[-1], *places[1:-1]]
    return plan


def _pairs(rank: int, num_nodes: int, local_size: int, length: int, device: torch.device) -> dict[int, float]:
    """Bandwidth of this node's first process with its partners in each round, both ways at once."""
    node, local_rank = divmod(rank, local_size)
    sent, received = torch.ones(length, device=device), torch.empty(length, device=device)
    found: dict[int, float] = {}
    for pairs in rounds(num_nodes):
        partner = next((a + b - node for a, b in pairs if node in (a, b)), None) if local_rank == 0 else None

        def swap(partner: int | None = partner) -> None:
            if partner is not None:
                ends = ((dist.isend, sent), (dist.irecv, received))
                for request in dist.batch_isend_irecv([dist.P2POp(o, x, partner * local_size) for o, x in ends]):
                    request.wait()

        seconds = _best(swap, device)
        if partner is not None:
            found[partner] = 4e-9 * length / seconds
    return found


def slow_nodes(pair: dict[int, dict[int, float]]) -> dict[int, float]:
    """Nodes whose median bandwidth is below half of the median node's, with that share. With two nodes: none."""
    medians = {node: statistics.median(partners.values()) for node, partners in pair.items() if partners}
    if len(medians) < 3:
        return {}
    typical = statistics.median(medians.values())
    return {node: median / typical for node, median in medians.items() if median < SLOW * typical}
