"""A small convolutional VAE, trained on the pictures of a run in about a minute: codec `vae:FILE`.

Space-to-depth by 4 comes first, so that every convolution runs at the latent's resolution: cheap on a CPU.

Shapes: B pictures, 3 x H x W rgb in [-1, 1], C x H/4 x W/4 latent.
"""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import require
from trainer.encoders.pretrained import must_fit
from trainer.encoders.protocols import ImageCodec

VAE_PREFIX = "vae:"  # of the setting, before the name of the file
CHANNELS, FACTOR, WIDTH, NUM_GROUPS = 8, 4, 48, 8


def _convolution(num_inputs: int, num_outputs: int) -> tuple[nn.Module, ...]:
    return nn.GroupNorm(NUM_GROUPS, num_inputs), nn.SiLU(), nn.Conv2d(num_inputs, num_outputs, 3, padding=1)


class Residual(nn.Module):
    """Two normalised convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_convolution(width, width), *_convolution(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        y: Tensor = self.layers(x)
        return x + y


def _stack(num_inputs: int, num_outputs: int, depth: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(num_inputs, WIDTH, 3, padding=1),
        *(Residual(WIDTH) for _ in range(depth)),
        *_convolution(WIDTH, num_outputs),
    )


class SmallVae(nn.Module):
    """Gaussian posterior in, picture out; 0.3M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = _stack(3 * FACTOR**2, 2 * CHANNELS, depth=2)
        self.decoder = _stack(CHANNELS, 3 * FACTOR**2, depth=3)

    def posterior(self, rgb_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, [B, C, H/4, W/4] each."""
        mean, log_variance = self.encoder(functional.pixel_unshuffle(rgb_BCHW, FACTOR)).chunk(2, 1)
        return mean, log_variance.clamp(-12, 4)

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Latents to rgb, not clipped."""
        return functional.pixel_shuffle(self.decoder(latent_BCHW), FACTOR)


class VaeCodec(ImageCodec):
    """The posterior's mean as the latent; weights from a file that `trainer.data.train_vae` wrote."""

    channels = CHANNELS
    factor = FACTOR
    has_std = True

    def __init__(self, file: str) -> None:
        path = Path(file)
        require(
            path.is_file(),
            f"data.codec=vae:{path} names a file that is not there: run python -m trainer.data.train_vae first",
        )
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self.model = SmallVae().eval().requires_grad_(False)
        with must_fit(f"data.codec=vae:{path} names a file that trainer.data.train_vae did not write"):
            self.model.load_state_dict(load_file(path))

    def fingerprint(self) -> str:
        """Hash of the weights."""
        return f"vae-{self.sha256[:16]}"

    @torch.no_grad()
    def posterior(self, rgb_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation of the latent, [B, 3, H, W] -> [B, 8, H/4, W/4]."""
        mean, log_variance = self.model.to(rgb_BCHW.device).posterior(rgb_BCHW)
        return mean, (0.5 * log_variance).exp()

    @torch.no_grad()
    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """[B, 8, h, w] -> [B, 3, 4h, 4w] in [-1, 1]."""
        return self.model.to(latent_BCHW.device).decode(latent_BCHW).clamp(-1, 1)
