"""What latents are to the trainer: one sample, a batch of them, and the set they come from with its description.

Shapes: B samples, C x H x W latent, L text tokens, D text width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from trainer.data.latents.packed_text import PackedText
from trainer.data.order import SampleLayout
from trainer.encoders.protocols import TextEncoder
from trainer.errors import require


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Latent [C, H, W] fp32, unnormalised; its standard deviation if stored; tokens as stored or the caption."""

    latent: Tensor
    text: Tensor | str
    latent_std: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LatentInfo:
    """What a data set says of itself.

    `height` and `width` are those of the first bucket; `buckets` lists all of them as [height, width]. `mean` and `std`
    normalise each channel. `fingerprint` is a hash of everything that shaped the values: equal for equal data.
    `samples` is a hash of the samples in their order, "" where it is not known (synthetic data, older checkpoints).
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
    samples: str = ""

    def __post_init__(self) -> None:
        text = min(self.text_dim, self.max_tokens) >= 0  # both 0 where text is encoded while training
        picture = min(self.channels, self.height, self.width) >= 1
        require(text and picture and len(self.mean) == len(self.std) == self.channels, f"sizes do not fit: {self}")

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
    """Normalised latents fp32, their captions, global sample indices."""

    latent_BCHW: Tensor
    text: PackedText
    index_B: Tensor

    @property
    def text_BLD(self) -> Tensor:  # noqa: N802
        """Padded captions fp16 or fp32, made anew at each call."""
        return self.text.padded_BLD()

    @property
    def text_mask_BL(self) -> Tensor:  # noqa: N802
        """True for a real token."""
        return self.text.mask_BL()


def pad_text(tokens: Sequence[Tensor], length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Unpadded tokens [n_i, D] -> [B, L, D] with zeros behind, and their mask [B, L]; L is at least `length`."""
    lengths_B = torch.tensor([len(t) for t in tokens])
    length = max(length, int(lengths_B.max()))
    text_BLD = torch.zeros(len(tokens), length, tokens[0].shape[-1], dtype=dtype)
    for row, token in enumerate(tokens):
        text_BLD[row, : len(token)] = token
    return text_BLD, torch.arange(length) < lengths_B[:, None]


class LatentDataset(Protocol):
    """Samples by number; its length is that of an epoch, which may leave some out.

    `layout` says which samples an epoch has and in what order. `empty_text` is the empty caption, which replaces those
    that are dropped. `online_encoder` is set where captions are stored as text and encoded while training.
    """

    info: LatentInfo
    layout: SampleLayout
    empty_text: Tensor | str
    online_encoder: TextEncoder | None

    def __len__(self) -> int: ...

    def read(self, sample: int) -> Sample: ...
