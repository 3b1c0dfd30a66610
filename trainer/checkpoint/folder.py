"""Checkpoint folders: their names, whether they are whole, and how one appears and disappears at once.

A folder is written as `step_00000010.tmp` and renamed when it is whole. Folders whose name ends in `.tmp` are
never checkpoints; those of dead jobs are removed by the next save or resume. Deleting begins with a rename as well,
so a half-deleted folder is never taken for a checkpoint.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash
from pydantic import NonNegativeInt, TypeAdapter

from trainer.checkpoint.members import FileName, member, read_json
from trainer.checkpoint.state import STATE
from trainer.checkpoint.tensorfile import Written
from trainer.errors import ConfigError, require
from trainer.files import flush, remove_leftovers, replacing
from trainer.formats.progress_bar import ProgressBar

MANIFEST = "MANIFEST.json"
_LATEST = "latest"
_NAME = re.compile(r"step_\d{8,}")  # numbers are padded so that a listing sorts; more digits are allowed
_REPLACED, _DELETED = ".replaced.tmp", ".deleted.tmp"
_HASH_THREADS = 4
logger = logging.getLogger("ec_dit")


@dataclass(frozen=True, kw_only=True)
class _FileEntry:
    size: NonNegativeInt
    xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class _Manifest:
    files: dict[FileName, _FileEntry]


_MANIFEST = TypeAdapter(_Manifest)


def checkpoint_dir(run_dir: str | Path, step: int) -> Path:
    """Folder of the checkpoint after optimizer step `step`."""
    return Path(run_dir) / "checkpoints" / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint's name says."""
    return int(checkpoint.name.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders in order of their step; unfinished `.tmp` ones are not among them."""
    return sorted((p for p in folder.glob("step_*") if _NAME.fullmatch(p.name) and p.is_dir()), key=step_of)


def temporary_dir(final: Path) -> Path:
    """Where a checkpoint is written before it is published."""
    return final.with_name(f"{final.name}.tmp")


def write_durable(path: Path, text: str) -> Written:
    """Write a small file of a folder that is not published yet, and flush it to disk."""
    content = text.encode()
    path.write_bytes(content)
    flush(path)
    return Written(size=len(content), checksum=xxhash.xxh3_128_hexdigest(content))


def write_manifest(folder: Path, files: Mapping[str, Written]) -> None:
    """Size and checksum of each file of a checkpoint; the last file to be written."""
    entries = {name: {"size": files[name].size, "xxh3_128": files[name].checksum} for name in sorted(files)}
    write_durable(folder / MANIFEST, json.dumps({"files": entries}, indent=1) + "\n")


def read_manifest(checkpoint: Path) -> dict[str, Written]:
    """Inverse of `write_manifest`; ConfigError if there is none that can be read."""
    files = read_json(checkpoint, MANIFEST, _MANIFEST).files
    return {name: Written(size=entry.size, checksum=entry.xxh3_128) for name, entry in files.items()}


def _checksum(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def fault(
    checkpoint: Path,
    *,
    part: int = 0,
    num_parts: int = 1,
    checksums: bool = True,
    only: Collection[str] = (),
    state: str = STATE,
) -> str:
    """What is wrong with a checkpoint, in a few words; empty if it is whole.

    Of `num_parts` parties each checks every `num_parts`-th file, so that together they read each file once.
    Without `checksums` only names and sizes are compared, and the content of `state`. With `only` no other
    files are looked at. `state` is the small file that says what the others are.
    """
    try:
        manifest = read_manifest(checkpoint)
    except ConfigError as error:
        return str(error).removeprefix(f"{checkpoint}/")
    if state not in manifest:
        return f"{state} is missing"
    names = sorted(only or manifest, key=lambda name: (name == state, name))[part::num_parts]  # rank r: its own file

    def problem(name: str) -> str:
        expected = manifest[name]
        try:
            path = member(checkpoint, name)
            size = path.stat().st_size
            if size != expected.size:
                return f"{name} has {size} bytes instead of {expected.size}"
            if (checksums or name == state) and _checksum(path) != expected.checksum:
                return f"{name} has a wrong checksum"
        except ConfigError as error:
            return str(error).removeprefix(f"{checkpoint}/")
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        return ""

    with ThreadPoolExecutor(_HASH_THREADS) as pool:  # hashing and reading let go of the interpreter's lock
        bar = ProgressBar(pool.map(problem, names), f"verify {checkpoint.name}", len(names), unit="file",
                          shown=checksums and part == 0, leave=False)  # fmt: skip
        return next(filter(None, bar), "")


def check_written(temporary: Path, *, state: str = STATE) -> None:
    """Flush a complete folder that is about to be renamed; OSError if it is not complete on disk."""
    problem = fault(temporary, checksums=False, state=state)
    if problem:
        raise OSError(f"{temporary} is not complete on disk: {problem}")
    flush(temporary)


def newest_whole(folders: Iterable[Path]) -> Path | None:
    """The last whole checkpoint of a list; broken ones that it passes over are logged."""
    for path in reversed(list(folders)):
        problem = fault(path)
        if not problem:
            return path
        logger.warning("passed over checkpoint %s: %s", path, problem)
    return None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a user names: a step folder, or a run folder (its newest whole one)."""
    require(path.is_dir(), f"{path}: no such run folder or checkpoint")
    if any((path / name).is_file() for name in (STATE, MANIFEST)):
        problem = fault(path)
        require(not problem, f"{path} is not whole: {problem}")
        return path
    found = newest_whole(list_checkpoints(path / "checkpoints"))
    if found is None:
        raise ConfigError(f"{path} has no whole checkpoint in {path / 'checkpoints'}: is it the folder of a run?")
    return found


def publish(temporary: Path, final: Path) -> None:
    """Make a complete temporary folder the checkpoint `final`, and point `latest` at it.

    A crash at any point leaves the new checkpoint or the old state; `clean` puts back an older version of the
    same step whose replacement did not happen.
    """
    check_written(temporary)
    # A folder cannot be renamed onto one that is not empty, so `trainer.files.replacing` does not serve here: an older
    # version of the step steps aside first, and only the new one's name makes it go.
    replaced = final.with_name(final.name + _REPLACED)
    if final.exists():
        os.replace(final, replaced)
    os.replace(temporary, final)
    flush(final.parent)
    with replacing(final.with_name(_LATEST)) as pointer:
        pointer.write_text(final.name + "\n")
    flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def prune(folder: Path, saved: Path, *, keep_last: int, keep_every: int) -> None:
    """Delete old checkpoints: all but the last `keep_last` up to `saved`, and those of every `keep_every`-th step.

    `saved` was just published, so the newest whole checkpoint is never deleted. Later ones, which a run that
    went back to an earlier step has not reached again, do not count and stay.
    """
    past = [path for path in list_checkpoints(folder) if step_of(path) <= step_of(saved)]
    for old in past[:-keep_last]:
        if keep_every and step_of(old) % keep_every == 0:
            continue
        deleted = old.with_name(old.name + _DELETED)  # renamed first: half of a checkpoint has no checkpoint's name
        os.replace(old, deleted)
        _remove(deleted)


def clean(folder: Path) -> None:
    """Remove what dead jobs left unfinished. Only the one process that owns the run folder may call this."""
    for path in sorted(folder.glob("step_*.tmp")):
        final = path.with_name(path.name.removesuffix(_REPLACED))
        if path.name.endswith(_REPLACED) and not final.exists():
            os.replace(path, final)
        else:
            _remove(path)
    remove_leftovers(folder / _LATEST)


def _remove(path: Path) -> None:
    """Remove a folder; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
