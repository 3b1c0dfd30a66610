"""Files that exist whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write; at the end, flush it to disk and rename it to `path`.

    If the body raises, the temporary file is removed and `path` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        handle = os.open(temporary, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
