"""Work on many files by several processes, or by this one."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from trainer.errors import require


@contextmanager
def map_by(num_workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """`map` by so many processes, which end with the block; Python's own for 0. What they do must be a module's."""
    if num_workers == 0:
        yield map
        return
    with ProcessPoolExecutor(num_workers, initializer=_end_quietly) as pool:
        yield pool.map


def _end_quietly() -> None:
    """Ctrl-C reaches a worker, too, which has nothing to say of it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def check_num_workers(num_workers: int) -> None:
    """ConfigError unless this machine has as many cores."""
    limit = os.cpu_count() or 1
    require(0 <= num_workers <= limit, f"--num-workers is {num_workers}: use 0 to {limit}")
