"""The index of a folder of image shards: which samples are sound, and where each lies in its tar.

Reads every tar to its end, decodes every picture, and rejects what cannot be trained on with its reason. The
result, `index.parquet` in the same folder, is sorted by (part, key); a part is the folder of one download task.
`python -m trainer.data.index IMAGES_DIR`
"""

import argparse
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from trainer.config import ConfigError, require, run_cli
from trainer.data.files import replacing
from trainer.data.images import UNREADABLE, is_constant, orientation_of, read_rgb

INDEX_NAME = "index.parquet"
FORMAT_VERSION = 1
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_METADATA_KEY = b"ec_dit_index"
_END_OF_TAR = bytes(1024)


@dataclass(frozen=True, kw_only=True)
class IndexRow:
    """One sound sample: the bytes [offset, offset + size) of `tar` (relative to the folder) are its picture.

    `orientation` is the EXIF value of the original. `scene` is the label of a drawn picture, else "".
    """

    part: str
    key: str
    tar: str
    offset: int
    size: int
    caption: str
    orientation: int
    width: int
    height: int
    scene: str


@dataclass(kw_only=True)
class ScanResult:
    """Sound rows of some tars; what was rejected as (reason, where)."""

    rows: list[IndexRow] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)


class _DamagedTarError(Exception):
    """A tar that cannot be used at all; the message is the reason."""


def _members(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Key -> suffix -> (offset, size) of a whole tar; raises _DamagedTarError if it was cut off or overwritten."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            for member in tar:
                if member.isfile():
                    folder, slash, name = member.name.removeprefix("./").rpartition("/")
                    key, _, suffix = name.partition(".")
                    found.setdefault(folder + slash + key, {})[suffix] = (member.offset_data, member.size)
            file.seek(tar.offset)  # tarfile also stops without a word at the first header that is cut off
            if file.read(len(_END_OF_TAR)) != _END_OF_TAR:
                raise _DamagedTarError("tar without its end (download was killed)")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _DamagedTarError("tar that cannot be read") from error
    stats = path.with_name(f"{path.stem}_stats.json")
    num_pictures = sum(any(suffix in IMAGE_SUFFIXES for suffix in files) for files in found.values())
    if stats.is_file() and json.loads(stats.read_text()).get("successes") != num_pictures:
        raise _DamagedTarError("tar with other samples than its _stats.json says (two downloads in one folder)")
    return found


def _read(file: BinaryIO, place: tuple[int, int] | None) -> bytes:
    if place is None:
        return b""
    file.seek(place[0])
    return file.read(place[1])


def _metadata(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _check_sample(file: BinaryIO, key: str, files: dict[str, tuple[int, int]], tar: str) -> IndexRow | str:
    """The row of a sample, or the reason why it is rejected."""
    suffix = next((s for s in IMAGE_SUFFIXES if s in files), None)
    if suffix is None:
        return "no picture"
    metadata = _metadata(_read(file, files.get("json")))
    text = _read(file, files["txt"]).decode(errors="replace") if "txt" in files else metadata.get("caption")
    caption = str(text or "").strip()
    if not caption:
        return "empty caption"
    orientation = orientation_of(metadata)
    try:
        image = read_rgb(_read(file, files[suffix]), orientation)
    except UNREADABLE:
        return "picture that cannot be decoded"
    if is_constant(image):
        return "picture of one colour"
    return IndexRow(
        part=Path(tar).parent.as_posix(),
        key=key,
        tar=tar,
        offset=files[suffix][0],
        size=files[suffix][1],
        caption=caption,
        orientation=orientation,
        width=image.width,
        height=image.height,
        scene=str(metadata.get("scene") or ""),
    )


def scan_tar(folder: Path, tar: str) -> ScanResult:
    """Read one tar (a path relative to `folder`) to its end and decode its pictures."""
    result = ScanResult()
    try:
        members = _members(folder / tar)
    except _DamagedTarError as damage:
        return ScanResult(rejected=[(str(damage), tar)])
    with (folder / tar).open("rb") as file:
        for key, files in sorted(members.items()):
            foreign = [suffix for suffix in files if suffix not in (*IMAGE_SUFFIXES, "txt", "json")]
            result.rejected += [("file that is no picture, txt or json", f"{tar}: {key}.{s}") for s in foreign]
            if len(foreign) == len(files):
                continue
            row = _check_sample(file, key, files, tar)
            if isinstance(row, str):
                result.rejected.append((row, f"{tar}: {key}"))
            else:
                result.rows.append(row)
    return result


def _without_repeats(result: ScanResult) -> ScanResult:
    """Sort by (part, key); of samples with the same identity the first tar's stays."""
    kept: dict[tuple[str, str], IndexRow] = {}
    for row in sorted(result.rows, key=lambda row: (row.part, row.key, row.tar)):
        if (row.part, row.key) in kept:
            result.rejected.append(("key seen before in the same folder", f"{row.tar}: {row.key}"))
        else:
            kept[row.part, row.key] = row
    return ScanResult(rows=list(kept.values()), rejected=result.rejected)


def tar_sizes(folder: Path) -> dict[str, int]:
    """Relative path -> bytes of every tar under the folder; ConfigError if there is none."""
    require(folder.is_dir(), f"data.images={folder} is not a folder: name the one that holds the image shards")
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*.tar"))}
    require(bool(sizes), f"data.images={folder} holds no .tar: download or draw pictures into it first")
    return sizes


def build_index(folder: Path, num_workers: int = 0) -> ScanResult:
    """Scan all tars of a folder and write its index, unless nothing is left to keep."""
    sizes = tar_sizes(folder)
    result = ScanResult()
    with ExitStack() as stack:
        scan = partial(scan_tar, folder)
        found: Iterator[ScanResult] = map(scan, sizes)
        if num_workers > 0:
            found = stack.enter_context(ProcessPoolExecutor(num_workers)).map(scan, sizes)
        for part in tqdm(found, total=len(sizes), desc="index", unit="tar", disable=None):
            result.rows += part.rows
            result.rejected += part.rejected
    result = _without_repeats(result)
    if result.rows:
        note = {"format_version": FORMAT_VERSION, "tars": sizes, "rejected": Counter(r for r, _ in result.rejected)}
        table = pa.Table.from_pylist([asdict(row) for row in result.rows])
        table = table.replace_schema_metadata({_METADATA_KEY: json.dumps(note, sort_keys=True)})
        with replacing(folder / INDEX_NAME) as temporary:
            pq.write_table(table, temporary)
    return result


def read_index(folder: Path) -> list[IndexRow]:
    """The rows of a folder's index; ConfigError if it is missing or does not describe the tars that are there."""
    path = folder / INDEX_NAME
    remedy = f"run python -m trainer.data.index {folder}"
    require(path.is_file(), f"data.images={folder} has no {INDEX_NAME}: {remedy}")
    try:
        table = pq.read_table(path)
        note = json.loads((table.schema.metadata or {})[_METADATA_KEY])
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise ConfigError(f"{path} is not an index of image shards: {remedy}") from error
    same = note["format_version"] == FORMAT_VERSION and note["tars"] == tar_sizes(folder)
    require(same, f"{path} was made from other tars than are there now: {remedy}")
    return [IndexRow(**row) for row in table.to_pylist()]


def summary(result: ScanResult) -> str:
    """Table of what was kept and, by reason, what was not, each with its first example."""
    examples: dict[str, str] = {}
    for reason, where in result.rejected:
        examples.setdefault(reason, where)
    counts = Counter(reason for reason, _ in result.rejected)
    lines = [f"{len(result.rows):>10}  kept, from {len({row.tar for row in result.rows})} tars"]
    lines += [f"{count:>10}  {reason}, first {examples[reason]}" for reason, count in counts.most_common()]
    return "\n".join(lines)


def _main(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="trainer.data.index", description="Check and index image shards.")
    parser.add_argument("images", type=Path, help="folder that holds the tars, also in subfolders")
    parser.add_argument("--num-workers", type=int, default=0, help="processes to read tars with (0: this one)")
    args = parser.parse_args(argv)
    limit = os.cpu_count() or 1
    require(0 <= args.num_workers <= limit, f"--num-workers is {args.num_workers}: use 0 to {limit}")
    result = build_index(args.images, args.num_workers)
    print(summary(result))
    if not result.rows:
        raise SystemExit(1)


def main(argv: list[str] | None = None) -> None:
    """Command line: index a folder; exit code 1 if nothing in it can be kept."""
    run_cli(lambda: _main(argv))


if __name__ == "__main__":
    main()
