"""A folder of latent shards as dataset.json describes it, checked against the settings of a run."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from trainer.data.latents.format import DATASET_NAME, READABLE_VERSIONS, SETTINGS, encoding_fingerprint, is_signed
from trainer.data.latents.packed_text import stored_width
from trainer.data.latents.shard_file import DamagedShardError, ShardEntry, ShardFile
from trainer.encoders.protocols import ImageCodec, TextEncoder
from trainer.errors import ConfigError, require
from trainer.settings.data import DataConfig

_MAX_OPENED = 256  # shards opened to be checked before a run; the others when they are first read
_ENCODE = "python -m trainer.data.encode"
Buckets = list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class LatentFolder:
    """What dataset.json says: `info` as stored, the shards, the latent sizes of the buckets."""

    path: Path
    info: dict[str, Any]
    settings: dict[str, Any]
    shards: list[ShardEntry]
    buckets: Buckets
    codec_fingerprint: str
    empty_text: str | None
    empty_sha256: str | None
    num_too_small: int = 0

    @property
    def fingerprint(self) -> str:
        """Hash of everything that shaped the values of the shards."""
        return str(self.info["fingerprint"])

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)

    def read_empty(self) -> Tensor | str:
        """The empty caption's tokens as stored; "" where captions are encoded while training."""
        if self.empty_text is None:
            return ""
        path = self.path / self.empty_text
        try:
            content = path.read_bytes()
            tokens = load(content)["text"]
        except (OSError, SafetensorError, KeyError) as error:
            raise ConfigError(f"data.latents={self.path}: {DamagedShardError(path, 'cannot be read')}") from error
        same = self.empty_sha256 is None or hashlib.sha256(content).hexdigest() == self.empty_sha256
        damage = DamagedShardError(path, "is not the empty caption of this data set")
        text_dtype = self.settings.get("text_dtype", DataConfig().text_dtype)
        fits = tokens.dim() == 2 and tokens.shape[1] == stored_width(self.info["text_dim"], text_dtype)
        require(
            same and fits and (tokens.dtype == torch.int8) == (text_dtype == "int8"),
            f"data.latents={self.path}: {damage}",
        )
        return tokens

    def spread(self, count: int) -> list[int]:
        """The numbers of up to `count` shards, evenly spread."""
        return list(map(int, np.unique(np.linspace(0, len(self.shards) - 1, count).astype(int))))

    def open(self, number: int) -> ShardFile:
        """A shard; DamagedShardError if it is not what the folder says."""
        return ShardFile(self.path / self.shards[number].file, self.shards[number], self.fingerprint)


def read_dataset_file(folder: Path) -> LatentFolder:
    """The description of a folder of latents; ConfigError if it is missing, damaged or of another format."""
    path = folder / DATASET_NAME
    require(path.is_file(), f"data.latents={folder} has no {DATASET_NAME}: run {_ENCODE} with this recipe")
    text = path.read_bytes()
    try:
        content: dict[str, Any] = json.loads(text)
        version = content.get("format_version")
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: run {_ENCODE} again") from error
    require(
        version in READABLE_VERSIONS,
        f"data.latents={folder} has format {version} where {READABLE_VERSIONS[-1]} is needed: run {_ENCODE} again",
    )
    require(version == 1 or is_signed(text), f"{path} is damaged (its hash differs): run {_ENCODE} again")
    try:
        info = content["info"]
        return LatentFolder(
            path=folder,
            info=info,
            settings=content["settings"],
            shards=[ShardEntry(**shard) for shard in content["shards"]],
            buckets=[(h, w) for h, w in content.get("buckets", [(info["height"], info["width"])])],
            codec_fingerprint=content.get("codec_fingerprint", ""),
            empty_text=content["empty_text"],
            empty_sha256=content.get("empty_sha256"),
            num_too_small=content.get("num_too_small", 0),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged: run {_ENCODE} again") from error


def _kind(spec: Any) -> Any:
    """A setting without the paths of an encoder, which may differ between machines."""
    return re.sub(r":[^+]*", "", spec) if isinstance(spec, str) else spec


def check_settings(found: LatentFolder, data: DataConfig, codec: ImageCodec, text_encoder: TextEncoder) -> None:
    """Refuse latents that the present settings would not give."""
    online, defaults = data.text == "online", DataConfig()
    for setting in SETTINGS:
        given, stored = getattr(data, setting), found.settings.get(setting, getattr(defaults, setting))
        require(
            _kind(given) == _kind(stored) or (online and setting == "text_encoder"),
            f"data.{setting} is {given} but data.latents={found.path} was encoded with {stored}: "
            "encode into another folder, or restore the setting",
        )
    fingerprint = encoding_fingerprint(data, codec, None if online else text_encoder)
    require(
        fingerprint == found.fingerprint,
        f"data.latents={found.path} is stale: its fingerprint is {found.fingerprint} but data.codec={data.codec} and "
        f"data.text_encoder={data.text_encoder} now give {fingerprint}; delete it and encode again",
    )


def check_shards(found: LatentFolder) -> None:
    """Refuse a folder with shards that are missing or, among those opened, damaged or of another data set."""
    present, names = set(os.listdir(found.path)), [shard.file for shard in found.shards]
    missing = next((name for name in names if name not in present), None)
    require(missing is None, f"data.latents={found.path}: shard {missing} is missing: run {_ENCODE} again")
    twice = len(set(names)) != len(names) or not names
    require(not twice, f"{found.path / DATASET_NAME} names a shard twice, or none: run {_ENCODE} again")
    for number in found.spread(_MAX_OPENED):
        try:
            found.open(number).close()
        except DamagedShardError as error:
            raise ConfigError(f"data.latents={found.path}: shard {error}") from error
