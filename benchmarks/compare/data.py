"""Batches of drawn scenes as the model reads them, and the fixed ones that every model is measured on.

The codec is the demo's (a fixed cosine transform), normalised by the mean and deviation of 2,048 scenes; the text
features are those of the demo's encoder.

Shapes: B scenes, [B, 16, 16, 16] latents, L text tokens of width 384, S image tokens of 8 x 8 pixels.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.compare.kinds import NUM_KINDS
from benchmarks.compare.scenes import SIZE, Scene, render, scene
from trainer.data.latents.samples import pad_text
from trainer.diffusion.flow import interpolate, shift_time
from trainer.diffusion.model import ModelShape
from trainer.encoders.dct import DctCodec
from trainer.encoders.minilm import MiniLm
from trainer.randomness import keyed_generator

STATISTICS = 2048  # scenes that mean and deviation are of
MAX_TOKENS = 20  # all captions are padded to this length: one shape, one compilation
SIDE = SIZE // DctCodec.factor
SHAPE = ModelShape(channels=DctCodec.channels, height=SIDE, width=SIDE, text_dim=MiniLm.dim)


@dataclass(frozen=True)
class Noised:
    """A batch at one time each, and what is to be predicted."""

    x_BCHW: Tensor
    t_B: Tensor
    target_BCHW: Tensor
    text_BLD: Tensor
    mask_BL: Tensor

    def to(self, device: torch.device) -> "Noised":
        """The same on another device."""
        return Noised(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


@lru_cache(maxsize=1)
def encoder() -> MiniLm:
    """The demo's text encoder, after its first layer."""
    return MiniLm("1")


@lru_cache(maxsize=1)
def statistics() -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel over scenes of their own, [1, 16, 1, 1]."""
    latent = _encode([scene(0, i, NUM_KINDS) for i in range(STATISTICS)])
    return latent.mean((0, 2, 3), keepdim=True), latent.std((0, 2, 3), keepdim=True)


def _encode(scenes: list[Scene]) -> Tensor:
    with torch.no_grad():
        return DctCodec().encode(torch.from_numpy(np.stack([render(s) for s in scenes])))


def latents(scenes: list[Scene]) -> Tensor:
    """Normalised latents [B, 16, 16, 16]."""
    mean, std = statistics()
    return (_encode(scenes) - mean) / std


def text_of(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Text tokens [B, L, 384] and which are real [B, L]."""
    return pad_text(encoder().encode([s.caption for s in scenes]), MAX_TOKENS)


def training_batch(seed: int, step: int, size: int, time_shift: float, num_kinds: int) -> Noised:
    """The batch of optimizer step `step`: scenes, noise and times are functions of (seed, step) alone."""
    scenes = [scene(1 + seed, step * size + i, num_kinds) for i in range(size)]
    x0 = latents(scenes)
    generator = keyed_generator(seed, step, "noise")
    x1 = torch.randn(x0.shape, generator=generator)
    t_B = shift_time(torch.sigmoid(torch.randn(size, generator=generator)), time_shift)
    return Noised(interpolate(x0, x1, t_B), t_B, x1 - x0, *text_of(scenes))


class _Batches(Dataset[Noised]):
    """The batches of some steps, for a loader's workers."""

    def __init__(self, steps: range, make: Callable[[int], Noised]) -> None:
        self.steps, self.make = steps, make

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, number: int) -> Noised:
        return self.make(self.steps[number])


def training_batches(
    seed: int, steps: range, size: int, time_shift: float, num_kinds: int, device: torch.device
) -> Iterator[Noised]:
    """`training_batch` of each step, on the device; for a GPU, processes of their own draw ahead."""
    make = partial(training_batch, seed, size=size, time_shift=time_shift, num_kinds=num_kinds)
    statistics(), encoder().weights  # read before processes start
    workers = max(1, (os.cpu_count() or 2) - 2) if device.type == "cuda" else 0
    loader = DataLoader(
        _Batches(steps, make), batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None
    )
    return (noised.to(device) for noised in loader)
