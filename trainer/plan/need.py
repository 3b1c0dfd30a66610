"""Whether the memory that a process of a job needs, as the planner counts it, fits into what it has."""

from dataclasses import dataclass

from trainer.plan.devices import GB, Efficiency
from trainer.plan.job import Job, Layout
from trainer.plan.memory import memory_terms


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """Bytes that a process needs: its `state` lasts and is counted exactly, its `peak` is an estimate."""

    layout: str
    state: float
    peak: float

    def problem(self, free: float) -> str:
        """The sentence if not even the state fits into `free` bytes; empty otherwise."""
        if self.state <= free:
            return ""
        return self._sentence(f"{self.state / GB:.1f} GB of weights, gradients and optimizer state")

    def warning(self, free: float) -> str:
        """The sentence if the state fits but the expected peak does not; empty otherwise."""
        if self.problem(free) or self.peak <= free:
            return ""
        return self._sentence(f"about {self.peak / GB:.1f} GB at its peak")

    def _sentence(self, what: str) -> str:
        """The same words on every node: a problem that all nodes report alike is no node's fault."""
        return (
            f"a process needs {what} ({self.layout}), more than is free: use more nodes or another layout, "
            "`python -m trainer.plan` says which"
        )


def memory_need(job: Job, layout: Layout, *, on_device: bool) -> MemoryNeed:
    """What a process needs; a device's own share (context, communication) only where there is one."""
    terms = {term.name: term.value for term in memory_terms(job, layout, Efficiency())}
    state = sum(terms[name] for name in ("weights", "gradients", "optimizer", "average"))
    return MemoryNeed(layout=str(layout), state=state, peak=terms["peak"] - (0.0 if on_device else terms["reserved"]))
