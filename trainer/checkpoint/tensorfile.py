"""One file of tensors in the safetensors format: streamed out with a checksum, read back by flat range.

The library's own writer wants every tensor in host memory at once, and its reader maps the file, so that what
was read counts as memory of the process. Here one chunk is held at a time both ways. Files written here are
ordinary safetensors files; the format is 8 bytes of header length, a JSON header, the data.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from trainer.config import ConfigError

CHUNK_BYTES = 1 << 26
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}
_MAX_HEADER = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True, kw_only=True)
class Written:
    """Size in bytes and XXH3-128 checksum of a file, for the manifest."""

    size: int
    checksum: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """`length` elements that are to be written: `chunks` yields them in order as flat tensors of any device.

    The file says that they are of `shape`, or without one that they are flat.
    """

    dtype: torch.dtype
    length: int
    chunks: Callable[[], Iterable[Tensor]]
    shape: tuple[int, ...] | None = None


def tensor_source(tensor: Tensor) -> Source:
    """The elements of a tensor, fetched to the host chunk by chunk."""
    flat = tensor.detach().contiguous().view(-1)
    step = CHUNK_BYTES // flat.element_size()
    return Source(dtype=flat.dtype, length=flat.numel(), chunks=lambda: flat.split(step))


def write_tensors(path: Path, sources: Mapping[str, Source], metadata: Mapping[str, str]) -> Written:
    """Write fp32, bf16 or uint8 tensors, one chunk in host memory at a time, and flush to disk.

    Raises OSError as the file system does; the file is then incomplete.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, source in sources.items():
        start, end = end, end + source.length * source.dtype.itemsize
        shape = [source.length] if source.shape is None else list(source.shape)
        header[name] = {"dtype": _DTYPES[source.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    hasher = xxhash.xxh3_128()
    size = 0
    with path.open("wb", buffering=0) as file:
        for view in chain([memoryview(struct.pack("<Q", len(text)) + text)], _blocks(sources.values())):
            hasher.update(view)
            size += len(view)
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    return Written(size=size, checksum=hasher.hexdigest())


def _blocks(sources: Iterable[Source]) -> Iterator[memoryview]:
    for source in sources:
        for chunk in source.chunks():
            yield chunk.cpu().view(torch.uint8).numpy().data


class TensorFile:
    """The tensors of one file, read by range; holds one open file and no data.

    `tensors[name]` is (length in elements, offset in the file in bytes), `shapes[name]` and `dtypes[name]` are the
    header's; `metadata` is the writer's.
    Raises ConfigError naming the file when its header is not readable or does not fit its size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("rb", buffering=0)
        try:
            (length,) = struct.unpack("<Q", self.file.read(8))
            if length > _MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(self.file.read(length))
            self.metadata: dict[str, str] = header.pop("__metadata__")
            start = 8 + length
            self.dtypes: dict[str, str] = {name: entry["dtype"] for name, entry in header.items()}
            self.shapes: dict[str, tuple[int, ...]] = {name: tuple(entry["shape"]) for name, entry in header.items()}
            self.tensors: dict[str, tuple[int, int]] = {
                name: (prod(entry["shape"]), start + entry["data_offsets"][0]) for name, entry in header.items()
            }
            end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if end != os.fstat(self.file.fileno()).st_size:
                raise ValueError(f"a header that asks for {end} bytes")
        except (struct.error, ValueError, KeyError, TypeError) as error:
            self.file.close()
            raise ConfigError(f"{path} is damaged: {error}") from error

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill the contiguous host tensor `out` with elements `start` to `start + out.numel()` of a tensor."""
        length, position = self.tensors[name]
        assert 0 <= start and start + out.numel() <= length, (name, start, out.numel(), length)
        view = out.view(-1).view(torch.uint8).numpy().data
        self.file.seek(position + start * out.element_size())
        while view:
            count = self.file.readinto(view)
            if not count:
                raise ConfigError(f"{self.path} is damaged: it ends inside {name}")
            view = view[count:]

    def close(self) -> None:
        """Close the file."""
        self.file.close()
