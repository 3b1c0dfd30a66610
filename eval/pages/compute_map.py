"""Where the model spends its compute: how many experts took each patch, per layer and time.

With expert choice a patch is taken by 0 to E experts; `capacity_factor` is the mean. Shapes: N pictures,
T sampling times, L MoE layers, h x w patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.metrics.geneval import Detection
from eval.pages.allocation import WordShares, moved_share, word_shares
from eval.pictures.prompts import Prompt, picture_seed
from moe.routing import Routed
from trainer.pipeline import Pipeline

WORD_CAPTIONS = 6  # each word of a caption costs three evaluations


@dataclass(frozen=True, kw_only=True)
class ComputeMaps:
    """Experts per patch while pictures were drawn. `layers` are block numbers, `times` run from 1 to 0.

    `moved_TL` is the share of the compute that lies elsewhere with the caption than with empty text (NaN where only
    the caption was evaluated); `words` the importance of each word (eval/pages/allocation.py). Both may be left out.
    """

    captions: tuple[str, ...]
    pictures_NHWC: Tensor
    times: tuple[float, ...]
    layers: tuple[int, ...]
    experts_NTLhw: Tensor
    capacity_factor: float
    num_experts: int
    moved_TL: Tensor | None = None
    words: tuple[WordShares, ...] = ()


def trace_compute(pipeline: Pipeline, prompts: Sequence[Prompt]) -> ComputeMaps | None:
    """Draw the first picture of each prompt and record its routing; None for a model without experts."""
    config = pipeline.config
    layers = tuple(i for i in range(config.model.num_layers) if config.moe.has_moe(i))
    if not layers:
        return None
    grid = (pipeline.shape.height // config.model.patch_size, pipeline.shape.width // config.model.patch_size)
    times: list[float] = []
    counts: list[Tensor] = []
    moved: list[Tensor] = []

    def observe(time: float, routed: list[Routed]) -> None:
        # With guidance the second half of the rows belongs to the empty caption.
        rows_BLS = torch.stack([layer.statistics().experts_per_token_BS.cpu().float() for layer in routed], 1)
        captioned_NLS, empty_NLS = rows_BLS[: len(prompts)], rows_BLS[len(prompts) :]
        times.append(time)
        counts.append(captioned_NLS.unflatten(-1, grid))
        unknown = torch.full((len(layers),), torch.nan)
        moved.append(moved_share(captioned_NLS, empty_NLS) if len(empty_NLS) else unknown)

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
        moved_TL=torch.stack(moved),
        words=word_shares(pipeline, captions[:WORD_CAPTIONS], pictures, seeds),
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
