"""Leaving a run after an error: together if all ranks can be reached, in bounded time, never in silence.

Two ways lead here. An error that concerns one rank only and leaves its state sound (reading data, writing logs) is held
until the ranks exchange their flags at the end of the step, so that nobody waits for a rank that has left. An error
inside collective work between two steps is raised at once; then `all_ranks_arrive` finds out, over connections of its
own, whether every rank is out of that work.
"""

import datetime
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainer.cluster.watchdog import ARRIVAL_SECONDS
from trainer.distributed import on_all

logger = logging.getLogger("ec_dit")


class HeldErrors:
    """Keeps the first error of this rank until all ranks can act on it."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Code that talks to no other rank; an error in it ends the block, not the step."""
        try:
            yield
        except Exception as error:
            if self.error is None:
                self.error = error

    def raise_everywhere(self) -> None:
        """Raise the held errors on all ranks (`trainer.distributed.on_all`). Collective.

        Call it only when all ranks know that one of them holds an error.
        """

        def release() -> None:
            if self.error is not None:
                raise self.error

        on_all(release)


def build_arrival_group(seconds: float = ARRIVAL_SECONDS) -> Any:
    """A process group that carries nothing but `all_ranks_arrive`, which waits `seconds`. Collective."""
    return torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(seconds=seconds))


def all_ranks_arrive(group: Any) -> bool:
    """Whether every rank calls this within the group's time; returns on each of them by then."""
    try:
        torch.distributed.barrier(group)
    except RuntimeError as error:  # a time-out, or a connection that a dying rank closed
        logger.error("not all ranks can be reached: %s", error)
        return False
    return True
