"""Features computed once: safetensors shards keyed by network, weights, preprocessing and the hash of each file.

STORE/<key>/shard_*.safetensors hold rows [n, D] and the hashes they belong to; key.json says what the key is made of.
A shard appears whole or not at all, so that a killed job continues where it was. Ranks take items r, r + world, ...
and write shards of their own: nothing is padded, and any number of ranks may continue another's work.
Shapes: N pictures, D features.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eval.networks.protocols import ImageEncoder
from eval.pictures.image_files import read_picture
from eval.weights import file_sha256
from trainer.config import ConfigError, require
from trainer.distributed import World
from trainer.files import replacing, write_text
from trainer.formats.progress_bar import ProgressBar

ALONE = World(rank=0, local_rank=0, size=1)  # all the pictures are its share
SHARD_ROWS = 512
_AHEAD = 4  # batches of pictures that worker threads prepare while the network runs
Item = TypeVar("Item")
Ready = TypeVar("Ready")


class _Row(NamedTuple):
    shard: Path
    number: int


class FeatureStore:
    """The rows of one encoder under a folder that all encoders share."""

    def __init__(self, folder: Path, key: dict[str, str], dim: int) -> None:
        text = json.dumps(key, sort_keys=True)
        self.key, self.dim = key, dim
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        if not (self.folder / "key.json").is_file():
            write_text(self.folder / "key.json", json.dumps(key, indent=2, sort_keys=True) + "\n")
        self._rows: dict[str, _Row] = {}
        self._seen: set[Path] = set()

    def refresh(self) -> dict[str, _Row]:
        """Rows in the store, with those that other processes have added; only headers of new shards are read."""
        for path in sorted(self.folder.glob("shard_*.safetensors")):
            if path not in self._seen:
                with _open(path) as file:
                    names = json.loads(file.metadata()["hashes"])
                self._rows |= {name: _Row(path, number) for number, name in enumerate(names)}
                self._seen.add(path)
        return self._rows

    def add(self, hashes: Sequence[str], features_ND: Tensor) -> None:
        """Write one shard."""
        assert features_ND.shape == (len(hashes), self.dim)
        name = hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]
        path = self.folder / f"shard_{name}_{os.getpid()}{secrets.token_hex(2)}.safetensors"
        metadata = {"hashes": json.dumps(list(hashes)), **self.key}
        with replacing(path) as temporary:
            save_file({"features": features_ND.float().contiguous()}, temporary, metadata=metadata)

    def read(self, hashes: Sequence[str], rows_at_once: int = 8192) -> Iterator[Tensor]:
        """Features in the order of the hashes, fp32 [n, D] at a time, so that a million pictures need no memory.

        Raises ConfigError when a row is missing.
        """
        known = self.refresh()
        for start in range(0, len(hashes), rows_at_once):
            part = hashes[start : start + rows_at_once]
            missing = [name for name in part if name not in known]
            require(
                not missing, f"{len(missing)} features are missing in {self.folder}: run the command again to add them"
            )
            out = torch.empty(len(part), self.dim)
            by_shard: dict[Path, list[tuple[int, int]]] = {}
            for place, name in enumerate(part):
                by_shard.setdefault(known[name].shard, []).append((place, known[name].number))
            for path, pairs in by_shard.items():
                with _open(path) as file:
                    stored = file.get_tensor("features")
                places, numbers = (list(column) for column in zip(*pairs, strict=True))
                out[places] = stored[numbers]
            yield out

    def matrix(self, hashes: Sequence[str]) -> Tensor:
        """All rows at once, fp32 [N, D]."""
        return torch.cat([torch.empty(0, self.dim), *self.read(hashes)])


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is damaged ({error}): delete it and run the command again") from error


def prefetched(items: Iterable[Item], work: Callable[[Item], Ready], workers: int, ahead: int) -> Iterator[Ready]:
    """Results of `work` in order, computed in threads at most `ahead` items before they are asked for."""
    source = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(work, item) for item in islice(source, ahead)]
        try:
            while waiting:
                done = waiting.pop(0).result()
                waiting += [pool.submit(work, item) for item in islice(source, 1)]
                yield done
        finally:
            for item in waiting:  # of work that was given up nothing more is begun
                item.cancel()


def hash_files(files: Sequence[Path], workers: int = 8, *, shown: bool = True) -> list[str]:
    """sha256 of each file's bytes; ConfigError for one that is missing or empty."""

    def check(path: Path) -> str:
        require(
            path.is_file() and path.stat().st_size > 0, f"picture {path} is missing or empty: draw or copy it again"
        )
        return file_sha256(path)

    found = prefetched(files, check, workers, 4 * workers)
    return list(ProgressBar(found, "look at pictures", len(files), unit="image", shown=shown, leave=False))


def missing_pictures(files: Sequence[Path], known: Collection[str], world: World) -> dict[str, Path]:
    """Hash and file of each of this rank's pictures that is not in `known`; ConfigError as of `hash_files`."""
    mine = files[world.rank :: world.size]
    return {
        name: path for name, path in zip(hash_files(mine, shown=world.is_main), mine, strict=True) if name not in known
    }


def num_workers() -> int:
    """Threads that prepare pictures: the cores this process may use, one of them for the network."""
    return max(1, min(16, len(os.sched_getaffinity(0)) - 1))


def add_picture_features(
    store: FeatureStore, encoder: ImageEncoder, files: Sequence[Path], world: World = ALONE, *, batch_size: int = 32
) -> int:
    """Compute this rank's missing features of pictures; returns how many were computed.

    Raises ConfigError naming the first picture that cannot be read.
    """
    todo = missing_pictures(files, store.refresh(), world)
    names, title = list(todo), f"features {encoder.key['network']}"
    ready = prefetched(
        todo.values(), lambda path: encoder.prepare(read_picture(path)), num_workers(), _AHEAD * batch_size
    )
    with ProgressBar(desc=title, total=len(names), unit="image", shown=world.is_main) as bar:
        for start in range(0, len(names), SHARD_ROWS):
            shard = names[start : start + SHARD_ROWS]
            parts = []
            for first in range(0, len(shard), batch_size):
                batch = list(islice(ready, min(batch_size, len(shard) - first)))
                parts.append(encoder.encode(torch.stack(batch)))
                bar.update(len(batch))
            store.add(shard, torch.cat(parts))
    return len(names)
