"""Ends a run while its last checkpoint still fits before the job's time limit.

The deadline is a Unix time in `TRAIN_DEADLINE`, set by the batch script. A run needs time for one more step, for the
save after it, and a margin to leave (`TRAIN_DEADLINE_MARGIN`, seconds). Of steps and saves the longest counts.
"""

import math
import os
import time

DEADLINE, MARGIN = "TRAIN_DEADLINE", "TRAIN_DEADLINE_MARGIN"
DEFAULT_MARGIN = 60.0
SLACK = 1.5  # a save may take longer than any before: the file system is shared


class TimeBudget:
    """How much time is left, against what the end of a run takes; `deadline` in Unix seconds."""

    def __init__(self, deadline: float = math.inf, margin: float = DEFAULT_MARGIN) -> None:
        self.deadline, self.margin = deadline, margin
        self.longest_step = self.longest_save = 0.0

    @classmethod
    def from_environment(cls) -> "TimeBudget":
        """As the batch script says; without a deadline the budget is never spent."""
        return cls(float(os.environ.get(DEADLINE) or math.inf), float(os.environ.get(MARGIN) or DEFAULT_MARGIN))

    def stepped(self, seconds: float) -> None:
        """A step took so long."""
        self.longest_step = max(self.longest_step, seconds)

    def saved(self, seconds: float) -> None:
        """A checkpoint took so long."""
        self.longest_save = max(self.longest_save, seconds)

    @property
    def needed(self) -> float:
        """Seconds that one more step, its save and leaving take."""
        return SLACK * (self.longest_step + self.longest_save) + self.margin

    def is_spent(self) -> bool:
        """Whether there is no time for another step and a save after it. Never before the first step of a start."""
        return self.longest_step > 0 and time.time() + self.needed > self.deadline
