"""Frozen encoders behind two small protocols: pictures to latents and back, captions to text tokens.

Shapes: B pictures, C x h x w latent, n text tokens of a caption, D text width.
"""

from pathlib import Path
from typing import Protocol

from torch import Tensor

from trainer.config import ConfigError

VAE_PREFIX = "vae:"


class ImageCodec(Protocol):
    """Maps rgb in [-1, 1] to latents (unscaled) and back."""

    channels: int
    factor: int

    def fingerprint(self) -> str:
        """Changes whenever the latents would."""
        ...

    def encode(self, rgb_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C, H / factor, W / factor]."""
        ...

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Inverse of `encode`, as well as the codec can."""
        ...


class TextEncoder(Protocol):
    """Maps captions to unpadded token features."""

    dim: int
    max_tokens: int

    def fingerprint(self) -> str:
        """Changes whenever the features would."""
        ...

    def encode(self, captions: list[str]) -> list[Tensor]:
        """One fp32 [n, dim] per caption; the empty caption has tokens too."""
        ...


class PixelCodec:
    """Pixels are the latents: for pictures small enough to model directly."""

    channels = 3
    factor = 1

    def fingerprint(self) -> str:
        """Constant: nothing is learned."""
        return "pixel-1"

    def encode(self, rgb_BCHW: Tensor) -> Tensor:
        """Identity."""
        return rgb_BCHW

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Identity."""
        return latent_BCHW


def build_codec(spec: str) -> ImageCodec:
    """The codec that `data.codec` names."""
    if spec == "pixel":
        return PixelCodec()
    if spec == "dct":
        from trainer.dct import DctCodec

        return DctCodec()
    if spec.startswith(VAE_PREFIX):
        from trainer.vae import VaeCodec

        return VaeCodec(Path(spec.removeprefix(VAE_PREFIX)))
    raise ConfigError(f"data.codec={spec} is not known: use pixel, dct or {VAE_PREFIX}FILE")


def build_text_encoder(spec: str) -> TextEncoder:
    """The text encoder that `data.text_encoder` names."""
    if spec == "minilm":
        from trainer.minilm import MiniLm

        return MiniLm()
    raise ConfigError(f"data.text_encoder={spec} is not known: use minilm")
