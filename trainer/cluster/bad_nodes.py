"""Nodes that a run's own checks found bad, each for a limited time: `RUN/bad_nodes`, one line a finding.

A line is `NODE UNIX_TIME REASON`; the time is when the exclusion ends, since nodes get repaired and a pending job
cannot take back an exclusion by itself.
"""

import time
from collections.abc import Sequence
from pathlib import Path

FILE_NAME = "bad_nodes"


def add(run_dir: Path, node: str, reason: str, hours: float) -> None:
    """Remember a bad node for some hours."""
    with (run_dir / FILE_NAME).open("a") as file:
        file.write(f"{node} {time.time() + hours * 3600:.0f} {reason}\n")


def excluded(run_dir: Path, available: Sequence[str], needed: int) -> list[str]:
    """Nodes to leave out of the next start: those whose time is not over, unless too few of `available` were left.

    Then the oldest findings are dropped until `needed` nodes remain: a job that cannot start helps nobody.
    """
    path, newest = run_dir / FILE_NAME, dict[str, float]()
    for line in path.read_text().splitlines() if path.exists() else ():
        node, until, *_ = line.split(maxsplit=2)
        newest[node] = max(newest.get(node, 0.0), float(until))
    bad = sorted((node for node, until in newest.items() if until > time.time()), key=lambda node: newest[node])
    while bad and len(set(available) - set(bad)) < needed:
        bad.pop(0)
    return sorted(bad)
