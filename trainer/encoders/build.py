"""Frozen encoders behind two small protocols: pictures to latents and back, captions to text tokens.

Shapes: B pictures, C x h x w latent, n text tokens of a caption, D text width.
"""

import re
from pathlib import Path
from typing import Protocol

from torch import Tensor

from trainer.config import ConfigError

VAE_PREFIX, DIFFUSERS_PREFIX, OPEN_CLIP_PREFIX = "vae:", "diffusers:", "open_clip:"
_MINILM = re.compile(r"minilm(?:@(\d+))?")
_T5 = re.compile(r"t5(?:@(\d+))?:(.+)")


class ImageCodec(Protocol):
    """Maps rgb in [-1, 1] to latents (unscaled) and back.

    `(latent - shift) * scale` is what the codec's authors train on, for `data.normalize=codec`. `has_std`: the
    latent is a distribution, of which `posterior` gives the standard deviation too.
    """

    channels: int
    factor: int
    shift: float
    scale: float
    has_std: bool

    def fingerprint(self) -> str:
        """Changes whenever the latents would."""
        ...

    def encode(self, rgb_BCHW: Tensor) -> Tensor:
        """The mean latent: [B, 3, H, W] -> [B, C, H / factor, W / factor]."""
        ...

    def posterior(self, rgb_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation of the latent; None for a latent without spread."""
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
    shift, scale, has_std = 0.0, 1.0, False

    def fingerprint(self) -> str:
        """Constant: nothing is learned."""
        return "pixel-1"

    def encode(self, rgb_BCHW: Tensor) -> Tensor:
        """Identity."""
        return rgb_BCHW

    def posterior(self, rgb_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Identity, without spread."""
        return rgb_BCHW, None

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Identity."""
        return latent_BCHW


def build_codec(spec: str) -> ImageCodec:
    """The codec that `data.codec` names."""
    if spec == "pixel":
        return PixelCodec()
    if spec == "dct":
        from trainer.encoders.dct import DctCodec

        return DctCodec()
    if spec.startswith(VAE_PREFIX):
        from trainer.encoders.vae import VaeCodec

        return VaeCodec(Path(spec.removeprefix(VAE_PREFIX)))
    if spec.startswith(DIFFUSERS_PREFIX):
        from trainer.encoders.diffusers_codec import DiffusersCodec

        return DiffusersCodec(Path(spec.removeprefix(DIFFUSERS_PREFIX)))
    raise ConfigError(
        f"data.codec={spec} is not known: use pixel, dct, {VAE_PREFIX}FILE or {DIFFUSERS_PREFIX}DIR of a local model"
    )


def build_text_encoder(spec: str) -> TextEncoder:
    """The text encoder that `data.text_encoder` names; `A+B` puts the tokens of several behind each other."""
    names = re.split(r"\+(?=minilm|open_clip:|t5[@:])", spec)
    if len(names) > 1:
        from trainer.encoders.chain import TextChain

        return TextChain([build_text_encoder(name) for name in names])
    minilm = _MINILM.fullmatch(spec)
    if minilm:
        from trainer.encoders.minilm import NUM_LAYERS, MiniLm

        return MiniLm(int(minilm[1] or NUM_LAYERS))
    if spec.startswith(OPEN_CLIP_PREFIX):
        from trainer.encoders.open_clip import OpenClipText

        return OpenClipText(spec.removeprefix(OPEN_CLIP_PREFIX))
    t5 = _T5.fullmatch(spec)
    if t5:
        from trainer.encoders.t5 import DEFAULT_MAX_TOKENS, T5Text

        return T5Text(Path(t5[2]), int(t5[1] or DEFAULT_MAX_TOKENS))
    raise ConfigError(
        f"data.text_encoder={spec} is not known: use minilm, minilm@LAYER, open_clip:ARCH:FILE, open_clip:DIR, t5:DIR, "
        "or several of them joined by +"
    )
