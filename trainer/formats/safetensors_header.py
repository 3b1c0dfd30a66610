"""The header of a safetensors file: 8 bytes of length, JSON that says where each tensor lies, then the data.

Read here and not by the library, which maps files into memory: all that was read would count as memory of the
process, and a failing disk would be a signal that kills it instead of an error.
"""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1, "I32": 4, "I64": 8}
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
    """The JSON as stored, the writer's notes, the place of each tensor, and where the data of the last one ends."""

    text: bytes
    metadata: dict[str, str]
    places: dict[str, TensorPlace]
    end: int


def read_header(handle: int) -> SafetensorsHeader:
    """The header of an open file; every place in it lies inside the file.

    Raises ValueError with words for a sentence ("it is no safetensors file"), OSError as the file system does.
    """
    size = os.fstat(handle).st_size
    length = int.from_bytes(os.pread(handle, 8, 0), "little")
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise ValueError("it is no safetensors file")
    text = os.pread(handle, length, 8)
    try:
        content: dict[str, Any] = json.loads(text)
        metadata = dict(content.pop("__metadata__", {}))
        places = {name: _place(entry, 8 + length, size) for name, entry in content.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in content.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("its header is damaged") from error
    return SafetensorsHeader(text=text, metadata=metadata, places=places, end=end)


def _place(entry: dict[str, Any], data: int, size: int) -> TensorPlace:
    """One entry of a header whose data begin at byte `data`; one of the errors above if it makes no sense."""
    first, end = entry["data_offsets"]
    shape = tuple(int(length) for length in entry["shape"])
    num_bytes = _ITEM_BYTES[entry["dtype"]] * prod(shape)
    if min(shape, default=0) < 0 or end - first != num_bytes or first < 0 or data + end > size:
        raise ValueError(entry)
    return TensorPlace(dtype=entry["dtype"], shape=shape, start=data + first)
