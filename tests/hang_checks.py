"""A run of three ranks, one of which stops getting on; `tests/test_hangs.py` starts them, each by itself.

RANK=0 WORLD_SIZE=3 ... python tests/hang_checks.py FOLDER HOW

The ranks claim to be on two nodes, n0 with rank 0 and n1 with ranks 1 and 2.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.cluster.incidents import VARIABLE as INCIDENTS
from trainer.cluster.outcome import VARIABLE as OUTCOME
from trainer.train import start

CULPRIT, STEP, HANG_SECONDS = 1, 5, 2.0
SETTINGS = [
    "train.micro_batch_size=2", "train.max_steps=100000", "train.checkpoint_every=2", "parallel.ep_size=1",
    "moe.num_experts=4", "model.dim=16", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1",
    "data.image_size=8", f"train.hang_seconds={HANG_SECONDS}",
]  # fmt: skip


def stall(folder: Path, how: Callable[[], object]) -> None:
    """Note when it began, then do not come back."""
    (folder / "stalled").write_text(str(time.time()))
    how()


def hold_the_interpreter() -> None:
    """Native code that never lets another thread run."""
    ctypes.PyDLL(None).sleep(600)


WAYS: dict[str, tuple[str, Callable[[], object]]] = {  # where, and what happens there
    "asleep": ("train_step", lambda: time.sleep(600)),
    "stopped": ("train_step", lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "interpreter": ("train_step", hold_the_interpreter),
    "data": ("next_step", lambda: time.sleep(600)),
    "absent": ("gather_loss", lambda: threading.Event().wait()),
}


def stalling(function: Callable[..., Any], folder: Path, how: Callable[[], object]) -> Callable[..., Any]:
    """The function; in its call number STEP it stalls first."""
    calls = iter(range(1, 1_000_000))

    def run(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == STEP:
            stall(folder, how)
        return function(*args, **kwargs)

    return run


def main(folder: Path, name: str) -> None:
    rank = int(os.environ["RANK"])
    socket.gethostname = lambda: f"n{(rank + 1) // 2}"
    os.environ |= {INCIDENTS: str(folder / f"7.0.{rank}.jsonl"), OUTCOME: str(folder / "outcome.json")}
    from trainer.cluster import heartbeat
    from trainer.loop import loop, step

    heartbeat.HANG_GRACE_SECONDS = 4.0
    if rank == CULPRIT:
        place, how = WAYS[name]
        if place == "gather_loss":  # the step's one collective of the loop's own, entered by all but this rank
            step.all_reduce_mean = stalling(step.all_reduce_mean, folder, how)
        else:
            setattr(loop, place, stalling(getattr(loop, place), folder, how))
    with StopSignal() as stop:
        start("debug", [f"run_dir={folder / 'run'}", *SETTINGS], stop)


if __name__ == "__main__":
    from trainer.loop.signals import StopSignal

    main(Path(sys.argv[1]), sys.argv[2])
