"""Steps that all ranks take together: they all succeed, or all raise the same error."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed

from trainer.config import ConfigError

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
    result, cause = None, None
    try:
        result = action()
    except Exception as error:  # told to all ranks and raised below
        cause = error
    mine = (result, _words(cause), cause is None or isinstance(cause, OSError | ConfigError))
    parts: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(parts, mine, group=group)
    for rank, (_, words, _) in enumerate(parts):
        if words:
            environment = all(part[2] for part in parts)
            raise CheckpointError(f"process {rank}: {words}", environment=environment) from cause
    return [part[0] for part in parts]


def _words(error: Exception | None) -> str:
    if error is None:
        return ""
    if isinstance(error, OSError):
        if not error.errno:
            return str(error)
        remedy = {errno.ENOSPC: ": free space", errno.EDQUOT: ": free space", errno.EROFS: ": make it writable"}
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}{remedy.get(error.errno, '')}"
    return str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
