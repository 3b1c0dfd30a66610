"""Signals that ask a run to save and end. Standard library only: installed before anything heavy is imported.

| signal            | effect                                                                            |
|-------------------|-----------------------------------------------------------------------------------|
| SIGTERM, SIGUSR1  | remembered; all ranks save at the next step boundary and leave with exit code 0   |
| SIGHUP            | the same when a terminal closes; stays ignored in a process started with `nohup`  |
| SIGINT            | the same the first time, with exit code 130; the second time the process dies of  |
|                   | it at once, unsaved                                                               |
| launcher's death  | the same: torchrun passes SIGTERM, SIGINT and SIGHUP on, but SIGUSR1 kills it;    |
|                   | of `deepspeed` either of its two processes, the outer of which passes on less     |

A task may be started with the others ignored (`trap "" USR1`), so that none kills it while Python starts: the
handlers take over here. A batch script may repeat its signal; repetitions change nothing, also after the end.
"""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

_STOPPING = (
    b"\nstopping: the run is saved after this step, and the same command goes on from there; Ctrl-C again ends it at "
    b"once, unsaved\n"
)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# Set by torchrun and by `deepspeed`, whose workers must not outlive them; a shell may end before what it started.
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")


class StopSignal:
    """Remembers a signal until the ranks agree on it; a context manager around the whole run.

    Enter it in the main thread. On leaving, the previous handlers come back, except after a signal was
    received: then all but SIGINT are ignored until the process has ended.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._interrupted = False
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

        self._launcher = os.getppid() if any(name in os.environ for name in LAUNCHERS) else 0
        self._runner = _runner_of(self._launcher)

    @property
    def interrupted(self) -> bool:
        """Whether it was Ctrl-C."""
        return self._interrupted

    @property
    def received(self) -> bool:
        """Whether a signal came, or the launcher is gone. Asked once a step, so that no thread has to watch."""
        if self._signalled or self._launcher not in (0, os.getppid()):
            return True
        return bool(self._runner) and _parent(self._launcher) != self._runner

    def __enter__(self) -> "StopSignal":
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, previous in self._previous.items():
            late = self.received and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if late else previous)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        if number == signal.SIGINT and not self._interrupted:
            self._interrupted = True
            if os.environ.get("RANK", "0") == "0":
                os.write(2, _STOPPING)  # print is not for handlers, which may interrupt it
        self._signalled = True


def _parent(process: int) -> int:
    """Of another process; 0 if it is gone."""
    with suppress(OSError):
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _runner_of(launcher: int) -> int:
    """The `deepspeed` command that started the launcher of this process; 0 without one: a shell may end before."""
    with suppress(OSError):
        parent = _parent(launcher) if launcher else 0
        words = Path(f"/proc/{parent}/cmdline").read_text().split("\0")[:2] if parent else []
        return parent if any(Path(word).name == "deepspeed" for word in words) else 0
    return 0
