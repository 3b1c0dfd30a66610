"""Opens the data of a run: one or more folders of latent shards, checked against the settings, or synthetic samples."""

import hashlib
import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import TrainConfig
from trainer.data.latents.dataset_file import LatentFolder, check_settings, check_shards, read_dataset_file
from trainer.data.latents.samples import LatentDataset, LatentInfo
from trainer.data.latents.shard_dataset import ShardDataset
from trainer.data.latents.staging import build_stage
from trainer.data.order import build_layout
from trainer.data.synthetic import SyntheticDataset
from trainer.encoders.build import build_codec, build_text_encoder
from trainer.encoders.protocols import TextEncoder
from trainer.errors import ConfigError, require
from trainer.settings.data import DataConfig
from trainer.settings.tokens import token_counts


def open_dataset(config: TrainConfig) -> LatentDataset:
    """Open the data of a run; ConfigError when it is missing, incomplete, damaged or encoded for other settings.

    Every shard must be there; up to 256 of a folder are opened for their headers, the others when first read.
    """
    data = config.data
    if data.source == "synthetic":
        return SyntheticDataset(data.image_size, config.seed)
    # What headers can tell is checked here, before a run allocates anything or its ranks wait for each other.
    mix = data.mix or {data.latents: 1.0}
    weights = list(mix.values())
    codec, text_encoder = build_codec(data.codec), build_text_encoder(data.text_encoder)
    folders = [read_dataset_file(Path(name)) for name in mix]
    for folder in folders:
        check_settings(folder, data, codec, text_encoder)
        check_shards(folder)
    for bucket in folders[0].buckets[1:]:
        check_latent_size(config, *bucket, where=" of data.buckets")
    shards = [(folder.path / shard.file, shard) for folder in folders for shard in folder.shards]
    sizes, buckets = [shard.num_samples for _, shard in shards], [shard.bucket for _, shard in shards]
    sets = [number for number, folder in enumerate(folders) for _ in folder.shards]
    layout, _ = build_layout(sizes, buckets, sets, weights, data.bucket_block, data.small_buckets == "drop")
    online = text_encoder if data.text == "online" else None
    samples = hashlib.sha256("".join(shard.sha256 for _, shard in shards).encode()).hexdigest()[:16]
    return ShardDataset(
        replace(_describe(data, folders, weights, text_encoder), samples=samples),
        shards,
        folders[0].fingerprint,
        layout,
        empty_text="" if online else folders[0].read_empty(),
        online_encoder=online,
        stage=build_stage(data.stage_dir, data.stage_gb, folders[0].fingerprint),
    )


def check_latent_size(config: TrainConfig, height: int, width: int, where: str = "") -> None:
    """Raise ConfigError if a latent cannot be cut into patches, or has too few of them for the experts."""
    patch = config.model.patch_size
    require(
        height % patch == 0 and width % patch == 0,
        f"model.patch_size={patch} does not divide the latent of {height} x {width}{where}",
    )
    counts = token_counts([(height, width)], patch, config.diffusion.mask_ratio) if config.moe.every else []
    try:
        for count in reversed(counts):
            config.moe.capacity(count)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _describe(
    data: DataConfig, folders: list[LatentFolder], weights: list[float], text_encoder: TextEncoder
) -> LatentInfo:
    """The description, with what is decided when latents are read: mix, online text, normalisation."""
    # Each of these decisions changes what a model is trained on, so each is added to the fingerprint, which a resume
    # compares. The plain case adds nothing and keeps the fingerprint of the encoded data.
    first = folders[0].info
    info = LatentInfo(**{f.name: first[f.name] for f in fields(LatentInfo) if f.name in first})
    info = replace(info, codec=data.codec, text_encoder=data.text_encoder, buckets=list(map(list, folders[0].buckets)))
    decided: dict[str, Any] = {}
    if len(folders) > 1:
        decided["mix"] = [[weight, folder.num_samples] for weight, folder in zip(weights, folders, strict=True)]
        mean, std = _pooled(folders, weights)
        longest = max(folder.info["max_tokens"] for folder in folders)
        info = replace(info, mean=mean, std=std, max_tokens=longest)
    if len(folders) > 1 or len(folders[0].buckets) > 1:
        decided["order"] = [data.bucket_block, data.small_buckets]
    if data.text == "online":
        decided["text"] = text_encoder.fingerprint()
        info = replace(info, text_dim=text_encoder.dim, max_tokens=text_encoder.max_tokens)
    if data.normalize == "codec":
        require(
            "codec_scale" in first,
            f"data.normalize=codec needs data.latents={folders[0].path} in the newest format: encode it again",
        )
        shift, scale = first["codec_shift"], first["codec_scale"]
        decided["normalize"] = [shift, scale]
        info = replace(info, mean=[shift] * info.channels, std=[1 / scale] * info.channels)
    if data.whitening != 1:
        decided["whitening"] = w = data.whitening
        # Divisors std^w, times the factor that leaves the normalised channels a mean square of 1.
        factor = math.sqrt(sum(s ** (2 - 2 * w) for s in info.std) / len(info.std))
        info = replace(info, std=[factor * s**w for s in info.std])
    if decided:
        parts = json.dumps([info.fingerprint, decided], sort_keys=True)
        info = replace(info, fingerprint=hashlib.sha256(parts.encode()).hexdigest()[:16])
    return info


def _pooled(folders: list[LatentFolder], weights: list[float]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of several data sets drawn from by weight."""
    share = np.array(weights)[:, None] / sum(weights)
    means, stds = (np.array([folder.info[name] for folder in folders]) for name in ("mean", "std"))
    mean, square = (share * means).sum(0), (share * (stds * stds + means * means)).sum(0)
    return mean.tolist(), np.sqrt(np.maximum(square - mean * mean, 1e-12)).tolist()
