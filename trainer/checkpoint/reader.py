"""Reads the logical tensors of a checkpoint, whichever topology wrote it.

Each rank's file holds flat pieces of logical tensors (all experts, fp32). A piece says which tensor it is of,
the tensor's full shape and where in the flattened tensor it begins; that is all a reader needs. An expert
parameter's leading axis is the expert, so the experts of a rank are one contiguous piece as well.
"""

import json
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor

from trainer.checkpoint.folder import read_manifest
from trainer.checkpoint.members import member, misfit
from trainer.checkpoint.tensorfile import CHUNK_BYTES, TensorFile, Written, flat_source, write_tensors
from trainer.config import ConfigError, require
from trainer.formats.progress_bar import ProgressBar

KINDS = ("weight", "ema", "exp_avg", "exp_avg_sq")
_RANK_FILE = re.compile(r"rank_\d{5,}\.safetensors")
_PLACES = TypeAdapter(dict[str, tuple[NonNegativeInt, tuple[NonNegativeInt, ...]]])  # name: offset and full shape
_MAX_OPEN = 64  # files: thousands of processes have written a checkpoint, and a process may open about 1000


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Elements `offset` to `offset + len(values)` of the flattened logical tensor `name` of shape `shape`.

    `values` is flat fp32, on any device. `kind` is one of `KINDS`.
    """

    kind: str
    name: str
    offset: int
    shape: tuple[int, ...]
    values: Tensor


def rank_file(rank: int) -> str:
    """Name of one rank's file inside a checkpoint."""
    return f"rank_{rank:05d}.safetensors"


def write_pieces(path: Path, pieces: Iterable[Piece], extra: Mapping[str, Tensor]) -> Written:
    """Write one rank's file, flushed to disk. `extra` are uint8 tensors that belong to the rank alone."""
    pieces = list(pieces)
    tensors = {f"{piece.kind}/{piece.name}": piece.values for piece in pieces} | dict(extra)
    places = json.dumps({piece.name: (piece.offset, piece.shape) for piece in pieces}, separators=(",", ":"))
    sources = {name: flat_source(tensor) for name, tensor in tensors.items()}
    return write_tensors(path, sources, {"format": "ec_dit.pieces", "places": places})


@dataclass(frozen=True, kw_only=True)
class _FilePlace:
    """Where `length` elements from element `start` on of a flattened logical tensor are."""

    start: int
    length: int
    path: Path


class CheckpointReader:
    """The logical tensors of one checkpoint folder, fp32 on the host, read in full or by flat range.

    Construction reads the headers of all files, or of those named `files` alone: then only what they hold can be read.
    Raises ConfigError naming the file that is damaged, or the tensor whose pieces do not cover it exactly once.
    """

    def __init__(self, folder: Path, files: Collection[str] | None = None) -> None:
        self.folder = folder
        self._open: OrderedDict[Path, TensorFile] = OrderedDict()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, dict[str, list[_FilePlace]]] = {kind: {} for kind in KINDS}
        # What the manifest does not name was not verified with the checkpoint.
        there = sorted(name for name in read_manifest(folder) if _RANK_FILE.fullmatch(name))
        paths = [member(folder, name) for name in there if files is None or name in files]
        require(bool(paths) or files is not None, f"{folder} holds no rank_*.safetensors file: is it a checkpoint?")
        for path in paths:
            self._index(path)
        # With all files at hand each tensor must be there in full and once, so that a file too few or of another
        # checkpoint is named before anything is loaded.
        for kind, tensors in self._places.items():
            for name, places in tensors.items():
                places.sort(key=lambda place: place.start)
                if files is None:
                    self._check_cover(kind, name, places)

    def _index(self, path: Path) -> None:
        file = self._file(path)
        try:
            places = _PLACES.validate_json(file.metadata.get("places", "{}"), strict=True)
        except ValidationError as error:
            raise ConfigError(f"{path} is damaged: in its places {misfit(error)}") from error
        for key, stored in file.places.items():
            kind, _, name = key.partition("/")
            if kind not in KINDS:
                continue
            require(stored.dtype == "F32", f"{path} is damaged: {key} has dtype {stored.dtype} instead of F32")
            require(name in places, f"{path} is damaged: it does not say where {name} belongs")
            (offset, shape), length = places[name], file.length(key)
            known = self._shapes.setdefault(name, shape)
            require(known == shape, f"{path}: {name} has shape {shape}, elsewhere {known}")
            inside = offset + length <= prod(shape)
            require(inside, f"{path} is damaged: elements {offset} to {offset + length} of {name} of shape {shape}")
            self._places[kind].setdefault(name, []).append(_FilePlace(start=offset, length=length, path=path))

    def _check_cover(self, kind: str, name: str, places: list[_FilePlace]) -> None:
        end, count = 0, self._count(name)
        for place in places:
            if place.start != end:
                word = "twice" if place.start < end else "not at all"
                first, last = sorted((place.start, end))
                raise ConfigError(f"{self.folder}: elements {first} to {last} of {kind} {name} are there {word}")
            end += place.length
        if end != count:
            raise ConfigError(f"{self.folder}: {end} elements of {kind} {name} are there, it has {count}")

    def _file(self, path: Path) -> TensorFile:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        if len(self._open) >= _MAX_OPEN:
            self._open.popitem(last=False)[1].close()
        file = self._open[path] = TensorFile(path)
        return file

    def _count(self, name: str) -> int:
        return prod(self._shapes[name])

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of a kind, sorted; empty for moments that the optimizer does not have."""
        return sorted(self._places[kind])

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a logical tensor, all experts included."""
        return self._shapes[name]

    def holds(self, piece: Piece) -> bool:
        """Whether one of the files has exactly this piece."""
        places = self._places[piece.kind].get(piece.name, [])
        same = any(place.start == piece.offset and place.length == piece.values.numel() for place in places)
        return same and self._shapes[piece.name] == piece.shape

    def read(self, kind: str, name: str) -> Tensor:
        """The full logical tensor, fp32."""
        return self.read_range(kind, name, 0, self._count(name)).view(self._shapes[name])

    def read_range(self, kind: str, name: str, start: int, end: int) -> Tensor:
        """Elements `start` to `end` of the flattened logical tensor; reads only those bytes."""
        out = torch.empty(end - start, dtype=torch.float32)
        self.read_into(kind, name, start, out)
        return out

    def read_into(self, kind: str, name: str, start: int, out: Tensor) -> None:
        """Fill the flat fp32 host tensor `out` with the elements from `start` on of a logical tensor."""
        end = start + out.numel()
        require(name in self._places[kind], f"{self.folder} is damaged: it has no {kind} of {name}")
        if not 0 <= start <= end <= self._count(name):
            raise ValueError(f"{name} has {self._count(name)} elements, not {start} to {end}")
        # Pieces follow each other: find the one that holds `start`, then take what is wanted of it and of those after.
        places = self._places[kind][name]
        number = max(bisect_right(places, start, key=lambda place: place.start) - 1, 0)
        position = start
        while position < end:
            place = places[number]
            assert place.start <= position < place.start + place.length, f"{kind} {name} is not in these files"
            stop = min(end, place.start + place.length)
            part = out[position - start : stop - start]
            self._file(place.path).read_into(f"{kind}/{name}", position - place.start, part)
            position, number = stop, number + 1

    def chunks(self, kind: str, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        """The flattened logical tensor in order, in parts of at most `chunk_bytes`."""
        count, step = self._count(name), chunk_bytes // 4
        for first in range(0, count, step):
            yield self.read_range(kind, name, first, min(first + step, count))

    def close(self) -> None:
        """Close all files; the reader opens them again when asked."""
        while self._open:
            self._open.popitem()[1].close()


def check_same_model(origin: Path, there: Mapping[str, list[int]], here: Mapping[str, list[int]]) -> None:
    """Refuse what is of another model than the one at hand, by the names and shapes of its tensors."""
    for name in sorted(there.keys() | here.keys()):
        old, new = there.get(name, "absent"), here.get(name, "absent")
        require(old == new, f"{origin} is of another model: {name} is {old} there and {new} here")


def read_ema(folder: Path, *, shown: bool = False) -> dict[str, Tensor]:
    """The whole average: {name: full fp32 tensor, all experts}. ConfigError when the pieces do not cover it.

    With `shown` there is a bar.
    """
    reader = CheckpointReader(folder)
    names = ProgressBar(list(reader.names("ema")), "load", unit="tensor", shown=shown, leave=False)
    average = {name: reader.read("ema", name) for name in names}
    reader.close()
    if not average:
        raise ConfigError(f"{folder} has no EMA weights")
    return average
