"""Pixels as latents, for pictures small enough to model directly: codec `pixel`."""

from torch import Tensor

from trainer.encoders.protocols import ImageCodec


class PixelCodec(ImageCodec):
    """The identity; nothing is learned."""

    channels = 3
    factor = 1

    def fingerprint(self) -> str:
        return "pixel-1"

    def posterior(self, rgb_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        return rgb_BCHW, None

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        return latent_BCHW
