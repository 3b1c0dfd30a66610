"""Work on a checkpoint that all ranks do together: they all succeed, or all raise the same CheckpointError."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from trainer.checkpoint.folder import fault
from trainer.checkpoint.state import STATE
from trainer.config import ConfigError
from trainer.distributed import World, try_on_all

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the same one sentence on all ranks.

    `environment` says that the disk, not the program, is the reason.
    """

    def __init__(self, message: str, *, environment: bool) -> None:
        super().__init__(message)
        self.environment = environment


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Turn a CheckpointError of the environment into a ConfigError that begins with `what`."""
    try:
        yield
    except CheckpointError as error:
        if not error.environment:
            raise
        raise ConfigError(f"{what}: {error}") from error


def agree(action: Callable[[], T], group: Any = None) -> list[T]:
    """Run `action` on every rank of the process group and return what each rank returned. Collective.

    Raises CheckpointError on all ranks when it failed on any, naming the first rank and its reason.
    """
    results, failures, own = try_on_all(action, group)
    if failures:
        words = f"process {failures[0].rank}: {failures[0].sentence}"
        raise CheckpointError(words, environment=all(f.kind != "program" for f in failures)) from own
    return results


def shared_fault(folder: Path, world: World, *, state: str = STATE) -> str:
    """As `trainer.checkpoint.folder.fault`; the ranks share the files. Collective, the same on all ranks."""
    return next(filter(None, agree(lambda: fault(folder, part=world.rank, num_parts=world.size, state=state))), "")
