"""Parts of a report about the run itself: where the compute goes, and the training curves.

Shapes: N pictures, h x w patches.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from eval.files import training_records
from eval.pages.allocation import word_lines
from eval.pages.charts import compute_chart, moved_chart, region_chart
from eval.pages.compute_map import ComputeMaps, compute_by_region
from trainer.formats.page import image
from trainer.telemetry.run_sections import coverage_section, curve_section, grid_section


def training_section(run_dir: Path, prompts: Sequence[str]) -> list[str]:
    """Curves of the run, grids that it drew from these prompts, expert coverage; nothing for what is no run."""
    rows = training_records(run_dir)
    if not rows:
        return []
    return ["<h2>Training</h2>", *curve_section(rows), *grid_section(run_dir, prompts), *coverage_section(rows)]


def compute_section(maps: ComputeMaps, object_mask_Nhw: Tensor | None = None) -> list[str]:
    """Experts per patch of the first pictures, on objects and elsewhere where a mask is given, and what moves them."""
    parts = [
        "<h2>Where the compute goes</h2>",
        f"<p>Experts that took each patch, averaged over sampling (by block) and over blocks (by time). White is "
        f"the uniform level of {maps.capacity_factor:g} experts per patch, red more, blue less.</p>",
        image(compute_chart(maps), "experts per patch"),
    ]
    regions = compute_by_region(maps, object_mask_Nhw) if object_mask_Nhw is not None else None
    if regions:
        inside, outside = regions
        parts += [
            f"<p>Over {len(maps.captions)} prompts, patches on found objects are taken by {inside.mean():.2f} experts, "
            f"the others by {outside.mean():.2f}.</p>",
            image(region_chart(maps, inside, outside), "experts per patch on objects and background"),
        ]
    if maps.moved_TL is not None and not maps.moved_TL.isnan().all():
        parts += [
            "<h3>With the caption and without</h3>",
            "<p>Share of the compute that lies on other patches with the caption than with empty text, while both "
            "are evaluated for guidance.</p>",
            image(moved_chart(maps), "share of compute moved by the caption"),
        ]
    return parts + word_lines(maps.words)
