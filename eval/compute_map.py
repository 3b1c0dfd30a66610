"""Where the model spends its compute: how many experts took each patch, per layer and time.

With expert choice a patch is taken by 0 to E experts; `capacity_factor` is the mean. Shapes: N pictures,
T sampling times, L MoE layers, h x w patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.generate import picture_seed
from eval.geneval import Detection
from eval.prompts import Prompt
from moe.routing import RoutingStats
from trainer.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class ComputeMaps:
    """Experts per patch while pictures were drawn. `layers` are block numbers, `times` run from 1 to 0."""

    captions: tuple[str, ...]
    pictures_NHWC: Tensor
    times: tuple[float, ...]
    layers: tuple[int, ...]
    experts_NTLhw: Tensor
    capacity_factor: float
    num_experts: int


def trace_compute(pipeline: Pipeline, prompts: Sequence[Prompt]) -> ComputeMaps | None:
    """Draw the first picture of each prompt and record its routing; None for a model without experts."""
    config = pipeline.config
    layers = tuple(i for i in range(config.model.num_layers) if config.moe.has_moe(i))
    if not layers:
        return None
    grid = (pipeline.shape.height // config.model.patch_size, pipeline.shape.width // config.model.patch_size)
    times: list[float] = []
    counts: list[Tensor] = []

    def observe(time: float, stats: list[RoutingStats]) -> None:
        # With guidance the second half of the rows belongs to the empty caption.
        rows = [item.experts_per_token_BS[: len(prompts)].cpu().float() for item in stats]
        times.append(time)
        counts.append(torch.stack(rows, 1).unflatten(-1, grid))

    captions = [prompt.text for prompt in prompts]
    seeds = [picture_seed(prompt.id, 0) for prompt in prompts]
    pictures = pipeline.generate(captions, seeds, observe=observe)
    return ComputeMaps(
        captions=tuple(captions),
        pictures_NHWC=pictures,
        times=tuple(times),
        layers=layers,
        experts_NTLhw=torch.stack(counts, 1),
        capacity_factor=config.moe.capacity_factor,
        num_experts=config.moe.num_experts,
    )


def object_patches(detections: Sequence[Sequence[Detection]], side: int, grid: tuple[int, int]) -> Tensor:
    """Which patches have their centre inside a detected box, bool [N, h, w]; pictures are `side` wide."""
    h, w = grid
    y = (torch.arange(h) + 0.5) * side / h
    x = (torch.arange(w) + 0.5) * side / w
    mask = torch.zeros(len(detections), h, w, dtype=torch.bool)
    for n, found in enumerate(detections):
        for x1, y1, x2, y2 in (item.box for item in found):
            mask[n] |= ((y >= y1) & (y < y2))[:, None] & ((x >= x1) & (x < x2))[None, :]
    return mask


def compute_by_region(maps: ComputeMaps, mask_Nhw: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean experts per patch on objects and elsewhere, [T, L] each; None when a region is empty."""
    if not mask_Nhw.any() or mask_Nhw.all():
        return None
    experts_TLP = maps.experts_NTLhw.permute(1, 2, 0, 3, 4).flatten(2)
    inside = mask_Nhw.flatten()
    return experts_TLP[..., inside].mean(-1), experts_TLP[..., ~inside].mean(-1)
