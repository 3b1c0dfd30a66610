"""A folder of image shards -> a folder of latent shards, by any number of processes. Format: format.py.

Each tar becomes one shard (several if it is large), made of the samples its index keeps; a tar whose sidecar is
there is finished and skipped, and a rerun after a kill gives the same bytes. The tars are dealt out to the processes;
whoever sees all of them finished writes dataset.json, always with the same bytes.
"""

import hashlib
import importlib.metadata
import json
import math
import time
from pathlib import Path
from typing import Any

from safetensors.torch import save

from trainer.config import DataConfig, require
from trainer.data.images.decode import nearest_bucket
from trainer.data.images.index_file import Index, TarEntry, check_unchanged, open_index
from trainer.data.images.tar_scan import IndexRow
from trainer.data.index import index_or_open
from trainer.data.latents.enlargement import check_enlargement, large_enough, too_small
from trainer.data.latents.format import CROP, DATASET_NAME, FORMAT_VERSION, SETTINGS, encoding_fingerprint, signed_json
from trainer.data.latents.packed_text import stored_text
from trainer.data.latents.shard_writer import Encoder, write_shard
from trainer.encoders.build import build_codec, build_text_encoder
from trainer.encoders.protocols import TextEncoder
from trainer.files import check_writable, git_commit, replacing, write_json
from trainer.formats.progress_bar import ProgressBar

_EMPTY_NAME = "empty.safetensors"
_MAX_LOOKED_AT = 16  # tars whose sizes of pictures are looked at before anything is encoded
_TOKEN_MULTIPLE = 8  # text is padded to a multiple of this length
Sidecar = dict[str, Any]


def build_encoder(data: DataConfig, num_threads: int = 1) -> Encoder:
    """Check the settings and build the encoders; writes nothing."""
    require(bool(data.images), "data.images is empty: name the folder of image shards to encode")
    require(bool(data.latents), "data.latents is empty: name the folder to write latent shards to")
    require(
        Path(data.images).resolve() != Path(data.latents).resolve(),
        f"data.latents={data.latents} is the folder of data.images: name another for the latents",
    )
    check_writable(Path(data.latents), f"data.latents={data.latents}")
    codec = build_codec(data.codec)
    text_encoder = build_text_encoder(data.text_encoder) if data.text == "cache" else None
    setting = "data.buckets" if data.buckets else "data.image_size"
    for height, width in data.picture_sizes():
        require(
            height % codec.factor == 0 and width % codec.factor == 0,
            f"{setting} is {f'{height}x{width}' if data.buckets else height}: use multiples of {codec.factor}, "
            f"as data.codec={data.codec} needs",
        )
    require(
        codec.has_std or not data.latent_std,
        f"data.latent_std is true, but data.codec={data.codec} gives no standard deviation: use false",
    )
    fingerprint = encoding_fingerprint(data, codec, text_encoder)
    return Encoder(data=data, codec=codec, text_encoder=text_encoder, fingerprint=fingerprint, num_threads=num_threads)


def shard_names(index: Index) -> dict[str, TarEntry]:
    """Name of its shards -> tar, for each tar that has sound samples, in the order of names."""
    found: dict[str, TarEntry] = {}
    for entry in index.tars:
        if entry.num_kept:
            name = entry.tar.removesuffix(".tar").replace("/", "__")
            other = found.setdefault(name, entry).tar
            require(
                other == entry.tar,
                f"data.images={index.folder}: {other} and {entry.tar} would both give shard {name}: rename one",
            )
    return found


def read_sidecar(encoder: Encoder, name: str, entry: TarEntry) -> Sidecar | None:
    """The sidecar of a finished tar; None if it has to be encoded (again)."""
    try:
        sidecar: Sidecar = json.loads((encoder.latents / f"{name}.json").read_text())
        fingerprint, version = sidecar["fingerprint"], sidecar["format_version"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    require(
        fingerprint == encoder.fingerprint,
        f"data.latents={encoder.latents} holds shards made with other encoders or settings, such as data.image_size: "
        "name another folder or delete this one",
    )
    if version != FORMAT_VERSION or sidecar["source"] != entry.source:
        return None
    given, stored = encoder.data.enlarge_up_to, sidecar.get("enlarge_up_to")
    require(
        stored in (given, None),  # None: older, and complete
        f"data.enlarge_up_to is {given:g} but data.latents={encoder.latents} holds shards made with {stored}: restore "
        "it, name another folder or delete this one",
    )
    files = [(encoder.latents / shard["file"], shard["size"]) for shard in sidecar["shards"]]
    return sidecar if all(path.is_file() and path.stat().st_size == size for path, size in files) else None


def code_version() -> str:
    """Version of the package and, in a checkout, its commit."""
    try:
        version = importlib.metadata.version("ec-dit")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
    return f"{version}+{git_commit()}" if git_commit() else version


def encode_tar(encoder: Encoder, index: Index, name: str, entry: TarEntry) -> Sidecar:
    """Write the shards of one tar, and last their sidecar; returns the sidecar."""
    check_unchanged(index, entry)  # its places in the tar would point at other bytes
    sizes = encoder.data.picture_sizes()
    groups: list[list[IndexRow]] = [[] for _ in sizes]
    found = index.rows_of(entry)
    kept = large_enough(encoder.data, found)
    for row in kept:
        groups[nearest_bucket(sizes, row.height, row.width)].append(row)
    shards = []
    for (height, width), rows in zip(sizes, groups, strict=True):
        stem = name if len(sizes) == 1 else f"{name}-{height}x{width}"
        per_shard = encoder.samples_per_shard(height, width)
        chunks = [rows[start : start + per_shard] for start in range(0, len(rows), per_shard)]
        names = [stem] if len(chunks) == 1 else [f"{stem}-{number:03d}" for number in range(len(chunks))]
        shards += [write_shard(encoder, *pair, height, width) for pair in zip(names, chunks, strict=True)]
    sidecar = {
        "format_version": FORMAT_VERSION,
        "fingerprint": encoder.fingerprint,
        "codec_fingerprint": encoder.codec.fingerprint(),
        "text_fingerprint": encoder.text_encoder.fingerprint() if encoder.text_encoder else "online",
        "picture_sizes": sizes,
        "crop": CROP,
        "enlarge_up_to": encoder.data.enlarge_up_to,
        "num_too_small": len(found) - len(kept),
        "code_version": code_version(),
        "tar": entry.tar,
        "source": entry.source,
        "shards": shards,
    }
    write_json(encoder.latents / f"{name}.json", sidecar)
    return sidecar


def _statistics(encoder: Encoder, shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation per latent channel over all samples, and the codec's own normalisation."""
    channels = encoder.codec.channels
    count = sum(math.prod(shard["latent_shape"][1:]) * shard["num_samples"] for shard in shards)
    means = [math.fsum(shard["latent_sum"][c] for shard in shards) / count for c in range(channels)]
    squares = [math.fsum(shard["latent_square_sum"][c] for shard in shards) / count for c in range(channels)]
    return {
        "mean": means,
        "std": [math.sqrt(max(s - m * m, 1e-12)) for s, m in zip(squares, means, strict=True)],
        "codec_shift": encoder.codec.shift,
        "codec_scale": encoder.codec.scale,
    }


def _write_empty_text(folder: Path, text_encoder: TextEncoder, text_dtype: str) -> tuple[str, int]:
    """Write the empty caption's tokens; returns the file's hash and their number."""
    empty = stored_text(text_encoder.encode([""])[0], text_dtype)
    content = save({"text": empty})
    with replacing(folder / _EMPTY_NAME) as temporary:
        temporary.write_bytes(content)
    return hashlib.sha256(content).hexdigest(), len(empty)


def write_dataset(encoder: Encoder, sidecars: list[Sidecar]) -> None:
    """Write the empty caption's text and dataset.json."""
    parts = [shard for sidecar in sidecars for shard in sidecar["shards"]]
    factor = encoder.codec.factor
    buckets = [[height // factor, width // factor] for height, width in encoder.data.picture_sizes()]
    longest, empty_sha256 = 0, None
    if encoder.text_encoder is not None:
        empty_sha256, length = _write_empty_text(encoder.latents, encoder.text_encoder, encoder.data.text_dtype)
        longest = max(length, *(part["max_tokens"] for part in parts))
    info = {
        "channels": encoder.codec.channels,
        "height": buckets[0][0],
        "width": buckets[0][1],
        "text_dim": encoder.text_encoder.dim if encoder.text_encoder else 0,
        "max_tokens": -(-longest // _TOKEN_MULTIPLE) * _TOKEN_MULTIPLE,
        "codec": encoder.data.codec,
        "text_encoder": encoder.data.text_encoder,
        "fingerprint": encoder.fingerprint,
        **_statistics(encoder, parts),
    }
    if encoder.data.text_dtype == "int8":
        info["text_error"] = max(part["text_error"] for part in parts)
    keys = ("file", "num_samples", "size", "sha256", "index_sha256")
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "num_samples": sum(part["num_samples"] for part in parts),
        "num_too_small": sum(sidecar.get("num_too_small", 0) for sidecar in sidecars),
        "info": info,
        "settings": {name: getattr(encoder.data, name) for name in SETTINGS},
        "empty_text": _EMPTY_NAME if encoder.text_encoder else None,
        "empty_sha256": empty_sha256,
        "codec_fingerprint": encoder.codec.fingerprint(),
        "buckets": buckets,
        "shards": [
            {**{key: part[key] for key in keys}, "bucket": buckets.index(part["latent_shape"][1:])} for part in parts
        ],
    }
    with replacing(encoder.latents / DATASET_NAME) as temporary:
        temporary.write_bytes(signed_json(content))


def _encode_share(encoder: Encoder, index: Index, tars: dict[str, TarEntry], todo: list[str], shown: bool) -> None:
    """Encode some of the tars, a line for each; `shown`: with a bar."""
    encoder.latents.mkdir(parents=True, exist_ok=True)
    for name in ProgressBar(todo, "encode", unit="tar", shown=shown):
        start = time.perf_counter()
        sidecar = encode_tar(encoder, index, name, tars[name])
        keys = ("num_samples", "num_enlarged", "num_captions")
        pictures, enlarged, captions = (sum(shard[key] for shard in sidecar["shards"]) for key in keys)
        small = f", {sidecar['num_too_small']} left out as too small" if sidecar["num_too_small"] else ""
        seconds = time.perf_counter() - start
        ProgressBar.write(
            f"{name}: {pictures} pictures ({enlarged} enlarged){small}, {captions} captions, {seconds:.1f} s"
        )


def encode(encoder: Encoder, *, rank: int = 0, world_size: int = 1) -> bool:
    """Encode this rank's unfinished tars; returns whether the whole data set is now finished."""
    index = index_or_open(encoder.images) if world_size == 1 else open_index(encoder.images)
    tars = shard_names(index)
    require(bool(tars), f"data.images={encoder.images} has no sound sample: see python -m trainer.data.index")
    spread = list(tars.values())[:: -(-len(tars) // _MAX_LOOKED_AT)]
    check_enlargement(encoder.data, (row for entry in spread for row in index.rows_of(entry)))
    finished = {name: read_sidecar(encoder, name, entry) is not None for name, entry in tars.items()}
    todo = [name for name in list(tars)[rank::world_size] if not finished[name]]
    print(f"{len(tars)} tars, {sum(finished.values())} finished, {len(todo)} to encode")
    _encode_share(encoder, index, tars, todo, shown=rank == 0)
    # Other processes may have ended meanwhile: whoever finds every sidecar writes the list. Several may, and write the
    # same bytes, so they need not talk to each other.
    sidecars = [read_sidecar(encoder, name, entry) for name, entry in tars.items()]
    whole = [sidecar for sidecar in sidecars if sidecar is not None]
    if len(whole) < len(tars):
        return False
    write_dataset(encoder, whole)
    samples = sum(shard["num_samples"] for sidecar in whole for shard in sidecar["shards"])
    small = sum(sidecar.get("num_too_small", 0) for sidecar in whole)
    print(f"{encoder.latents / DATASET_NAME}: {samples} samples{too_small(small)}")
    return True
