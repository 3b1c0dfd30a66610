"""Copies of shards on a disk of this machine, for network file systems that are slow at small reads.

Any number of processes share a folder without talking to each other: copies appear whole, by renaming, under names
that hold their hash, and are removed, oldest use first, when there are too many. A process goes on reading a file
that another removed.
"""

import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainer.data.latents.shard_file import DamagedShardError, ShardEntry
from trainer.errors import ConfigError, require
from trainer.files import replacing

_ABANDONED_SECONDS = 3600  # of a copy that nobody has written to


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A folder for copies, and how many bytes of them it may hold."""

    folder: Path
    max_bytes: int

    def fetch(self, path: Path, entry: ShardEntry) -> Path:
        """The path of the copy of a shard, made if it is not there."""
        copy = self.folder / f"{entry.sha256[:32]}-{entry.file}"
        with suppress(FileNotFoundError):
            os.utime(copy)  # it is in use: the newest
            if copy.stat().st_size == entry.size:
                return copy
        self._make_room(entry.size, copy)  # before copying: the limit holds at every moment
        try:
            with replacing(copy) as temporary:
                shutil.copyfile(path, temporary)
        except OSError as error:
            raise DamagedShardError(
                path, f"cannot be copied to data.stage_dir={self.folder} ({error.strerror})"
            ) from error
        return copy

    def _make_room(self, size: int, keep: Path) -> None:
        """Remove copies, oldest use first, until `size` more bytes fit."""
        found = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another process was faster
                state = path.stat()
                if path.suffix != ".tmp" and path != keep:
                    found.append((state.st_mtime_ns, state.st_size, path))
                elif path.suffix == ".tmp" and time.time() - state.st_mtime > _ABANDONED_SECONDS:
                    path.unlink()
        total = sum(length for _, length, _ in found)
        for _, length, path in sorted(found):
            if total + size <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= length


def build_stage(folder: str, gigabytes: float, fingerprint: str) -> Stage | None:
    """The stage of `data.stage_dir`, made if needed; ConfigError if it cannot be."""
    if not folder:
        return None
    path = Path(folder) / fingerprint
    try:
        path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise ConfigError(f"data.stage_dir={folder} cannot be made ({error.strerror}): name a local folder") from error
    require(
        free + sum(p.stat().st_size for p in path.glob("*.safetensors")) >= gigabytes * 1e9,
        f"data.stage_gb is {gigabytes}, but data.stage_dir={folder} has {free / 1e9:.1f} GB free: lower it",
    )
    return Stage(folder=path, max_bytes=int(gigabytes * 1e9))
