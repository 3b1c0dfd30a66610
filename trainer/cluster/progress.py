"""How far each process has come, how long it may stay there, and who is behind when it stays too long.

A heartbeat proves that a process lives, not that it gets on. So the training thread notes each phase that it enters,
and the heartbeat's thread sends that with the beats. Ranks meet in collectives, so that one that hangs soon stops all:
what tells it from those that wait is that it has entered fewer collectives. Torch counts them per group, on the host
and at no cost to a step; all ranks enter them in one order, so their sum orders the ranks. Phases decide between two.

| phase                                         | limit in units of `train.hang_seconds`                          |
|-----------------------------------------------|-----------------------------------------------------------------|
| begin, data, forward, backward ... of a step  | 1, or 2.5 times the slowest step if that is more                |
| load, save, samples, compile                  | 10, or 2.5 times the slowest of its kind                        |
| each of these until one has ended (but not    | 20, or as long as a collective may take (DEEPSPEED_TIMEOUT)     |
| the first step: it compiles), start-up, end   |                                                                 |
| leaving, after an error                       | none: trainer/loop/leaving.py and time limits of its own end it |

Time is counted in beats of the own process, so a job that was suspended as a whole (SIGSTOP) has missed only one.
"""

import math
import os
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from trainer.cluster.incidents import Incident
from trainer.cluster.node import node_name

FACTOR = 2.5  # and some beats until it is noticed: within 3 times the slowest
FIRST, OTHER, LEAVING = 20.0, 10.0, "leaving"
KINDS = ("start-up", "load", "save", "samples", "compile", "end", LEAVING)  # all other phases are parts of a step
BEATS_PER_LIMIT = 12


@dataclass(frozen=True, kw_only=True)
class Beat:
    """Where a process is. `moves` counts the phases entered, `still` seconds without one; `overdue`: for too long."""

    rank: int
    node: str
    pid: int
    step: int
    phase: str
    moves: int
    collectives: int
    still: float
    overdue: bool

    @property
    def place(self) -> tuple[int, int]:
        """Grows with progress, alike on all ranks."""
        return self.collectives, self.moves

    @property
    def where(self) -> str:
        """For a sentence."""
        return f"{self.phase} of step {self.step}" if self.phase not in KINDS else f"{self.phase} (step {self.step})"


class Progress:
    """What the training thread says of itself; `look` is for the heartbeat's thread. `hang_seconds` 0 sets no limit."""

    def __init__(self, hang_seconds: float = 0.0) -> None:
        self.hang_seconds = hang_seconds
        self.first_seconds = max(FIRST * hang_seconds, 60 * float(os.environ.get("DEEPSPEED_TIMEOUT") or 0))
        self.step, self.phase, self.moves = 0, "start-up", 0
        self.slowest: dict[str, float] = {}
        self._warm, self._compiled = False, 0.0
        self._seen, self._still, self._clock, self._interval = 0, 0.0, 0.0, 0.0

    def enter(self, phase: str) -> None:
        """The training thread begins something else."""
        self.phase = phase
        self.moves += 1

    @contextmanager
    def within(self, kind: str) -> Iterator[None]:
        """A phase of its own, or as `step` a whole step with its phases, whose time is learned."""
        start, beats, apart = time.perf_counter(), self._clock, self._compiled
        self.enter("begin" if kind == "step" else kind)
        yield
        # In beats, too: else a job that was suspended as a whole in between would have learned that as normal.
        seconds = min(time.perf_counter() - start, self._clock - beats + 2 * self._interval)
        if kind == "compile":
            self._compiled += seconds
        self._learn(kind, seconds - (self._compiled - apart if kind == "step" else 0.0))

    def _learn(self, kind: str, seconds: float) -> None:
        if kind == "step" and not self._warm:  # the first one compiles, so it is not normal
            self._warm = True
        else:
            self.slowest[kind] = max(self.slowest.get(kind, 0.0), seconds)

    def limit(self, phase: str) -> float:
        """Seconds that the phase may take, as far as is known."""
        kind = phase if phase in KINDS else "step"
        if kind == LEAVING or kind not in self.slowest:
            return math.inf if kind == LEAVING else self.first_seconds
        return max((1.0 if kind == "step" else OTHER) * self.hang_seconds, FACTOR * self.slowest[kind])

    def look(self, rank: int, interval: float) -> Beat:
        """Call it every `interval` seconds."""
        moves, phase = self.moves, self.phase
        self._still = self._still + interval if moves == self._seen else 0.0
        self._seen, self._clock, self._interval = moves, self._clock + interval, interval
        return Beat(
            rank=rank, node=node_name(), pid=os.getpid(), step=self.step, phase=phase, moves=moves,
            collectives=collectives_entered(), still=self._still,
            overdue=bool(self.hang_seconds) and self._still >= self.limit(phase),
        )  # fmt: skip


def collectives_entered() -> int:
    """By this process, in all of its groups. Torch 2.14 has no public way to ask."""
    groups = list(torch.distributed.distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)  # type: ignore[attr-defined]


def judge(beats: Sequence[Beat], quiet: Collection[int], interval: float) -> Incident | None:
    """Who hangs, as all beats together tell; None while nobody is overdue. `quiet` are ranks that have stopped beating.

    Of those overdue most only wait for another. Rank -1 if no rank is behind.
    """
    # A rank on its way out after an error has said why, and ends in bounded time; the others only wait for it.
    if not any(beat.overdue for beat in beats) or any(beat.phase == LEAVING for beat in beats):
        return None
    first, last = max(beats, key=lambda beat: beat.place), min(beats, key=lambda beat: beat.place)
    behind = [b for b in beats if b.rank in quiet] or [b for b in beats if b.place == last.place]
    if any(b.still < 2 * interval and b.rank not in quiet for b in behind):
        return None  # it has just gone on
    if any(b.phase == "compile" and not b.overdue and b.rank not in quiet for b in behind):
        return None  # that may take longer than the phase in which others wait for it
    seconds, one = max(beat.still for beat in beats), behind[0]
    if len(behind) == len(beats) > 1:
        return _incident(
            "hung", f"all ranks hang in {one.where}, none is behind (no progress for {seconds:.0f} s): "
            "look at network, devices and file system",
        )  # fmt: skip
    ahead = "" if len(beats) == 1 else f"; others are ahead, in {first.where}"
    also = "" if len(behind) == 1 else f", as do {len(behind) - 1} more, the last of them rank {behind[-1].rank}"
    how = "stopped beating" if one.rank in quiet else "hangs"
    sentence = f"rank {one.rank} on node {one.node} {how} in {one.where} (no progress for {seconds:.0f} s){also}{ahead}"
    # Processes of several nodes at once: nobody can say which of these is to blame.
    node = one.node if len({beat.node for beat in behind}) == 1 else ""
    return _incident("silent" if one.rank in quiet else "hung", sentence, one.rank, node, one.pid)


def _incident(reason: str, sentence: str, rank: int = -1, node: str = "", pid: int = 0) -> Incident:
    return Incident(kind="lost_peer", rank=rank, node=node, pid=pid, reason=reason, sentence=sentence)
