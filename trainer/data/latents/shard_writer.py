"""The samples of one tar -> latent shards. Format: format.py.

Pictures are decoded by threads while the codec works on the batch before. No more than one shard is in memory.

Shapes: B pictures, C x h x w latent, D text width.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from trainer.config import DataConfig
from trainer.data.images.decode import BadPictureError, cover_crop, read_rgb
from trainer.data.images.tar_scan import IndexRow
from trainer.data.latents.enlargement import scale_of
from trainer.data.latents.format import INDEX_TENSORS, check_of, index_digest
from trainer.data.latents.packed_text import relative_errors, stored_text
from trainer.encoders.protocols import ImageCodec, TextEncoder
from trainer.files import remove_leftovers, replacing, write_json
from trainer.formats.safetensors_header import read_header

Float64s = NDArray[np.float64]
BATCH_SIZE = 64  # pictures through the codec at a time
MAX_SHARD_BYTES = 1 << 29  # about; the samples of a tar that need more go to several shards
_CAPTION_BATCH = 256
_TYPICAL_TOKENS = 20
_BATCHES_AHEAD = 2


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """All that turns samples into shards, and their folders; no text encoder: captions are stored as they are."""

    data: DataConfig
    codec: ImageCodec
    text_encoder: TextEncoder | None
    fingerprint: str
    num_threads: int = 1

    @property
    def latents(self) -> Path:
        """The folder of latent shards."""
        return Path(self.data.latents)

    @property
    def images(self) -> Path:
        """The folder of image shards."""
        return Path(self.data.images)

    def samples_per_shard(self, height: int, width: int) -> int:
        """How many samples of a picture size fill a shard of MAX_SHARD_BYTES."""
        area = (height // self.codec.factor) * (width // self.codec.factor)
        latent = 2 * self.codec.channels * area * (2 if self.data.latent_std else 1)
        value_bytes = 1 if self.data.text_dtype == "int8" else 2
        text = value_bytes * self.text_encoder.dim * _TYPICAL_TOKENS if self.text_encoder else 0
        return max(1, MAX_SHARD_BYTES // (latent + text))


def picture_batches(
    folder: Path, rows: Sequence[IndexRow], height: int, width: int, num_threads: int
) -> Iterator[Tensor]:
    """The pictures of samples of one tar, in order, cropped: uint8 [B, height, width, 3], decoded ahead by threads."""
    with (folder / rows[0].tar).open("rb") as tar, ThreadPoolExecutor(num_threads) as pool:

        def picture(row: IndexRow) -> Tensor:
            content = os.pread(tar.fileno(), row.size, row.offset)
            try:
                image = read_rgb(content, row.orientation)
            except BadPictureError as error:
                raise RuntimeError(
                    f"{row.tar}: {row.key} changed since it was indexed and cannot be decoded any more"
                ) from error
            return torch.from_numpy(np.array(cover_crop(image, height, width)))

        # Batches in the queue are being decoded while the one given out is encoded. More than two ahead would only
        # hold more pictures in memory: the slower of the two sides sets the pace.
        ahead: deque[Iterator[Tensor]] = deque()
        for start in range(0, len(rows), BATCH_SIZE):
            ahead.append(pool.map(picture, rows[start : start + BATCH_SIZE]))
            if len(ahead) > _BATCHES_AHEAD:
                yield torch.stack(list(ahead.popleft()))
        for batch in ahead:
            yield torch.stack(list(batch))


@torch.no_grad()
def _latents(
    encoder: Encoder, rows: Sequence[IndexRow], height: int, width: int
) -> tuple[list[Tensor], list[Tensor], Float64s, Float64s]:
    """Latents and their standard deviations as they are stored; sums and sums of squares per channel."""
    means, stds = [], []
    sums, square_sums = np.zeros((2, encoder.codec.channels))
    for pictures in picture_batches(encoder.images, rows, height, width, encoder.num_threads):
        mean, std = encoder.codec.posterior(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1)
        means.append(mean.cpu().half().contiguous())
        # Added by numpy: torch would add in an order that depends on the number of threads.
        values = means[-1].double().numpy()
        sums += values.sum((0, 2, 3))
        square_sums += np.square(values).sum((0, 2, 3))
        if std is not None and encoder.data.latent_std:
            stds.append(std.cpu().half().contiguous())
            square_sums += np.square(stds[-1].double().numpy()).sum((0, 2, 3))
    if not np.isfinite(square_sums).all():
        raise RuntimeError(f"data.codec={encoder.data.codec} gave latents that do not fit into fp16")
    return means, stds, sums, square_sums


def _texts(encoder: Encoder, captions: list[str]) -> tuple[list[Tensor], float]:
    """Per caption its tokens as stored, or its bytes as uint8 [n]; the largest relative error of a token in 8 bits."""
    if encoder.text_encoder is None:
        return [torch.frombuffer(bytearray(caption.encode()), dtype=torch.uint8) for caption in captions], 0.0
    found: list[Tensor] = []
    worst = 0.0
    for start in range(0, len(captions), _CAPTION_BATCH):
        for text in encoder.text_encoder.encode(captions[start : start + _CAPTION_BATCH]):
            if not text.half().isfinite().all():
                raise RuntimeError(
                    f"data.text_encoder={encoder.data.text_encoder} gave features that do not fit into fp16"
                )
            found.append(stored_text(text, encoder.data.text_dtype))
            if found[-1].dtype == torch.int8 and len(text):
                worst = max(worst, float(relative_errors(text, found[-1]).max()))
    return found, worst


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().numpy().reshape(-1).view(np.uint8).data


def pack_shard(
    latents: Sequence[Tensor], stds: Sequence[Tensor], texts: Sequence[Tensor], caption_id: Sequence[int]
) -> dict[str, Tensor]:
    """The tensors of a shard with their checks: batches of fp16 latents, stored tokens or uint8 bytes per caption."""
    tensors = {
        "latent": torch.cat(list(latents)),
        "caption_id": torch.tensor(caption_id, dtype=torch.int32),
        "caption" if texts[0].dtype == torch.uint8 else "text": torch.cat(list(texts)),
        "text_offset": torch.tensor([0, *(len(text) for text in texts)]).cumsum(0),
        "text_check": torch.tensor([check_of(_bytes(text)) for text in texts]),
    }
    if stds:
        tensors["latent_std"] = torch.cat(list(stds))
    parts = [tensors[name] for name in ("latent", "latent_std") if name in tensors]
    tensors["latent_check"] = torch.tensor([check_of(*map(_bytes, row)) for row in zip(*parts, strict=True)])
    return tensors


def save_shard(path: Path, tensors: dict[str, Tensor], fingerprint: str) -> dict[str, Any]:
    """Write the tensors of a shard; returns its size and hashes."""
    remove_leftovers(path)
    with replacing(path) as temporary:
        # One note only: safetensors writes several in random order, and a rerun must give the same bytes.
        save_file(tensors, temporary, metadata={"fingerprint": fingerprint})
        temporary.chmod(0o644)
    with path.open("rb") as file:
        header = read_header(file.fileno()).text
        whole = hashlib.file_digest(file, "sha256").hexdigest()
    index = {name: bytes(_bytes(tensors[name])) for name in INDEX_TENSORS}
    return {"size": path.stat().st_size, "sha256": whole, "index_sha256": index_digest(header, index)}


def write_shard(encoder: Encoder, name: str, rows: Sequence[IndexRow], height: int, width: int) -> dict[str, Any]:
    """Write NAME.safetensors and NAME.samples.json; returns what the sidecar says of the shard."""
    # Each distinct caption is encoded and stored once, in sorted order: the bytes depend on the samples alone.
    captions = sorted({row.caption for row in rows})
    number = {caption: i for i, caption in enumerate(captions)}
    texts, text_error = _texts(encoder, captions)
    means, stds, sums, square_sums = _latents(encoder, rows, height, width)
    tensors = pack_shard(means, stds, texts, [number[row.caption] for row in rows])
    path = encoder.latents / f"{name}.safetensors"
    hashes = save_shard(path, tensors, encoder.fingerprint)
    # People and the inspector read this list; training needs only the shard, so keys and captions stay out of it.
    samples = {
        "keys": [row.key for row in rows],
        "captions": captions,
        "sizes": [[row.height, row.width] for row in rows],
        "scenes": [row.scene for row in rows] if any(row.scene for row in rows) else [],
    }
    write_json(path.with_suffix(".samples.json"), samples)
    return {
        "file": path.name,
        "num_samples": len(rows),
        "num_captions": len(captions),
        "num_enlarged": sum(scale_of(encoder.data, row) > 1 for row in rows),
        "max_tokens": max(len(text) for text in texts) if encoder.text_encoder else 0,
        **({"text_error": text_error} if encoder.data.text_dtype == "int8" else {}),
        "latent_shape": list(tensors["latent"].shape[1:]),
        "latent_sum": sums.tolist(),
        "latent_square_sum": square_sums.tolist(),
        **hashes,
    }
