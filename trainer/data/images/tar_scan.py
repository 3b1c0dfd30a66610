"""One tar of image shards, read to its end: which samples are sound, where each lies, and why the others are not."""

import hashlib
import json
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from trainer.data.images.decode import BadPictureError, is_constant, orientation_of, read_rgb
from trainer.errors import ConfigError

REPEATED = "key seen before in the same folder"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_END_OF_TAR = bytes(1024)


@dataclass(frozen=True, kw_only=True)
class IndexRow:
    """One sound sample: the bytes [offset, offset + size) of `tar` (relative to the folder) are its picture.

    (part, key) is its identity: keys start anew in every part, the folder of one download task. `orientation`
    is the EXIF value of the original. `scene` is the label of a drawn picture, else "".
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
    """Sound rows of a tar in the order of keys; what was rejected as (reason, where)."""

    rows: list[IndexRow] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)


def stats_path(tar: Path) -> Path:
    """Where img2dataset writes the counts of a tar, as the last thing it does."""
    return tar.with_name(f"{tar.stem}_stats.json")


def tar_stamp(tar: Path) -> str:
    """Changes whenever a tar or its counts are written to, and in copies of them: sizes and times of last change."""
    paths = [path for path in (tar, stats_path(tar)) if path.exists()]
    return " ".join(f"{state.st_size} {state.st_ctime_ns}" for state in map(Path.stat, paths))


def tar_digest(tar: Path) -> str:
    """Hash of every byte of a tar and of its counts; ConfigError if it cannot be read."""
    stats = stats_path(tar)
    try:
        with tar.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update(stats.read_bytes() if stats.is_file() else b"no counts")
    except OSError as error:
        raise ConfigError(f"{tar} cannot be read ({error.strerror}): make it readable, or take it away") from error
    return digest.hexdigest()[:16]


@dataclass(kw_only=True)
class _Members:
    """Key -> suffix -> (offset, size) of the first file of that name; names that came again, or of no plain file."""

    files: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    num_pictures: int = 0

    def add(self, member: tarfile.TarInfo) -> None:
        if not member.isfile():
            self.links += [] if member.isdir() else [member.name]
            return
        folder, slash, name = member.name.removeprefix("./").rpartition("/")
        key, _, suffix = name.partition(".")
        suffix = suffix.lower()
        files = self.files.setdefault(folder + slash + key, {})
        picture = suffix in IMAGE_SUFFIXES
        self.num_pictures += picture
        if suffix not in files:
            files[suffix] = (member.offset_data, member.size)
        elif picture:
            self.repeated.append(folder + slash + key)


def damage_of(tar: Path, *, needs_stats: bool) -> str | None:
    """Why a tar cannot be used, or None: no counts beside it, cut off, overwritten, or at odds with its counts."""
    found = _read_members(tar, needs_stats)
    return found if isinstance(found, str) else None


def _read_members(path: Path, needs_stats: bool) -> _Members | str:
    """All files of a whole tar, or why it cannot be used."""
    stats, found = stats_path(path), _Members()
    if needs_stats and not stats.is_file():
        return "tar without its _stats.json (download was killed)"
    try:
        # A name in another encoding is only a name: its odd bytes are written out.
        with tarfile.open(path, "r:", encoding="utf-8", errors="backslashreplace") as tar, path.open("rb") as file:
            for member in tar:
                found.add(member)
            file.seek(tar.offset)  # tarfile also stops without a word at the first header that is cut off
            if file.read(len(_END_OF_TAR)) != _END_OF_TAR:
                return "tar without its end (download was killed)"
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError):  # of damaged headers
        return "tar that cannot be read"
    if stats.is_file() and _json_object(stats.read_bytes()).get("successes") != found.num_pictures:
        return "tar with other samples than its _stats.json says (two downloads in one folder)"
    return found


def _json_object(content: bytes) -> dict[str, Any]:
    """A JSON object; an empty one for anything else."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(file: BinaryIO, place: tuple[int, int]) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def _check_sample(file: BinaryIO, key: str, files: dict[str, tuple[int, int]], tar: str) -> IndexRow | str:
    """The row of a sample, or the reason why it is rejected."""
    suffix = next((s for s in IMAGE_SUFFIXES if s in files), None)
    if suffix is None:
        return "no picture"
    metadata: dict[str, Any] = {}
    if "json" in files:
        metadata = _json_object(_read(file, files["json"]))
        if not metadata:
            return "metadata that is no JSON object"
    caption, scene = metadata.get("caption") or "", str(metadata.get("scene") or "")
    try:
        if "txt" in files:
            caption = _read(file, files["txt"]).decode()
        if not isinstance(caption, str):
            return "caption that is no text"
        (caption + scene).encode()
    except UnicodeError:  # another encoding, or half of a surrogate pair
        return "caption or scene that is not UTF-8"
    caption = caption.strip()
    if not caption:
        return "empty caption"
    orientation = orientation_of(metadata)
    try:
        image = read_rgb(_read(file, files[suffix]), orientation)
    except BadPictureError as error:
        return str(error)
    if is_constant(image):
        return "picture of one colour"
    return IndexRow(
        part=os.path.dirname(tar) or ".",
        key=key,
        tar=tar,
        offset=files[suffix][0],
        size=files[suffix][1],
        caption=caption,
        orientation=orientation,
        width=image.width,
        height=image.height,
        scene=scene,
    )


def scan_tar(folder: Path, tar: str, needs_stats: bool = True) -> ScanResult:
    """Read one tar (a path relative to `folder`) to its end and decode its pictures."""
    members = _read_members(folder / tar, needs_stats)
    if isinstance(members, str):
        return ScanResult(rejected=[(members, tar)])
    result = ScanResult(rejected=[(REPEATED, f"{tar}: {key}") for key in members.repeated])
    result.rejected += [("link or other member that is no plain file", f"{tar}: {name}") for name in members.links]
    with (folder / tar).open("rb") as file:
        for key, files in sorted(members.files.items()):
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
