"""From captions to pictures: text batch, solver, decoding; for the grids of training and for a finished model alike.

Shapes: N images, L text tokens, D text width, C x H x W latent.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe.routing import Routed
from trainer.config import DiffusionConfig
from trainer.data.latents.samples import pad_text
from trainer.diffusion.model import ModelShape
from trainer.diffusion.solver import guided, initial_noise, solve
from trainer.encoders.protocols import ImageCodec

Observer = Callable[[float, list[Routed]], None]
Forward = Callable[[Tensor, Tensor, slice], tuple[Tensor, list[Routed]]]


def text_batch(captions: Sequence[Tensor], empty: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Captions over as many empty captions, for guidance in one batch: text [2N, L, D] and its mask [2N, L]."""
    return pad_text([*captions, *[empty] * len(captions)], length)


def draw(
    forward: Forward,
    seeds: list[int],
    shape: ModelShape,
    config: DiffusionConfig,
    device: torch.device,
    observe: Observer | None = None,
) -> Tensor:
    """Sample latents [N, C, H, W] fp32 (normalised), picture n from noise of seed n."""

    def velocity(x: Tensor, t_B: Tensor, rows: slice) -> Tensor:
        out, routed = forward(x, t_B, rows)
        if observe is not None:
            observe(float(t_B[0]), routed)
        return out

    noise = initial_noise(seeds, (shape.channels, shape.height, shape.width)).to(device)
    return solve(noise, guided(velocity, config, len(seeds)), config)


def to_pictures(latent_NCHW: Tensor, codec: ImageCodec, mean_C: Tensor, std_C: Tensor) -> Tensor:
    """Normalised latents -> uint8 pictures [N, H, W, 3] on the CPU."""
    latent = latent_NCHW.cpu().float() * std_C.view(1, -1, 1, 1) + mean_C.view(1, -1, 1, 1)
    rgb = codec.decode(latent).clamp(-1, 1)
    return ((rgb + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def picture_grid(pictures_NHWC: Tensor, columns: int, scale: int = 4) -> Tensor:
    """Pictures side by side, enlarged by whole pixels: uint8 [H, W, 3]."""
    from torchvision.utils import make_grid  # importing it takes a second

    grid_3HW: Tensor = make_grid(pictures_NHWC.permute(0, 3, 1, 2), nrow=columns, padding=0, pad_value=255)
    return grid_3HW.permute(1, 2, 0).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
