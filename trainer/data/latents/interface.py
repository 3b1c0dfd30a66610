"""What a set of latents is to the trainer: its description, its samples and its batches.

Shapes: B samples, C x H x W latent, L text tokens, D text width.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from trainer.data.latents.shard_file import Sample
from trainer.data.order import SampleLayout
from trainer.encoders.protocols import TextEncoder


@dataclass(frozen=True, kw_only=True)
class LatentInfo:
    """What a data set says of itself. `fingerprint` covers everything that shaped its values.

    `height` and `width` are those of the first bucket; `buckets` lists all of them as [height, width].
    """

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
    buckets: list[list[int]] = field(default_factory=list)

    @property
    def mean_C(self) -> Tensor:  # noqa: N802
        """What is subtracted from each latent channel, fp32."""
        return torch.tensor(self.mean)

    @property
    def std_C(self) -> Tensor:  # noqa: N802
        """What each latent channel is then divided by, fp32."""
        return torch.tensor(self.std)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Normalised latents fp32, padded text fp16 or fp32 with its mask (True: a real token), global sample indices."""

    latent_BCHW: Tensor
    text_BLD: Tensor
    text_mask_BL: Tensor
    index_B: Tensor


class LatentDataset(Protocol):
    """Samples by number; its length is that of an epoch, which may leave some out.

    `online_encoder` is set where captions are stored and encoded while training.
    """

    info: LatentInfo
    shard_sizes: list[int]
    layout: SampleLayout
    empty_text: Tensor | str
    online_encoder: TextEncoder | None

    def __len__(self) -> int: ...

    def read(self, sample: int) -> Sample: ...
