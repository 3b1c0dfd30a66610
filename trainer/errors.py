"""The error that a user can mend, the check that raises it, and errors as sentences."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

_REMEDIES = {errno.ENOSPC: ": free space", errno.EDQUOT: ": free space", errno.EROFS: ": make it writable"}


class ConfigError(ValueError):
    """A setting the user must change; the message is one sentence for a terminal."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn an error of the system into a ConfigError: `what` cannot be written, why, and the remedy."""
    try:
        yield
    except OSError as error:
        remedy = "" if error.errno in _REMEDIES else ": choose another folder"
        raise ConfigError(f"{what} cannot be written: {sentence_of(error)}{remedy}") from error


def sentence_of(error: Exception) -> str:
    """Any error in one sentence for a terminal; of the system's errors with the file and the remedy, where known."""
    if isinstance(error, OSError) and error.errno:
        where = f" ({os.fsdecode(error.filename)})" if error.filename else ""
        return f"{error.strerror}{where}{_REMEDIES.get(error.errno, '')}"
    return str(error) if isinstance(error, OSError | ConfigError) else f"{type(error).__name__}: {error}"
