"""Pixels as latents: codec `pixel`."""

from torch import Tensor


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
