"""The files of an index (see index.py): one list of samples beside each tar, one list of the tars for the folder."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.config import ConfigError, require
from trainer.data.images.tar_scan import IndexRow, stats_path, tar_digest, tar_stamp
from trainer.files import remove_leftovers, replacing

Row = TypeVar("Row")
INDEX_NAME = "index.parquet"
FORMAT_VERSION = 3
_SURROGATE = re.compile("[\ud800-\udfff]")  # in a name: bytes that are not UTF-8
_METADATA_KEY = b"ec_dit_index"
ROW_SCHEMA = pa.schema(
    [(name, pa.string() if kind is str else pa.int64()) for name, kind in IndexRow.__annotations__.items()]
)


@dataclass(frozen=True, kw_only=True)
class TarEntry:
    """What the index says of one tar.

    `digest` is its `tar_digest`, `stamp` its `tar_stamp` when it was read; `source` a hash of its kept samples, which
    changes when a shard made of them would. `rejected` counts samples by reason, `examples` names the first few.
    `repeated` are keys that another tar of the same part, earlier in the order of names, has too: they are not kept.
    """

    tar: str
    size: int
    digest: str
    stamp: str
    num_kept: int
    source: str
    first_key: str
    last_key: str
    rejected: dict[str, int]
    examples: dict[str, list[str]]
    repeated: list[str] = field(default_factory=list)

    @property
    def part(self) -> str:
        """The folder of the tar."""
        return os.path.dirname(self.tar) or "."


@dataclass(frozen=True, kw_only=True)
class Index:
    """All tars of a folder, in the order of names."""

    folder: Path
    tars: list[TarEntry]

    @property
    def num_kept(self) -> int:
        """Sound samples in all."""
        return sum(entry.num_kept for entry in self.tars)

    @property
    def rejected(self) -> Counter[str]:
        """Number of rejected samples (or whole tars) by reason."""
        return sum((Counter(entry.rejected) for entry in self.tars), Counter[str]())

    def rows_of(self, entry: TarEntry) -> list[IndexRow]:
        """The sound samples of one tar in the order of keys."""
        dropped = set(entry.repeated)
        remedy = f"run python -m trainer.data.index {self.folder}"
        rows = _read_rows(tar_index_path(self.folder, entry.tar), remedy, lambda row: IndexRow(**row))
        return [row for row in rows if row.key not in dropped]

    def rows(self) -> Iterator[IndexRow]:
        """All sound samples, sorted by (tar, key), one tar's in memory at a time."""
        for entry in self.tars:
            yield from self.rows_of(entry) if entry.num_kept else ()

    def summary(self) -> str:
        """Table of what was kept and, by reason, what was not, each with its first example."""
        of_tars = [entry.examples.items() for entry in reversed(self.tars)]  # the first tar's take the place of others
        examples = {reason: where[0] for items in of_tars for reason, where in items}
        lines = [f"{self.num_kept:>10}  kept, from {sum(entry.num_kept > 0 for entry in self.tars)} tars"]
        lines += [f"{count:>10}  {reason}, first {examples[reason]}" for reason, count in self.rejected.most_common()]
        return "\n".join(lines)


def tar_index_path(folder: Path, tar: str) -> Path:
    """Where the samples of a tar are listed. No .json: img2dataset takes any such file in its folder for its own."""
    return (folder / tar).with_suffix(".index.parquet")


def source_of(rows: list[IndexRow]) -> str:
    """Hash of samples: changes when a shard made of them would."""
    return hashlib.sha256(json.dumps([asdict(row) for row in rows]).encode()).hexdigest()[:16]


def write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema, note: dict[str, Any]) -> None:
    """Write rows as a parquet file in one step, with the version of the format and `note` in its metadata."""
    content = {"format_version": FORMAT_VERSION, **note}
    schema = schema.with_metadata({_METADATA_KEY: json.dumps(content, sort_keys=True)})
    remove_leftovers(path)
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema), temporary, write_page_checksum=True)


def read_note(path: Path) -> dict[str, Any]:
    """The note of an index file; {} if it is none or of another version."""
    try:
        metadata = pq.read_schema(path).metadata or {}
        note: dict[str, Any] = json.loads(metadata[_METADATA_KEY])
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return {}
    return note if note.get("format_version") == FORMAT_VERSION else {}


def _read_rows(path: Path, remedy: str, build: Callable[[dict[str, Any]], Row]) -> list[Row]:
    """What `build` makes of the rows of an index file that has a note; ConfigError if they are damaged."""
    try:
        return list(map(build, pq.read_table(path, page_checksum_verification=True).to_pylist()))
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, MemoryError) as error:
        raise ConfigError(f"{path} cannot be read: delete it and {remedy}") from error


def _tars_below(folder: Path) -> Iterator[Path]:
    """Every tar under a folder, links to folders followed, none of them twice."""

    def refuse(error: OSError) -> None:
        raise ConfigError(f"data.images={folder}: {error.filename} cannot be read: {error.strerror}") from error

    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        folders.sort(key=lambda name: (os.path.islink(os.path.join(parent, name)), name))
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(parent, name) for name in names if name.endswith(".tar"))


def tar_sizes(folder: Path) -> dict[str, int]:
    """Relative path -> bytes of every tar under the folder, by name; ConfigError if there is none."""
    require(folder.is_dir(), f"data.images={folder} is not a folder: name the one that holds the image shards")
    sizes = {}
    for path in _tars_below(folder):
        name = path.relative_to(folder).as_posix()
        require(path.is_file(), f"data.images={folder}: {name} is a link to nothing: mend it, or take it away")
        require(not _SURROGATE.search(name), f"data.images={folder}: the name {name!a} is not UTF-8: rename it")
        sizes[name] = path.stat().st_size
    require(bool(sizes), f"data.images={folder} holds no .tar: download or draw pictures into it first")
    return dict(sorted(sizes.items()))


def open_index(folder: Path) -> Index:
    """The index of a folder; ConfigError if it is missing or does not describe the tars that are there."""
    path = folder / INDEX_NAME
    remedy = f"run python -m trainer.data.index {folder}"
    sizes = tar_sizes(folder)
    require(path.is_file(), f"data.images={folder} has no {INDEX_NAME}: {remedy}")
    require(bool(read_note(path)), f"{path} is not an index of image shards, or of another version: {remedy}")
    entries = _read_rows(path, remedy, lambda row: TarEntry(**json.loads(row["entry"])))
    same = {entry.tar: entry.size for entry in entries} == sizes
    require(same, f"{path} was made from other tars than are there now: {remedy}")
    return Index(folder=folder, tars=entries)


def is_unchanged(folder: Path, entry: TarEntry) -> bool:
    """Whether a tar is the one that was indexed; only if it was written to or copied since, all of it is read."""
    path = folder / entry.tar
    return path.is_file() and (tar_stamp(path) == entry.stamp or tar_digest(path) == entry.digest)


def check_unchanged(index: Index, entry: TarEntry) -> None:
    """ConfigError if a tar is not the one that was indexed."""
    require(
        is_unchanged(index.folder, entry),
        f"{index.folder / entry.tar} (or {stats_path(Path(entry.tar)).name}) changed since it was indexed: "
        f"run python -m trainer.data.index {index.folder}",
    )
