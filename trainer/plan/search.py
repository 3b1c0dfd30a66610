"""Finds the fastest layout of a job that fits into memory, and the smallest number of nodes that holds the model."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

from trainer.engine.elastic import divisors
from trainer.plan.devices import Device, Efficiency
from trainer.plan.job import Job, Layout, Term
from trainer.plan.memory import memory_terms
from trainer.plan.time import PARTS, time_terms

MAX_NODES, MAX_MICRO_BATCH = 1024, 256


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """One layout: its terms, whether it fits into `limit` bytes of usable memory, and if not why."""

    layout: Layout
    memory: list[Term]
    time: list[Term]
    limit: float
    refusal: str = ""  # why the layout cannot be started at all

    def value(self, name: str) -> float:
        """The value of the term with this name."""
        return next(term.value for term in (*self.memory, *self.time) if term.name == name)

    @property
    def fits(self) -> bool:
        """Whether it can be started and the peak is within the memory that may be used."""
        return not self.refusal and self.value("peak") <= self.limit

    @property
    def images_per_second(self) -> float:
        """Images that all ranks together train on per second."""
        return self.layout.global_batch_size / self.value("step")

    @property
    def reason(self) -> str:
        """Why it does not fit: what forbids it, or the largest term of memory."""
        if self.refusal:
            return self.refusal
        largest = max(self.memory[:-1], key=lambda term: term.value)
        return (
            f"peak {self.value('peak') / 1e9:.1f} GB of {self.limit / 1e9:.1f} GB usable, "
            f"{largest.name} alone {largest.value / 1e9:.1f} GB"
        )


def evaluate(job: Job, layout: Layout, device: Device, efficiency: Efficiency, refusal: str = "") -> PlanResult:
    """Memory and time of one layout."""
    return PlanResult(
        layout=layout,
        memory=memory_terms(job, layout, efficiency),
        time=time_terms(job, layout, device, efficiency),
        limit=device.memory * efficiency.memory,
        refusal=refusal,
    )


def layouts(job: Job, world_size: int, images_per_rank: int) -> Iterator[Layout]:
    """Every ep_size, ZeRO stage, micro-batch size and recomputation that a run would accept.

    The micro-batch divides `images_per_rank` and is whole expert pools; ep_size divides processes and experts.
    """
    group = job.config.moe.group_size if job.counts.num_moe else 1
    shared = gcd(job.config.moe.num_experts, world_size) if job.counts.num_moe else 1
    for micro in divisors(images_per_rank):
        if micro > MAX_MICRO_BATCH or (group and micro % group):
            continue
        for ep_size in divisors(shared):
            for stage in (1, 2, 3):
                for recompute in (False, True):
                    yield Layout(
                        world_size=world_size, ep_size=ep_size, stage=stage, micro_batch_size=micro,
                        accumulation=images_per_rank // micro, recompute=recompute,
                    )  # fmt: skip


def search(job: Job, world_size: int, images_per_rank: int, device: Device, efficiency: Efficiency) -> list[PlanResult]:
    """All layouts: those that fit first, the fastest first.

    Among equals, as many are where the host decides: what leaves the GPU less to do, without recomputation, the lower
    stage, less memory.
    """
    found = [evaluate(job, layout, device, efficiency) for layout in layouts(job, world_size, images_per_rank)]

    def order(outcome: PlanResult) -> tuple[float, ...]:
        layout, step = outcome.layout, outcome.value("step")
        busy = round(step - outcome.value("host wait"), 4)
        return not outcome.fits, round(step, 3), busy, layout.recompute, layout.stage, outcome.value("peak")

    return sorted(found, key=order)


def smallest_nodes(job: Job, device: Device, efficiency: Efficiency) -> int | None:
    """The smallest number of nodes on which some layout holds the model at the smallest micro-batch, if any does."""
    group = max(1, job.config.moe.group_size) if job.counts.num_moe else 1
    for nodes in range(1, MAX_NODES + 1):
        options = layouts(job, nodes * device.per_node, group)
        if any(evaluate(job, layout, device, efficiency).fits for layout in options):
            return nodes
    return None


def best_of_each(outcomes: list[PlanResult], key: str) -> list[PlanResult]:
    """The first outcome of each `ep_size` or `stage`, in order."""
    seen: dict[int, PlanResult] = {}
    for outcome in outcomes:
        seen.setdefault(getattr(outcome.layout, key), outcome)
    return list(seen.values())


def why_slower(best: PlanResult, other: PlanResult) -> str:
    """What `best` has against `other`: memory, or the part of the step that costs the other most."""
    if not other.fits:
        return other.reason
    more = {name: other.value(name) - best.value(name) for name in PARTS}
    part, slower = max(more, key=lambda name: more[name]), other.value("step") - best.value("step")
    return f"{slower:.3f} s more, most of all {part}: {more[part]:+.3f} s" if slower >= 5e-4 else "as fast"
