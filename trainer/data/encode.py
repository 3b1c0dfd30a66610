"""Image shards -> latent shards: `python -m trainer.data.encode CONFIG [key=value ...]`.

Each tar becomes one shard, made of the samples its index keeps; a shard whose sidecar is there is finished and
skipped. With RANK and WORLD_SIZE set, the shards are dealt out to the ranks; whoever sees all of them finished
writes dataset.json, always with the same bytes. Formats: format.py.

Shapes: B pictures, C x h x w latent, D text width.
"""

import argparse
import hashlib
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from trainer.config import DataConfig, load_config, require, run_cli
from trainer.data.files import replacing
from trainer.data.format import DATASET_NAME, EMPTY_NAME, FORMAT_VERSION, SETTINGS, encoding_fingerprint
from trainer.data.images import UNREADABLE, cover_crop, read_rgb
from trainer.data.index import index_or_open
from trainer.data.index_file import Index, TarEntry, check_unchanged, open_index
from trainer.data.tar_scan import IndexRow
from trainer.encoders import ImageCodec, TextEncoder, build_codec, build_text_encoder

_BATCH_SIZE = 64  # pictures through the codec at a time
_TOKEN_MULTIPLE = 8  # text is padded to a multiple of this length


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One shard to be: its name, and the tar it is made of."""

    name: str
    entry: TarEntry


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """All that turns samples into a shard, and the folder it goes to."""

    data: DataConfig
    codec: ImageCodec
    text_encoder: TextEncoder
    fingerprint: str

    @property
    def latents(self) -> Path:
        """The folder of latent shards."""
        return Path(self.data.latents)

    @property
    def images(self) -> Path:
        """The folder of image shards."""
        return Path(self.data.images)


def build_encoder(data: DataConfig) -> Encoder:
    """Check the settings and build the encoders; writes nothing."""
    require(bool(data.images), "data.images is empty: name the folder of image shards to encode")
    require(bool(data.latents), "data.latents is empty: name the folder to write latent shards to")
    codec, text_encoder = build_codec(data.codec), build_text_encoder(data.text_encoder)
    require(
        data.image_size % codec.factor == 0,
        f"data.image_size is {data.image_size}: use a multiple of {codec.factor}, as data.codec={data.codec} needs",
    )
    fingerprint = encoding_fingerprint(data.image_size, codec, text_encoder)
    return Encoder(data=data, codec=codec, text_encoder=text_encoder, fingerprint=fingerprint)


def split_shards(index: Index) -> list[Shard]:
    """One shard per tar that has sound samples, named after it, in the order of names."""
    entries = [entry for entry in index.tars if entry.num_kept]
    shards = [Shard(name=entry.tar.removesuffix(".tar").replace("/", "__"), entry=entry) for entry in entries]
    tar_of: dict[str, str] = {}
    for shard in shards:
        other = tar_of.setdefault(shard.name, shard.entry.tar)
        require(
            other == shard.entry.tar,
            f"data.images={index.folder}: {other} and {shard.entry.tar} would both give shard {shard.name}: rename one",
        )
    return shards


def read_sidecar(encoder: Encoder, shard: Shard) -> dict[str, Any] | None:
    """The sidecar of a finished shard; None if it has to be encoded (again)."""
    path = encoder.latents / f"{shard.name}.json"
    tensors = path.with_suffix(".safetensors")
    if not (path.is_file() and tensors.is_file()):
        return None
    sidecar: dict[str, Any] = json.loads(path.read_text())
    require(
        sidecar["fingerprint"] == encoder.fingerprint,
        f"data.latents={encoder.latents} holds shards made with other encoders or another data.image_size: "
        "name another folder or delete this one",
    )
    finished = sidecar["source"] == shard.entry.source and sidecar["size"] == tensors.stat().st_size
    return sidecar if finished else None


def read_picture(folder: Path, row: IndexRow, size: int) -> Tensor:
    """One picture of an indexed folder, resized and cropped: uint8 [size, size, 3]."""
    with (folder / row.tar).open("rb") as file:
        file.seek(row.offset)
        content = file.read(row.size)
    try:
        image = read_rgb(content, row.orientation)
    except UNREADABLE as error:
        raise RuntimeError(
            f"{folder / row.tar}: {row.key} changed since it was indexed and cannot be decoded any more"
        ) from error
    return torch.from_numpy(np.array(cover_crop(image, size)))


@torch.no_grad()
def _latents(encoder: Encoder, rows: list[IndexRow]) -> Tensor:
    """Unscaled fp16 latents [n, C, h, w]."""
    parts = []
    for start in range(0, len(rows), _BATCH_SIZE):
        pictures = torch.stack(
            [read_picture(encoder.images, row, encoder.data.image_size) for row in rows[start : start + _BATCH_SIZE]]
        )
        rgb_BCHW = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
        parts.append(encoder.codec.encode(rgb_BCHW).half())
    latent = torch.cat(parts).contiguous()
    if not bool(latent.isfinite().all()):
        raise RuntimeError(f"data.codec={encoder.data.codec} gave latents that do not fit into fp16")
    return latent


def encode_shard(encoder: Encoder, index: Index, shard: Shard) -> dict[str, Any]:
    """Write one shard, its lists of samples, and last its sidecar; returns the sidecar."""
    check_unchanged(index, shard.entry)
    rows = index.rows_of(shard.entry)
    captions = sorted({row.caption for row in rows})
    number = {caption: i for i, caption in enumerate(captions)}
    texts = [text.half() for text in encoder.text_encoder.encode(captions)]
    latent = _latents(encoder, rows)
    tensors = {
        "latent": latent,
        "caption_id": torch.tensor([number[row.caption] for row in rows], dtype=torch.int32),
        "text": torch.cat(texts),
        "text_offset": torch.tensor([0, *(len(text) for text in texts)]).cumsum(0),
    }
    path = encoder.latents / f"{shard.name}.safetensors"
    with replacing(path) as temporary:
        # One note only: safetensors writes several in random order, and a rerun must give the same bytes.
        save_file(tensors, temporary, metadata={"fingerprint": encoder.fingerprint})
        temporary.chmod(0o644)
    values = latent.double()
    sidecar = {
        "format_version": FORMAT_VERSION,
        "fingerprint": encoder.fingerprint,
        "tar": shard.entry.tar,
        "source": shard.entry.source,
        "size": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "num_samples": len(rows),
        "max_tokens": max(len(text) for text in texts),
        "latent_shape": list(latent.shape[1:]),
        "latent_sum": values.sum((0, 2, 3)).tolist(),
        "latent_square_sum": values.square().sum((0, 2, 3)).tolist(),
        "num_captions": len(captions),
    }
    samples = {
        "keys": [row.key for row in rows],
        "captions": captions,
        "scenes": [row.scene for row in rows] if any(row.scene for row in rows) else [],
    }
    _write_json(path.with_suffix(".samples.json"), samples)
    _write_json(path.with_suffix(".json"), sidecar)
    return sidecar


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def write_dataset(encoder: Encoder, sidecars: dict[str, dict[str, Any]]) -> None:
    """Write the empty caption's text and dataset.json, with mean and standard deviation per latent channel."""
    empty = encoder.text_encoder.encode([""])[0].half()
    with replacing(encoder.latents / EMPTY_NAME) as temporary:
        save_file({"text": empty}, temporary)
        temporary.chmod(0o644)
    parts = list(sidecars.values())
    channels, height, width = parts[0]["latent_shape"]
    count = height * width * sum(part["num_samples"] for part in parts)
    means = [math.fsum(part["latent_sum"][c] for part in parts) / count for c in range(channels)]
    squares = [math.fsum(part["latent_square_sum"][c] for part in parts) / count for c in range(channels)]
    longest = max(len(empty), *(part["max_tokens"] for part in parts))
    info = {
        "channels": channels,
        "height": height,
        "width": width,
        "text_dim": encoder.text_encoder.dim,
        "max_tokens": -(-longest // _TOKEN_MULTIPLE) * _TOKEN_MULTIPLE,
        "codec": encoder.data.codec,
        "text_encoder": encoder.data.text_encoder,
        "fingerprint": encoder.fingerprint,
        "mean": means,
        "std": [math.sqrt(max(s - m * m, 1e-12)) for s, m in zip(squares, means, strict=True)],
    }
    shards = [
        {"file": f"{name}.safetensors", **{key: part[key] for key in ("num_samples", "size", "sha256")}}
        for name, part in sidecars.items()
    ]
    content = {
        "format_version": FORMAT_VERSION,
        "num_samples": sum(part["num_samples"] for part in parts),
        "info": info,
        "settings": {name: getattr(encoder.data, name) for name in SETTINGS},
        "empty_text": EMPTY_NAME,
        "shards": shards,
    }
    _write_json(encoder.latents / DATASET_NAME, content)


def encode(encoder: Encoder, *, rank: int = 0, world_size: int = 1) -> bool:
    """Encode this rank's unfinished shards; returns whether the whole data set is now finished."""
    index = index_or_open(encoder.images) if world_size == 1 else open_index(encoder.images)
    shards = split_shards(index)
    require(bool(shards), f"data.images={encoder.images} has no sound sample: see python -m trainer.data.index")
    sidecars = {shard.name: read_sidecar(encoder, shard) for shard in shards}
    todo = [shard for shard in shards[rank::world_size] if sidecars[shard.name] is None]
    print(f"{len(shards)} shards, {sum(s is not None for s in sidecars.values())} finished, {len(todo)} to encode")
    encoder.latents.mkdir(parents=True, exist_ok=True)
    for shard in tqdm(todo, desc="encode", unit="shard", disable=None):
        start = time.perf_counter()
        made = encode_shard(encoder, index, shard)
        seconds = time.perf_counter() - start
        tqdm.write(f"{shard.name}: {made['num_samples']} pictures, {made['num_captions']} captions, {seconds:.1f} s")
    sidecars = {shard.name: read_sidecar(encoder, shard) for shard in shards}
    finished = {name: sidecar for name, sidecar in sidecars.items() if sidecar is not None}
    if len(finished) < len(shards):
        return False
    write_dataset(encoder, finished)
    print(f"{encoder.latents / DATASET_NAME}: {sum(s['num_samples'] for s in finished.values())} samples")
    return True


def _main(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="trainer.data.encode", description="Encode image shards to latent shards.")
    parser.add_argument("config", help="YAML recipe, or its name in trainer/configs")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    encoder = build_encoder(load_config(args.config, args.overrides).data)
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    encode(encoder, rank=rank, world_size=world_size)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    run_cli(lambda: _main(argv))


if __name__ == "__main__":
    main()
