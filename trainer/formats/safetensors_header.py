"""The header of a safetensors file: 8 bytes of length, JSON that says where each tensor lies, then the data.

Read here and not by the library, which maps files into memory: all that was read would count as memory of the
process, and a failing disk would be a signal that kills it instead of an error.
"""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal

from pydantic import NonNegativeInt, TypeAdapter

_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1, "I32": 4, "I64": 8}
_MAX_HEADER = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """A tensor begins at byte `start` of its file; `dtype` is the format's name for it (F32, BF16, ...)."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one index of the first axis."""
        return _ITEM_BYTES[self.dtype] * prod(self.shape[1:])


@dataclass(frozen=True, kw_only=True)
class SafetensorsHeader:
    """The JSON as stored, the writer's notes and the place of each tensor."""

    text: bytes
    metadata: dict[str, str]
    places: dict[str, TensorPlace]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    dtype: Literal["F32", "BF16", "F16", "I8", "U8", "I32", "I64"]
    shape: tuple[NonNegativeInt, ...]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


_HEADER = TypeAdapter(dict[str, _Entry | dict[str, str]])


def read_header(handle: int) -> SafetensorsHeader:
    """The header of an open file whose tensors fill it, each byte once, as the library wants it, too.

    Raises ValueError with words for a sentence ("it is no safetensors file"), OSError as the file system does.
    """
    size = os.fstat(handle).st_size
    length = int.from_bytes(os.pread(handle, 8, 0), "little")
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise ValueError("it is no safetensors file")
    text = os.pread(handle, length, 8)
    try:
        header, end = _parse(text)
    except ValueError as error:
        raise ValueError("its header is damaged") from error
    if end != size:
        raise ValueError(f"its header asks for {end} bytes")
    return header


def _parse(text: bytes) -> tuple[SafetensorsHeader, int]:
    """The header and where the data of the last tensor end; ValueError if it makes no sense."""
    entries = _HEADER.validate_json(text, strict=True)  # before `json`, which neither is strict nor limits the depth
    json.loads(text, object_pairs_hook=_unique)
    metadata = entries.pop("__metadata__", {})
    tensors = [(*entry.data_offsets, name, entry) for name, entry in entries.items() if isinstance(entry, _Entry)]
    if isinstance(metadata, _Entry) or len(tensors) < len(entries) or not text.startswith(b"{"):
        raise ValueError
    start, places = 8 + len(text), {}
    for first, end, name, entry in sorted(tensors, key=lambda tensor: tensor[:2]):
        num_bytes = _ITEM_BYTES[entry.dtype] * prod(entry.shape)
        fits = 8 + len(text) + first == start and end - first == num_bytes
        if not fits or prod(filter(None, entry.shape)) >= 1 << 60 or not name.isprintable():
            raise ValueError
        places[name] = TensorPlace(dtype=entry.dtype, shape=entry.shape, start=start)
        start += num_bytes
    return SafetensorsHeader(text=text, metadata=metadata, places=places), start


def _unique(pairs: list[tuple[str, Any]]) -> None:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name is there twice")
