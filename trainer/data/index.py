"""The index of a folder of image shards: which samples are sound, and where each lies in its tar.

Reads every tar to its end, decodes every picture, and rejects what cannot be trained on with its reason. Beside
each tar goes NAME.index.parquet with its sound samples in the order of keys, the unit of restart; when all are
there, `index.parquet` in the folder itself lists the tars. Nothing is held for more than one tar's samples.
With RANK and WORLD_SIZE set the tars are dealt out to the ranks. `python -m trainer.data.index IMAGES_DIR`
"""

import json
import os
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import pyarrow as pa

from trainer.config import command_parser, interruptible, require
from trainer.data.images.index_file import (
    INDEX_NAME,
    ROW_SCHEMA,
    Index,
    TarEntry,
    open_index,
    read_note,
    source_of,
    tar_index_path,
    tar_sizes,
    write_table,
)
from trainer.data.images.tar_scan import REPEATED, IndexRow, scan_tar, tar_digest, tar_stamp
from trainer.files import check_writable
from trainer.formats.progress_bar import ProgressBar
from trainer.formats.worker_processes import check_num_workers, map_by

_MAX_EXAMPLES = 3


def index_tar(folder: Path, needs_stats: bool, tar: str) -> None:
    """Scan one tar and write its list of samples; of one that was only copied or touched since, the stamp alone."""
    path = tar_index_path(folder, tar)
    stamp, size = tar_stamp(folder / tar), (folder / tar).stat().st_size  # before it is read
    digest, old = tar_digest(folder / tar), _entry_of(folder, needs_stats, tar)
    if old is not None and old.digest == digest:
        rows = Index(folder=folder, tars=[]).rows_of(old)
        _write(path, rows, needs_stats, replace(old, stamp=stamp))
        return
    result = scan_tar(folder, tar, needs_stats)
    rejected: dict[str, list[str]] = {}
    for reason, where in result.rejected:
        rejected.setdefault(reason, []).append(where)
    entry = TarEntry(
        tar=tar,
        size=size,
        digest=digest,
        stamp=stamp,
        num_kept=len(result.rows),
        source=source_of(result.rows),
        first_key=result.rows[0].key if result.rows else "",
        last_key=result.rows[-1].key if result.rows else "",
        rejected={reason: len(where) for reason, where in rejected.items()},
        examples={reason: where[:_MAX_EXAMPLES] for reason, where in rejected.items()},
    )
    _write(path, result.rows, needs_stats, entry)


def _write(path: Path, rows: list[IndexRow], needs_stats: bool, entry: TarEntry) -> None:
    write_table(path, list(map(asdict, rows)), ROW_SCHEMA, {"needs_stats": needs_stats, "entry": asdict(entry)})


def _entry_of(folder: Path, needs_stats: bool, tar: str) -> TarEntry | None:
    """The entry of a tar that was scanned before."""
    note = read_note(tar_index_path(folder, tar))
    if not note or note["needs_stats"] != needs_stats:
        return None
    entry = TarEntry(**note["entry"])
    return entry if entry.tar == tar else None


def _finished_entry(folder: Path, needs_stats: bool, tar: str) -> TarEntry | None:
    """The entry of a tar that was scanned before and not written to since."""
    entry = _entry_of(folder, needs_stats, tar)
    return entry if entry is not None and entry.stamp == tar_stamp(folder / tar) else None


def _without_repeats(folder: Path, entries: list[TarEntry]) -> list[TarEntry]:
    """Mark samples whose (part, key) an earlier tar has; only tars whose ranges of keys overlap are read."""
    found, overlapping = [], _overlapping([entry for entry in entries if entry.num_kept])
    for _, part in groupby(sorted(entries, key=lambda entry: (entry.part, entry.tar)), key=lambda entry: entry.part):
        seen: set[str] = set()
        for entry in part:
            if entry.tar in overlapping:
                rows = Index(folder=folder, tars=[]).rows_of(entry)
                found.append(_drop(entry, rows, seen))
                seen.update(row.key for row in rows)
            else:
                found.append(entry)
    return sorted(found, key=lambda entry: entry.tar)


def _overlapping(entries: list[TarEntry]) -> set[str]:
    """Tars whose range of (part, key) meets another's."""
    found: set[str] = set()
    widest: TarEntry | None = None
    for entry in sorted(entries, key=lambda entry: (entry.part, entry.first_key)):
        if widest is not None and (entry.part, entry.first_key) <= (widest.part, widest.last_key):
            found |= {entry.tar, widest.tar}
        if widest is None or (entry.part, entry.last_key) > (widest.part, widest.last_key):
            widest = entry
    return found


def _drop(entry: TarEntry, rows: list[IndexRow], seen: set[str]) -> TarEntry:
    repeated = [row.key for row in rows if row.key in seen]
    if not repeated:
        return entry
    kept = [row for row in rows if row.key not in seen]
    examples = [f"{entry.tar}: {key}" for key in repeated[:_MAX_EXAMPLES]]
    return replace(
        entry,
        num_kept=len(kept),
        source=source_of(kept),
        repeated=repeated,
        rejected={**entry.rejected, REPEATED: entry.rejected.get(REPEATED, 0) + len(repeated)},
        examples={**entry.examples, REPEATED: entry.examples.get(REPEATED, examples)},
    )


def build_index(
    folder: Path, num_workers: int = 0, *, needs_stats: bool = True, rank: int = 0, world_size: int = 1
) -> Index | None:
    """Scan this rank's tars that were not scanned yet; the index once all ranks' are done, else None.

    `needs_stats`: reject tars without img2dataset's _stats.json, which it writes last.
    """
    tars = list(tar_sizes(folder))
    for part in {(folder / tar).parent for tar in tars}:
        check_writable(part, f"data.images={part}")
    finished = partial(_finished_entry, folder, needs_stats)
    todo = [tar for tar in tars[rank::world_size] if finished(tar) is None]
    scan = partial(index_tar, folder, needs_stats)
    with map_by(num_workers) as by_workers:
        for _ in ProgressBar(by_workers(scan, todo), "index", len(todo), unit="tar", shown=rank == 0):
            pass
    entries = [entry for entry in map(finished, tars) if entry is not None]
    if len(entries) < len(tars):
        return None
    entries = _without_repeats(folder, entries)
    rows = [{"tar": entry.tar, "size": entry.size, "entry": json.dumps(asdict(entry))} for entry in entries]
    schema = pa.schema([("tar", pa.string()), ("size", pa.int64()), ("entry", pa.string())])
    write_table(folder / INDEX_NAME, rows, schema, {"num_kept": sum(entry.num_kept for entry in entries)})
    return Index(folder=folder, tars=entries)


def index_or_open(folder: Path) -> Index:
    """The index of a folder, built first (and printed) if there is none of this version."""
    if read_note(folder / INDEX_NAME):  # the tars may have changed since
        return open_index(folder)
    index = build_index(folder)
    assert index is not None  # there are no other ranks
    print(index.summary())
    return index


@interruptible("tars that were read are kept, and the same command goes on with the others")
def main(argv: list[str] | None = None) -> None:
    """Command line: index a folder; exit code 2 if nothing in it can be kept."""
    parser = command_parser("trainer.data.index", __doc__)
    parser.add_argument("images", type=Path, help="folder that holds the tars, also in subfolders")
    parser.add_argument("--num-workers", type=int, default=0, help="processes to read tars with (0: this one)")
    parser.add_argument(
        "--without-stats", action="store_true", help="accept tars that have no _stats.json: not img2dataset's"
    )
    args = parser.parse_args(argv)
    check_num_workers(args.num_workers)
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    index = build_index(
        args.images, args.num_workers, needs_stats=not args.without_stats, rank=rank, world_size=world_size
    )
    if index is None:
        print(f"rank {rank} of {world_size} is done; the index is written by the one that ends last")
        return
    print(index.summary())
    require(index.num_kept > 0, f"{args.images} holds no sound sample, for the reasons above: mend them")


if __name__ == "__main__":
    main()
