"""Velocity error of a model at fixed times, on fixed samples with fixed noise: comparable between steps and runs.

The training loss is noisy because times and noise are drawn; here sample k has one noise for ever, and every time is
tried on every sample. Shapes: B samples, C x H x W latent, T times.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.data.latents.samples import Batch, LatentDataset
from trainer.data.loader import finish_batch, read_batch
from trainer.data.position import MicroBatch
from trainer.diffusion.flow import interpolate
from trainer.pipeline import Pipeline
from trainer.randomness import keyed_generator

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
SEED = 0


def fixed_samples(dataset: LatentDataset, count: int, batch_size: int) -> list[Batch]:
    """`count` samples (or all) evenly spread over a data set, captions kept; only equal latent sizes share a batch."""
    count = min(count, len(dataset))
    by_shape: dict[torch.Size, list[int]] = {}
    for k in range(count):
        number = k * len(dataset) // count
        by_shape.setdefault(dataset.read(number).latent.shape, []).append(number)
    batches = []
    for numbers in by_shape.values():
        for start in range(0, len(numbers), batch_size):
            part = numbers[start : start + batch_size]
            raw = read_batch(dataset, MicroBatch(samples=part, indices=part), caption_dropout=0.0, seed=SEED)
            batches.append(finish_batch(dataset, raw))
    return batches


def fixed_noise(batch: Batch) -> Tensor:
    """The noise of each sample, [B, C, H, W]."""
    rows = zip(batch.index_B.tolist(), batch.latent_BCHW, strict=True)
    parts = [torch.randn(x.shape, generator=keyed_generator(SEED, int(i), "validation")) for i, x in rows]
    return torch.stack(parts)


@torch.inference_mode()
def validation_loss(pipeline: Pipeline, batches: Sequence[Batch], times: Sequence[float] = TIMES) -> dict[str, float]:
    """Mean squared error of the velocity per time, and their mean as `mean`; float64 means over samples."""
    total = torch.zeros(len(times), dtype=torch.float64)
    for batch in batches:
        x0, x1 = batch.latent_BCHW, fixed_noise(batch)
        text, mask = batch.text_BLD.to(pipeline.device), batch.text_mask_BL.to(pipeline.device)
        for i, time in enumerate(times):
            t_B = torch.full((len(x0),), time)
            noised = interpolate(x0, x1, t_B).to(pipeline.device)
            velocity, _ = pipeline.model(noised, t_B.to(pipeline.device), text, mask)
            error = (velocity.float().cpu() - (x1 - x0)).double().square()
            total[i] += error.flatten(1).mean(1).sum()
    count = sum(len(batch.latent_BCHW) for batch in batches)
    losses = {f"t{time:g}": float(value) / count for time, value in zip(times, total, strict=True)}
    return {**losses, "mean": sum(losses.values()) / len(losses)}
