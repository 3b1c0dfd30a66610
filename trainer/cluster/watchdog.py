"""Ends a process that hangs: exit code 1, and the stacks of all its threads on stderr.

Beside the training thread three things watch a run. Each has a reason not to share a thread with the others:

| what it does                       | thread                  | why it is alone                                   |
|------------------------------------|-------------------------|---------------------------------------------------|
| ends this process at a time limit  | here: faulthandler's, C | works while a call that hangs holds the GIL       |
| tells the others how far it is     | heartbeat.py's          | may not wait for files: its silence ends the job  |
| renews the lease on the run folder | filelock's (run_lock)   | writes a file, so it hangs with the file system   |

`faulthandler` has one alarm for the whole process, so all limits share it here; the earliest counts.
"""

import faulthandler
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

ARRIVAL_SECONDS = 60.0  # how long a rank on its way out after an error waits for the others to get there, too
_limits: dict[str, float] = {}  # cause -> when, on the monotonic clock
_guard = Lock()  # the heartbeat's thread sets limits, too


def end_within(seconds: float, cause: str = "leaving") -> None:
    """This process ends after `seconds`, unless a later limit of the same cause takes this one's place."""
    _set_limit(cause, time.monotonic() + seconds)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End the process as `end_within` unless the block is left in time; limits of other causes stay."""
    end_within(seconds)
    try:
        yield
    finally:
        _set_limit("leaving", None)


def _set_limit(cause: str, end: float | None) -> None:
    with _guard:
        _limits.pop(cause, None)
        if end is not None:
            _limits[cause] = end
        faulthandler.cancel_dump_traceback_later()
        if _limits:
            rest = max(min(_limits.values()) - time.monotonic(), 1e-3)
            faulthandler.dump_traceback_later(rest, exit=True, file=sys.__stderr__ or 2)
