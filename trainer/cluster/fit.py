"""Whether a run's memory, as the planner counts it, fits into what a process has."""

from dataclasses import dataclass

from trainer.loop.start_checks import CheckedRun
from trainer.plan.devices import Efficiency
from trainer.plan.job import Job, configured_layout
from trainer.plan.memory import memory_terms

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Need:
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
        """The same words on every node, so that what is wrong on all of them is no node's fault."""
        return (
            f"a process needs {what} ({self.layout}), more than is free: use more nodes or another layout, "
            "`python -m trainer.plan` says which"
        )


def job_of(run: CheckedRun) -> Job:
    """The planner's view of a run."""
    zero = run.deepspeed_config["zero_optimization"]
    return Job(config=run.config, shape=run.model_shape, text_tokens=run.dataset.info.max_tokens, zero=zero)


def memory_need(run: CheckedRun, job: Job, *, on_device: bool) -> Need:
    """What a process of the run needs; a device's own share (context, communication) only where there is one."""
    layout, _ = configured_layout(run.config, run.world.size, run.topology.zero_stage)
    terms = {term.name: term.value for term in memory_terms(job, layout, Efficiency())}
    state = sum(terms[name] for name in ("weights", "gradients", "optimizer", "average"))
    return Need(layout=str(layout), state=state, peak=terms["peak"] - (0.0 if on_device else terms["reserved"]))
