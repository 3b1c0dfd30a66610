"""What may be said of runs: paired differences with intervals, steps to a loss, fitted lines.

Differences are paired by seed, since runs of one seed see the same scenes, noise and times. Intervals are of 95 %.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from benchmarks.compare.training import Record

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and half the width of its interval; NaN where one observation alone is at hand."""

    value: float
    margin: float

    def __str__(self) -> str:
        if math.isnan(self.margin) or self.margin == 0:
            return f"{self.value:.4g}"
        digits = max(0, 1 - math.floor(math.log10(self.margin)))  # two of the margin
        return f"{self.value:.{digits}f} +- {self.margin:.{digits}f}"

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return abs(self.value) > self.margin


def estimate(values: Sequence[float]) -> Estimate:
    """Mean with Student's interval."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Estimate(value=mean, margin=math.nan)
    spread = float(np.std(values, ddof=1)) / math.sqrt(count)
    return Estimate(value=mean, margin=spread * float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)))


def loss_of(record: Record, time: str = "mean", place: str = "all", step: int | None = None) -> float:
    """Validation loss at a measured step, by default the last."""
    return record.measured[str(step or record.step)][time][place]


def reduction(
    base: Mapping[int, Record], other: Mapping[int, Record], time: str = "mean", place: str = "all",
    step: int | None = None,
) -> Estimate:  # fmt: skip
    """By how many percent the other's loss is lower, over the seeds that both have."""
    seeds = sorted(set(base) & set(other))
    pairs = [(loss_of(base[s], time, place, step), loss_of(other[s], time, place, step)) for s in seeds]
    return estimate([100 * (1 - theirs / ours) for ours, theirs in pairs])


def validation_curve(record: Record) -> tuple[list[int], list[float]]:
    """Steps and mean validation losses."""
    steps = sorted(map(int, record.measured))
    return steps, [record.measured[str(step)]["mean"]["all"] for step in steps]


def steps_to(record: Record, loss: float) -> float:
    """Step at which the curve first comes down to a loss, between measures in a line; infinite where it never does."""
    steps, losses = validation_curve(record)
    for i, value in enumerate(losses):
        if value <= loss:
            if i == 0:
                return float(steps[0])
            share = (losses[i - 1] - loss) / (losses[i - 1] - value)
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return math.inf


def speedup(base: Mapping[int, Record], other: Mapping[int, Record]) -> Estimate:
    """How many times fewer steps the other takes to the base's final loss."""
    seeds = sorted(set(base) & set(other))
    return estimate([base[s].step / steps_to(other[s], loss_of(base[s])) for s in seeds])


@dataclass(frozen=True, kw_only=True)
class Line:
    """loss = intercept + slope log2(x), with the slope's interval."""

    intercept: float
    slope: Estimate

    def at(self, x: float) -> float:
        """The line's loss."""
        return self.intercept + self.slope.value * math.log2(x)


def fit_line(x: Sequence[float], loss: Sequence[float]) -> Line:
    """Least squares over log2(x)."""
    found = stats.linregress(np.log2(x), loss)
    margin = found.stderr * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 2)) if len(x) > 2 else math.nan
    return Line(intercept=float(found.intercept), slope=Estimate(value=float(found.slope), margin=float(margin)))
