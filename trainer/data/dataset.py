"""Latent shards -> batches of normalised latents and text tokens.

Shapes: B samples, C x H x W latent, L text tokens, D text width.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from trainer.config import ConfigError, DataConfig, TrainConfig, require
from trainer.data.batches import DataState, MicroBatch, micro_batches
from trainer.data.format import DATASET_NAME, FORMAT_VERSION, SETTINGS, encoding_fingerprint
from trainer.encoders import build_codec, build_text_encoder
from trainer.randomness import sample_generator

__all__ = ["Batch", "DataState", "LatentDataset", "LatentInfo", "build_loader", "open_dataset"]
_MAX_OPEN_FILES = 64


@dataclass(frozen=True, kw_only=True)
class LatentInfo:
    """What a data set says of itself. `fingerprint` covers everything that shaped its values."""

    channels: int
    height: int
    width: int
    text_dim: int
    max_tokens: int
    codec: str
    text_encoder: str
    fingerprint: str
    mean: list[float]
    std: list[float]

    @property
    def mean_C(self) -> Tensor:  # noqa: N802
        """Mean of each latent channel over the data set, fp32."""
        return torch.tensor(self.mean)

    @property
    def std_C(self) -> Tensor:  # noqa: N802
        """Standard deviation of each latent channel, fp32."""
        return torch.tensor(self.std)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Normalised latents fp32, padded text fp32 with its mask (True: a real token), global sample indices."""

    latent_BCHW: Tensor
    text_BLD: Tensor
    text_mask_BL: Tensor
    index_B: Tensor


class LatentDataset(Protocol):
    """Samples by number: unnormalised latent [C, H, W] and unpadded text tokens [n, D], both fp32."""

    info: LatentInfo
    shard_sizes: list[int]
    empty_text: Tensor

    def __len__(self) -> int: ...

    def read(self, sample: int) -> tuple[Tensor, Tensor]: ...


class ShardDataset:
    """The safetensors shards of a folder that `trainer.data.encode` wrote; files open on first use."""

    def __init__(self, folder: Path, content: dict[str, Any]) -> None:
        self.folder = folder
        self.info = LatentInfo(**{f.name: content["info"][f.name] for f in fields(LatentInfo)})
        self.shards: list[str] = [shard["file"] for shard in content["shards"]]
        self.shard_sizes: list[int] = [shard["num_samples"] for shard in content["shards"]]
        self.first = [0]
        for size in self.shard_sizes:
            self.first.append(self.first[-1] + size)
        with safe_open(folder / content["empty_text"], framework="pt") as file:
            self.empty_text: Tensor = file.get_tensor("text").float()
        self.open_files: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.first[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "open_files": {}}  # file handles stay with their process

    def _shard(self, number: int) -> tuple[Any, Tensor, Tensor]:
        if number not in self.open_files:
            if len(self.open_files) >= _MAX_OPEN_FILES:
                self.open_files.pop(next(iter(self.open_files)))
            file = safe_open(self.folder / self.shards[number], framework="pt")
            self.open_files[number] = (file, file.get_tensor("caption_id"), file.get_tensor("text_offset"))
        found: tuple[Any, Tensor, Tensor] = self.open_files[number]
        return found

    def read(self, sample: int) -> tuple[Tensor, Tensor]:
        """Latent and text of one sample; only its own bytes are read."""
        number = bisect_right(self.first, sample) - 1
        file, caption_id, offset = self._shard(number)
        row = sample - self.first[number]
        caption = int(caption_id[row])
        latent: Tensor = file.get_slice("latent")[row : row + 1][0].float()
        text: Tensor = file.get_slice("text")[int(offset[caption]) : int(offset[caption + 1])].float()
        return latent, text


def open_dataset(config: TrainConfig) -> LatentDataset:
    """Open the data of a run; ConfigError when it is missing, incomplete or encoded for other settings.

    Opens every shard once, for its header only.
    """
    data = config.data
    if data.source == "synthetic":
        from trainer.data.synthetic import SyntheticDataset

        return SyntheticDataset(data.image_size, config.seed)
    folder = Path(data.latents)
    path = folder / DATASET_NAME
    remedy = "run python -m trainer.data.encode with this recipe"
    require(path.is_file(), f"data.latents={folder} has no {DATASET_NAME}: {remedy}")
    content = json.loads(path.read_text())
    version = content.get("format_version")
    require(
        version == FORMAT_VERSION,
        f"data.latents={folder} has format {version} where {FORMAT_VERSION} is needed: delete it and {remedy}",
    )
    _check_settings(data, content)
    for shard in content["shards"]:
        _check_shard(folder, shard, content["info"]["fingerprint"])
    return ShardDataset(folder, content)


def _check_settings(data: DataConfig, content: dict[str, Any]) -> None:
    """Refuse latents that the present settings would not give."""
    for setting in SETTINGS:
        given, stored = getattr(data, setting), content["settings"][setting]
        require(
            given == stored,
            f"data.{setting} is {given} but data.latents={data.latents} was encoded with {stored}: "
            "encode into another folder, or restore the setting",
        )
    fingerprint = encoding_fingerprint(data.image_size, build_codec(data.codec), build_text_encoder(data.text_encoder))
    stored = content["info"]["fingerprint"]
    require(
        fingerprint == stored,
        f"data.latents={data.latents} is stale: its fingerprint is {stored} but data.codec={data.codec} and "
        f"data.text_encoder={data.text_encoder} now give {fingerprint}; delete it and encode again",
    )


def _check_shard(folder: Path, shard: dict[str, Any], fingerprint: str) -> None:
    """Refuse a shard that is missing, damaged, or of another data set."""
    path = folder / shard["file"]
    what, remedy = f"data.latents={folder}: shard {shard['file']}", "run python -m trainer.data.encode again"
    require(path.is_file(), f"{what} is missing: {remedy}")
    size = path.stat().st_size
    require(size == shard["size"], f"{what} has {size} bytes instead of {shard['size']}: {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            num_samples = file.get_slice("latent").get_shape()[0]
    except SafetensorError as error:
        raise ConfigError(f"{what} cannot be read: delete it and {remedy}") from error
    found = notes.get("fingerprint")
    require(found == fingerprint, f"{what} has fingerprint {found}, the data set {fingerprint}: delete it and {remedy}")
    expected = shard["num_samples"]
    require(
        num_samples == expected, f"{what} holds {num_samples} samples instead of {expected}: delete it and {remedy}"
    )


def build_loader(
    dataset: LatentDataset, config: TrainConfig, *, rank: int, world_size: int, state: DataState
) -> Iterator[Batch]:
    """This rank's micro-batches for ever, from `state` on; reads nothing that came before it.

    ConfigError if the data set is smaller than one global batch.
    """
    global_batch_size = config.global_batch_size(world_size)
    require(
        len(dataset) >= global_batch_size,
        f"the data set has {len(dataset)} samples, less than one global batch of {global_batch_size}: "
        "lower train.micro_batch_size or train.gradient_accumulation_steps, or encode more data",
    )
    positions = micro_batches(
        dataset.shard_sizes,
        state,
        micro_batch_size=config.train.micro_batch_size,
        num_micro_batches=config.train.gradient_accumulation_steps,
        rank=rank,
        world_size=world_size,
        group_size=config.data.shuffle_group,
    )
    collate = partial(collate_batch, dataset, caption_dropout=config.data.caption_dropout, seed=config.seed)
    if config.data.num_workers == 0:
        return map(collate, positions)
    loader = DataLoader(
        _Reader(collate),
        sampler=_Positions(positions),
        batch_size=None,
        num_workers=config.data.num_workers,
        generator=torch.Generator(),  # or the loader would draw from the global generator
    )
    return iter(loader)


class _Reader(Dataset[Batch]):
    """Lets DataLoader workers make whole micro-batches."""

    def __init__(self, collate: Callable[[MicroBatch], Batch]) -> None:
        self.collate = collate

    def __getitem__(self, item: MicroBatch) -> Batch:
        return self.collate(item)


class _Positions(Sampler[MicroBatch]):
    """Micro-batches in order, for ever."""

    def __init__(self, positions: Iterator[MicroBatch]) -> None:
        self.positions = positions

    def __iter__(self) -> Iterator[MicroBatch]:
        return self.positions


def collate_batch(dataset: LatentDataset, micro: MicroBatch, *, caption_dropout: float, seed: int) -> Batch:
    """Read, normalise and pad one micro-batch; drop captions by (seed, global sample index)."""
    info = dataset.info
    latents, texts = [], []
    for sample, index in zip(micro.samples, micro.indices, strict=True):
        latent, text = dataset.read(sample)
        dropped = float(torch.rand((), generator=sample_generator(seed, index, "caption"))) < caption_dropout
        latents.append(latent)
        texts.append(dataset.empty_text if dropped else text)
    text_BLD = torch.zeros(len(texts), info.max_tokens, info.text_dim)
    mask_BL = torch.zeros(len(texts), info.max_tokens, dtype=torch.bool)
    for row, text in enumerate(texts):
        text_BLD[row, : len(text)] = text
        mask_BL[row, : len(text)] = True
    latent_BCHW = (torch.stack(latents) - info.mean_C.view(1, -1, 1, 1)) / info.std_C.view(1, -1, 1, 1)
    return Batch(latent_BCHW=latent_BCHW, text_BLD=text_BLD, text_mask_BL=mask_BL, index_B=torch.tensor(micro.indices))
