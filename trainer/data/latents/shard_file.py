"""One latent shard, read by position: no memory map, so that a failing disk is an error and not a signal.

Shapes: n samples, C x h x w latent, D text width.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.latents.format import INDEX_TENSORS, check_of, index_digest
from trainer.data.latents.samples import Sample
from trainer.formats.safetensors_header import TensorPlace, read_header

# Name of a tensor -> its dtypes in the safetensors format; and what numpy calls those of the index.
_DTYPES = {
    "latent": ("F16",),
    "latent_std": ("F16",),
    "text": ("F16", "I8"),
    "caption": ("U8",),
    "caption_id": ("I32",),
    "text_offset": ("I64",),
    "latent_check": ("I64",),
    "text_check": ("I64",),
}
_TORCH = {"F16": torch.float16, "I8": torch.int8}
_NUMPY = {"I32": "<i4", "I64": "<i8"}


class DamagedShardError(RuntimeError):
    """A file that is not what its data set says; the message names it and, where known, the sample."""

    def __init__(self, path: Path, what: str, copy_of: Path | None = None) -> None:
        remedy = f", it is a copy of {copy_of}" if copy_of else " and run python -m trainer.data.encode again"
        super().__init__(f"{path} {what}: delete it{remedy}")


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """What dataset.json says of one shard; `index_sha256` is "" in format 1, `bucket` counts picture sizes."""

    file: str
    num_samples: int
    size: int
    sha256: str
    index_sha256: str = ""
    bucket: int = 0


class ShardFile:
    """An open shard whose header and offsets are verified; samples are verified as they are read."""

    def __init__(self, path: Path, entry: ShardEntry, fingerprint: str, copy_of: Path | None = None) -> None:
        self.path, self.entry, self.copy_of = path, entry, copy_of
        try:
            self.handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise self._damage(f"cannot be opened ({error.strerror})") from error
        try:
            self._open(fingerprint)
        except BaseException:
            self.close()
            raise

    def _open(self, fingerprint: str) -> None:
        size = os.fstat(self.handle).st_size
        if size != self.entry.size:
            raise self._damage(f"has {size} bytes instead of {self.entry.size}")
        # Each check needs the one before: the header has to parse before its tensors are read, and these are trusted
        # only when their hash is right; then positions and counts must fit together, whatever a writer did.
        try:
            header = read_header(self.handle)
        except ValueError as error:
            raise self._damage(f"cannot be read, {error}") from error
        self.places = header.places
        if any(not place.shape or place.dtype not in _DTYPES.get(name, ()) for name, place in self.places.items()):
            raise self._damage("cannot be read, its header is damaged")
        found = header.metadata.get("fingerprint")
        if found != fingerprint:
            raise self._damage(f"has fingerprint {found}, the data set {fingerprint}")
        raw = {name: self._bytes(self.places[name]) for name in INDEX_TENSORS if name in self.places}
        if self.entry.index_sha256 and index_digest(header.text, raw) != self.entry.index_sha256:
            raise self._damage("has a damaged header or index")
        self._check_places()
        arrays: dict[str, NDArray[Any]] = {
            name: np.frombuffer(content, _NUMPY[self.places[name].dtype]) for name, content in raw.items()
        }
        self.caption_id: NDArray[np.int32] = arrays["caption_id"]
        self.text_offset: NDArray[np.int64] = arrays["text_offset"]
        self.latent_check = arrays.get("latent_check")
        self.text_check = arrays.get("text_check")
        self.text = self.places["text" if "text" in self.places else "caption"]
        self._check_offsets()

    def _check_places(self) -> None:
        places, count = self.places, self.entry.num_samples
        needed = {"latent", "caption_id", "text_offset"}
        if not needed <= places.keys() or ("text" in places) == ("caption" in places):
            raise self._damage("lacks tensors")
        if self.entry.index_sha256 and not {"latent_check", "text_check"} <= places.keys():
            raise self._damage("lacks checks")
        found = places["latent"].shape[0]
        if found != count:
            raise self._damage(f"holds {found} samples instead of {count}")
        per_sample = [places[name].shape[0] for name in ("caption_id", "latent_check") if name in places]
        if len(places["latent"].shape) != 4 or any(length != count for length in per_sample):
            raise self._damage("has tensors of shapes that do not fit together")

    def _check_offsets(self) -> None:
        """Captions lie one after the other and each sample has one."""
        offset, caption_id, count = self.text_offset, self.caption_id, self.entry.num_samples
        ends = len(offset) > 0 and offset[0] == 0 and offset[-1] == self.text.shape[0]
        whole = ends and bool((np.diff(offset) >= 0).all())
        inside = count == 0 or (caption_id.min() >= 0 and caption_id.max() < len(offset) - 1)
        if not whole or not inside or (self.text_check is not None and len(self.text_check) != len(offset) - 1):
            raise self._damage("has captions that do not fit together")

    def _damage(self, what: str) -> DamagedShardError:
        return DamagedShardError(self.path, what, self.copy_of)

    def _bytes(self, place: TensorPlace, first: int = 0, count: int | None = None) -> bytearray:
        """Rows of a tensor, in memory of their own that a tensor can then be made of without a copy."""
        found = bytearray((place.shape[0] - first if count is None else count) * place.row_bytes)
        try:
            length = os.preadv(self.handle, [found], place.start + first * place.row_bytes)
        except OSError as error:
            raise self._damage(f"cannot be read ({error.strerror})") from error
        if length != len(found):
            raise self._damage("ends too early")
        return found

    def read(self, row: int) -> Sample:
        """One sample; only its own bytes are read. Raises DamagedShardError that names file and key."""
        latent = self._bytes(self.places["latent"], row, 1)
        std = self._bytes(self.places["latent_std"], row, 1) if "latent_std" in self.places else None
        if self.latent_check is not None and check_of(latent, std or b"") != self.latent_check[row]:
            raise self._damage(f"has a damaged latent of sample {self.key(row)}")
        caption = int(self.caption_id[row])
        start, end = self.text_offset[caption : caption + 2].tolist()
        text = self._bytes(self.text, start, end - start)
        if self.text_check is not None and check_of(text) != self.text_check[caption]:
            raise self._damage(f"has a damaged caption of sample {self.key(row)}")
        shape = self.places["latent"].shape[1:]
        return Sample(
            latent=_tensor(latent, "F16", shape).float(),  # by torch: ten times faster than numpy
            latent_std=None if std is None else _tensor(std, "F16", shape).float(),
            text=text.decode() if self.text.dtype == "U8" else _tensor(text, self.text.dtype, (-1, self.text.shape[1])),
        )

    def key(self, row: int) -> str:
        """The key of a sample if its list can be read, else its row."""
        try:
            return str(json.loads((self.copy_of or self.path).with_suffix(".samples.json").read_text())["keys"][row])
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            return f"in row {row}"

    def close(self) -> None:
        """Close the file."""
        os.close(self.handle)


def _tensor(content: bytearray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Values as they are stored, without a copy."""
    if not content:
        return torch.zeros(0, *shape[1:], dtype=_TORCH[dtype])
    return torch.frombuffer(content, dtype=_TORCH[dtype]).view(shape)
