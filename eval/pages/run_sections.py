"""Parts of a report about the run itself: where the compute goes, and the training curves.

Shapes: N pictures, h x w patches.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from eval.files import training_records
from eval.pages.allocation import word_lines
from eval.pages.charts import compute_chart, coverage_chart, moved_chart, region_chart, training_chart
from eval.pages.compute_map import ComputeMaps, compute_by_region
from trainer.formats.page import escape, file_uri, image

SHOWN_GRIDS = 6


def training_section(run_dir: Path, prompts: Sequence[str]) -> list[str]:
    """Curves of the run, grids that it drew from these prompts, expert coverage; nothing for what is no run."""
    rows = training_records(run_dir)
    if not rows:
        return []
    parts = ["<h2>Training</h2>", image(training_chart(rows), "loss, learning rate, gradient norm, speed")]
    grids = sorted((run_dir / "samples").glob("step_*.png"))
    if grids:
        last = len(grids) - 1
        chosen = sorted({round(i * last / (SHOWN_GRIDS - 1)) for i in range(SHOWN_GRIDS)})
        figures = [
            f"<figure>{image(file_uri(grids[i].read_bytes(), 'image/png'), grids[i].stem, 'wide')}"
            f"<figcaption>step {int(grids[i].stem.removeprefix('step_')):,}</figcaption></figure>"
            for i in chosen
        ]
        parts += [
            "<h3>Pictures drawn during training</h3>",
            f'<p class="key">{", ".join(map(escape, prompts))}</p>',
            f'<div class="strip">{"".join(figures)}</div>',
        ]
    coverage = coverage_chart(rows)
    if coverage:
        parts += [
            "<h3>How many experts take a token</h3>",
            "<p>Each expert chooses its tokens, so a token may be taken by none or by several. Shares of all "
            "tokens, over training.</p>",
            image(coverage, "share of tokens by number of experts"),
        ]
    return parts


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
