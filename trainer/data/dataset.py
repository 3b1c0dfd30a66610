"""Opens the data of a run: a folder of latent shards, checked against the settings, or synthetic samples."""

import hashlib
import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import ConfigError, DataConfig, TrainConfig, require
from trainer.data.batches import DataState
from trainer.data.format import DATASET_NAME, READABLE_VERSIONS, SETTINGS, content_digest, encoding_fingerprint
from trainer.data.latents import Batch, LatentDataset, LatentInfo
from trainer.data.loader import build_loader
from trainer.data.shard_dataset import ShardDataset, read_empty_text
from trainer.data.shard_file import DamagedShardError, ShardEntry, ShardFile
from trainer.encoders import TextEncoder, build_codec, build_text_encoder

__all__ = ["Batch", "DataState", "LatentDataset", "LatentInfo", "build_loader", "open_dataset"]
_MAX_OPENED = 256  # shards opened to be checked before a run; the others when they are first read
_ENCODE = "python -m trainer.data.encode"


def open_dataset(config: TrainConfig) -> LatentDataset:
    """Open the data of a run; ConfigError when it is missing, incomplete, damaged or encoded for other settings.

    Every shard must be there; up to 256 of them are opened for their headers, the others when first read.
    """
    data = config.data
    if data.source == "synthetic":
        from trainer.data.synthetic import SyntheticDataset

        return SyntheticDataset(data.image_size, config.seed)
    folder = Path(data.latents)
    content = read_dataset_file(folder)
    text_encoder = build_text_encoder(data.text_encoder)
    _check_settings(data, content, text_encoder)
    try:
        shards = [ShardEntry(**shard) for shard in content["shards"]]
        info = _describe(data, content["info"], text_encoder)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{folder / DATASET_NAME} lacks {error}: run {_ENCODE} again") from error
    _check_shards(folder, shards, content["info"]["fingerprint"])
    online = text_encoder if data.text == "online" else None
    empty = "" if online else _empty_text(folder, content)
    return ShardDataset(folder, info, shards, content["info"]["fingerprint"], empty, online)


def read_dataset_file(folder: Path) -> dict[str, Any]:
    """dataset.json of a folder of latents; ConfigError if it is missing, damaged or of another format."""
    path = folder / DATASET_NAME
    require(path.is_file(), f"data.latents={folder} has no {DATASET_NAME}: run {_ENCODE} with this recipe")
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        version = content.get("format_version")
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: run {_ENCODE} again") from error
    require(
        version in READABLE_VERSIONS,
        f"data.latents={folder} has format {version} where {READABLE_VERSIONS[-1]} is needed: run {_ENCODE} again",
    )
    sound = version == 1 or content.get("sha256") == content_digest(content)
    require(sound, f"{path} is damaged (its hash differs): run {_ENCODE} again")
    return content


def _kind(spec: Any) -> Any:
    """A setting without the paths of an encoder, which may differ between machines."""
    return re.sub(r":[^+]*", "", spec) if isinstance(spec, str) else spec


def _check_settings(data: DataConfig, content: dict[str, Any], text_encoder: TextEncoder) -> None:
    """Refuse latents that the present settings would not give."""
    online = data.text == "online"
    for setting in SETTINGS:
        given = getattr(data, setting)
        stored = content["settings"].get(setting, getattr(DataConfig, setting))
        require(
            _kind(given) == _kind(stored) or (online and setting == "text_encoder"),
            f"data.{setting} is {given} but data.latents={data.latents} was encoded with {stored}: "
            "encode into another folder, or restore the setting",
        )
    fingerprint = encoding_fingerprint(data, build_codec(data.codec), None if online else text_encoder)
    stored = content["info"]["fingerprint"]
    require(
        fingerprint == stored,
        f"data.latents={data.latents} is stale: its fingerprint is {stored} but data.codec={data.codec} and "
        f"data.text_encoder={data.text_encoder} now give {fingerprint}; delete it and encode again",
    )


def _describe(data: DataConfig, stored: dict[str, Any], text_encoder: TextEncoder) -> LatentInfo:
    """The description with what is decided when the latents are read: online text, normalisation."""
    info = LatentInfo(**{f.name: stored[f.name] for f in fields(LatentInfo)})
    info = replace(info, codec=data.codec, text_encoder=data.text_encoder)
    decided = {}
    if data.text == "online":
        decided["text"] = text_encoder.fingerprint()
        info = replace(info, text_dim=text_encoder.dim, max_tokens=text_encoder.max_tokens)
    if data.normalize == "codec":
        require(
            "codec_scale" in stored,
            f"data.normalize=codec needs data.latents={data.latents} in the newest format: run {_ENCODE} again",
        )
        shift, scale = stored["codec_shift"], stored["codec_scale"]
        decided["normalize"] = f"{shift} {scale}"
        info = replace(info, mean=[shift] * info.channels, std=[1 / scale] * info.channels)
    if decided:
        parts = json.dumps([info.fingerprint, decided], sort_keys=True)
        info = replace(info, fingerprint=hashlib.sha256(parts.encode()).hexdigest()[:16])
    return info


def _check_shards(folder: Path, shards: list[ShardEntry], fingerprint: str) -> None:
    """Refuse a folder with shards that are missing or, among those opened, damaged or of another data set."""
    present = {path.name for path in folder.iterdir()}
    for entry in shards:
        require(
            entry.file in present,
            f"data.latents={folder}: shard {entry.file} is missing: run {_ENCODE} again",
        )
    require(
        len({entry.file for entry in shards}) == len(shards),
        f"{folder / DATASET_NAME} names a shard twice: run {_ENCODE} again",
    )
    for number in np.unique(np.linspace(0, len(shards) - 1, _MAX_OPENED).astype(int)):
        try:
            ShardFile(folder / shards[number].file, shards[number], fingerprint).close()
        except DamagedShardError as error:
            raise ConfigError(f"data.latents={folder}: shard {error}") from error


def _empty_text(folder: Path, content: dict[str, Any]) -> Any:
    try:
        return read_empty_text(folder / content["empty_text"], content["info"]["text_dim"], content.get("empty_sha256"))
    except DamagedShardError as error:
        raise ConfigError(f"data.latents={folder}: {error}") from error
