"""What a frozen encoder has to offer: pictures to latents and back, captions to text tokens.

Shapes: B pictures, C x h x w latent, n text tokens of a caption, D text width.
"""

from abc import abstractmethod
from typing import Protocol

import torch
from torch import Tensor


class ImageCodec(Protocol):
    """Maps rgb in [-1, 1] to latents (unscaled) and back; derive from it.

    `(latent - shift) * scale` is what the codec's authors train on, for `data.normalize=codec`. `has_std`: the
    latent is a distribution, of which `posterior` gives the standard deviation too. `device` is where a large model
    computes; None: this process's GPU, if there is one.
    """

    channels: int
    factor: int
    shift: float = 0.0
    scale: float = 1.0
    has_std: bool = False
    device: torch.device | None = None

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever the latents would."""

    def encode(self, rgb_BCHW: Tensor) -> Tensor:
        """The mean latent: [B, 3, H, W] -> [B, C, H / factor, W / factor]."""
        return self.posterior(rgb_BCHW)[0]

    @abstractmethod
    def posterior(self, rgb_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation of the latent; None for a latent without spread."""

    @abstractmethod
    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Inverse of `encode`, as well as the codec can."""


class TextEncoder(Protocol):
    """Maps captions to unpadded token features; `device` as for codecs."""

    dim: int
    max_tokens: int
    device: torch.device | None

    def fingerprint(self) -> str:
        """Changes whenever the features would."""

    def encode(self, captions: list[str]) -> list[Tensor]:
        """One fp32 [n, dim] per caption; the empty caption has tokens too."""
