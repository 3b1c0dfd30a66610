"""One file of tensors in the safetensors format: streamed out with a checksum, read back by flat range.

The library's own writer wants every tensor in host memory at once, and its reader maps the file, so that what
was read counts as memory of the process. Here one chunk is held at a time both ways. Files written here are
ordinary safetensors files.
"""

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from trainer.errors import ConfigError
from trainer.formats.safetensors_header import read_header

CHUNK_BYTES = 1 << 26
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}
_PART = 1 << 22  # elements of another dtype held while they are converted


@dataclass(frozen=True, kw_only=True)
class Written:
    """Size in bytes and XXH3-128 checksum of a file, for the manifest."""

    size: int
    checksum: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """A tensor to be written: `chunks` yields its elements in order, once, as flat tensors of any device."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Iterable[Tensor]


def flat_source(tensor: Tensor) -> Source:
    """The elements of a tensor as one axis, fetched to the host chunk by chunk."""
    flat = tensor.detach().reshape(-1)
    return Source(dtype=flat.dtype, shape=flat.shape, chunks=flat.split(CHUNK_BYTES // flat.element_size()))


def write_tensors(path: Path, sources: Mapping[str, Source], metadata: Mapping[str, str]) -> Written:
    """Write fp32, bf16 or uint8 tensors, one chunk in host memory at a time, and flush to disk.

    Raises OSError as the file system does; the file is then incomplete.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, source in sources.items():
        start, end = end, end + prod(source.shape) * source.dtype.itemsize
        header[name] = {"dtype": _DTYPES[source.dtype], "shape": source.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    chunks = chain.from_iterable(source.chunks for source in sources.values())
    blocks = (chunk.cpu().view(torch.uint8).numpy().data for chunk in chunks)
    hasher = xxhash.xxh3_128()
    size = 0
    with path.open("wb", buffering=0) as file:
        for view in chain([memoryview(struct.pack("<Q", len(text)) + text)], blocks):
            hasher.update(view)
            size += len(view)
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    return Written(size=size, checksum=hasher.hexdigest())


class TensorFile:
    """The tensors of one file, read by range; holds one open file and no data.

    `places` says dtype and shape of each tensor, `metadata` is the writer's.
    Raises ConfigError naming the file when its header is not readable or does not fit its size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("rb", buffering=0)
        try:
            header = read_header(self.file.fileno())
        except ValueError as error:
            self.file.close()
            raise ConfigError(f"{path} is damaged: {error}") from error
        self.metadata, self.places = header.metadata, header.places

    def length(self, name: str) -> int:
        """Number of elements of a tensor."""
        return prod(self.places[name].shape)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill the flat host tensor `out`, in its dtype, with the elements from `start` on of a tensor."""
        assert 0 <= start and start + out.numel() <= self.length(name), (name, start, out.numel(), self.length(name))
        place = self.places[name]
        if place.dtype != _DTYPES[out.dtype]:
            stored = next(dtype for dtype, word in _DTYPES.items() if word == place.dtype)
            for part in out.split(_PART):
                raw = torch.empty(part.numel(), dtype=stored)
                self.read_into(name, start, raw)
                part.copy_(raw)
                start += part.numel()
            return
        view = out.view(torch.uint8).numpy().data
        self.file.seek(place.start + start * out.element_size())
        while view:
            count = self.file.readinto(view)
            if not count:
                raise ConfigError(f"{self.path} is damaged: it ends inside {name}")
            view = view[count:]

    def close(self) -> None:
        """Close the file."""
        self.file.close()
