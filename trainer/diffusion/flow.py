"""Rectified flow: the straight path from data to noise, its timesteps, masks and training loss.

x_t = (1 - t) x_0 + t x_1 with data x_0 and noise x_1 ~ N(0, I); the model predicts the velocity
x_1 - x_0 (arXiv 2209.03003; logit-normal t as in arXiv 2403.03206). Noise, timestep and mask of a sample
are functions of (seed, global sample index), so any number of ranks sees the same ones.

Shapes: B images, C channels, H x W latent, S kept image tokens, L text tokens, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from trainer.config import DiffusionConfig
from trainer.data.latents.packed_text import PackedText
from trainer.data.latents.samples import Batch
from trainer.diffusion.layers import patchify
from trainer.randomness import keyed_generator
from trainer.settings.tokens import num_image_tokens, num_kept_tokens

Time = TypeVar("Time", float, Tensor)


@dataclass(frozen=True, kw_only=True)
class NoisedBatch:
    """A micro-batch as the model sees it and what it must predict, with the samples' indices since the run's start.

    `keep_BS` are the positions of the tokens that masking keeps, None where all are seen.
    """

    index_B: Tensor
    x_BCHW: Tensor
    t_B: Tensor
    target_BCHW: Tensor
    text: PackedText
    keep_BS: Tensor | None

    @property
    def text_BLD(self) -> Tensor:  # noqa: N802
        """Padded captions where the batch is, fp16 or fp32, made anew at each call."""
        return self.text.padded_BLD()

    @property
    def text_mask_BL(self) -> Tensor:  # noqa: N802
        """True for a real token."""
        return self.text.mask_BL()

    def to(self, device: torch.device) -> "NoisedBatch":
        """The same batch on another device; nobody waits for the copy of a pinned one to a GPU."""
        return self._with(lambda value: value.to(device, non_blocking=device.type == "cuda"))

    def pin_memory(self) -> "NoisedBatch":
        """The same batch in memory that a GPU can read by itself."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> "NoisedBatch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, text=self.text.each(change), **tensors)


def interpolate(x0: Tensor, x1: Tensor, t_B: Tensor) -> Tensor:
    """Point of the straight path at time t (1 is noise), any shape [B, ...]."""
    t = t_B.view(-1, *[1] * (x0.dim() - 1))
    return (1 - t) * x0 + t * x1


def shift_time(t: Time, shift: float) -> Time:
    """Move times in [0, 1] towards 1 (noise); 0 and 1 stay. For logit-normal t it adds log(shift) to the logit."""
    return shift * t / (1 + (shift - 1) * t)


def noise_batch(batch: Batch, config: DiffusionConfig, *, seed: int, patch_size: int, step: int = 0) -> NoisedBatch:
    """`draw_noise`, masked as in optimizer step number `step`."""
    return mask_at(draw_noise(batch, config, seed=seed, patch_size=patch_size), config, step)


def mask_at(noised: NoisedBatch, config: DiffusionConfig, step: int) -> NoisedBatch:
    """Mask a drawn batch as in optimizer step number `step`: the first tokens of the random order are kept.

    They come in the order of the picture; None if those are all.
    """
    if noised.keep_BS is None:
        return noised
    num_tokens = noised.keep_BS.shape[1]
    num_kept = num_kept_tokens(num_tokens, config.mask_ratio_at(step))
    return replace(noised, keep_BS=None if num_kept == num_tokens else noised.keep_BS[:, :num_kept].sort(dim=1).values)


def draw_noise(batch: Batch, config: DiffusionConfig, *, seed: int, patch_size: int) -> NoisedBatch:
    """Draw each sample's noise and timestep from its own generator, and in `keep_BS` a random order of its tokens.

    The order is drawn where the configuration masks at all. How many of them are kept is left open: only `mask_at`
    needs to know the step, so that data workers can do the rest.
    """
    _, _, H, W = batch.latent_BCHW.shape
    num_tokens = num_image_tokens(H, W, patch_size)
    noise, times, keeps = [], [], []
    for index, latent in zip(batch.index_B.tolist(), batch.latent_BCHW, strict=True):
        generator = keyed_generator(seed, index, "diffusion")
        noise.append(torch.randn(latent.shape, generator=generator))
        normal = torch.randn((), generator=generator)
        times.append(shift_time(torch.sigmoid(config.logit_mean + config.logit_std * normal), config.time_shift))
        if config.mask_ratio > 0:
            keeps.append(torch.randperm(num_tokens, generator=generator))
    x1, t_B = torch.stack(noise), torch.stack(times)
    return NoisedBatch(
        index_B=batch.index_B,
        x_BCHW=interpolate(batch.latent_BCHW, x1, t_B),
        t_B=t_B,
        target_BCHW=x1 - batch.latent_BCHW,
        text=batch.text,
        keep_BS=torch.stack(keeps) if keeps else None,
    )


def training_loss(prediction: Tensor, noised: NoisedBatch, patch_size: int) -> Tensor:
    """Mean squared error of the velocity, over the kept tokens if masked; fp32 scalar."""
    target, keep_BS = noised.target_BCHW, noised.keep_BS
    if keep_BS is not None:
        target = patchify(target, patch_size, keep_BS)
    return (prediction.float() - target).square().mean()
