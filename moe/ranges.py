"""Ranges of numeric settings, written beside the fields: `dim: int = field(default=64, metadata=at_least(1))`.

A range is always finite: nan and inf pass comparisons that look right, and ruin a run hours later.
"""

from dataclasses import dataclass, fields
from typing import Any

MOST = 10**9  # where a number has no natural end: more is a slip of the hand, and overflows somewhere


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; `open_low` and `open_high` leave out the end itself."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)  # nan is in neither

    def __str__(self) -> str:
        if self.open_low:
            return f"more than {self.low}, at most {self.high}"
        if self.high == MOST:
            return f"{self.low} or more, at most {self.high}"
        return f"{self.low} to {'below ' if self.open_high else ''}{self.high}"


def between(low: float, high: float) -> dict[str, Range]:
    """Metadata of a field: both ends belong to it."""
    return {"range": Range(low, high)}


def from_to_below(low: float, high: float) -> dict[str, Range]:
    """Metadata of a field: `high` does not belong to it."""
    return {"range": Range(low, high, open_high=True)}


def at_least(low: float) -> dict[str, Range]:
    """Metadata of a field without a natural upper end."""
    return between(low, MOST)


def more_than(low: float, high: float = MOST) -> dict[str, Range]:
    """Metadata of a field: `low` does not belong to it."""
    return {"range": Range(low, high, open_low=True)}


def check_ranges(settings: Any, section: str, error: type[ValueError] = ValueError) -> None:
    """Raise `error` with one sentence for a field that is outside its range; None is a number left out."""
    for field in fields(settings):
        value, allowed = getattr(settings, field.name), field.metadata.get("range")
        if allowed is not None and value is not None and value not in allowed:
            raise error(f"{section}{field.name} is {value}: use {allowed}")
