"""Charts of a report as SVG text in data URIs: compute maps and what moves them.

Drawn with matplotlib's object interface (no global figure state), glyphs as paths, so that the page looks
the same everywhere. Shapes: N pictures, T times, L MoE layers, h x w patches.
"""

import io
import textwrap
from typing import Any

import matplotlib
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from torch import Tensor

from eval.pages.compute_map import ComputeMaps
from trainer.formats.page import file_uri

INK, MUTED, RULE = "#1d2433", "#687083", "#dfe3ea"
BLUE, RED, GREEN, AMBER = "#2f5fd0", "#c2413b", "#23825a", "#b7791f"
SHOWN_MAPS = 6
THIRDS = (("early (noise)", 2 / 3, 1.01), ("middle", 1 / 3, 2 / 3), ("late (picture)", -0.01, 1 / 3))
TIME = "time (1 = noise, 0 = picture)"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "svg.fonttype": "path",
    "svg.hashsalt": "report",
}


def _to_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return file_uri(buffer.getvalue(), "image/svg+xml")


def compute_chart(maps: ComputeMaps) -> str:
    """The first pictures and their heat maps: mean over time for each layer, mean over layers early, middle, late."""
    captions, experts = maps.captions[:SHOWN_MAPS], maps.experts_NTLhw[:SHOWN_MAPS].numpy()
    panels = [(f"block {layer}", experts[:, :, i].mean(1)) for i, layer in enumerate(maps.layers)]
    for name, low, high in THIRDS:
        steps = [i for i, time in enumerate(maps.times) if low < time <= high]
        panels += [(name, experts[:, steps].mean((1, 2)))] if steps else []
    uniform = maps.capacity_factor
    top = max(float(max(panel.max() for _, panel in panels)), uniform + 0.5)
    norm = TwoSlopeNorm(vmin=0, vcenter=uniform, vmax=top)
    count, width = len(captions), 1 + len(panels)
    bare = {"axes.grid": False, "axes.titleweight": "normal", "axes.spines.left": False, "axes.spines.bottom": False}
    with matplotlib.rc_context(STYLE | bare):
        figure = Figure(figsize=(9.2, 9.2 / (width + 0.6) * count + 0.3), layout="constrained")
        axes = figure.subplots(count, width, squeeze=False)
        mappable = ScalarMappable(norm, "RdBu_r")
        for n, caption in enumerate(captions):
            axes[n, 0].imshow(maps.pictures_NHWC[n].numpy(), interpolation="nearest")
            axes[n, 0].set_title(
                textwrap.fill(caption, 20, break_long_words=False, break_on_hyphens=False), fontsize=6.5, color=MUTED
            )
            for axis, (name, panel) in zip(axes[n, 1:], panels, strict=True):
                axis.imshow(panel[n], cmap="RdBu_r", norm=norm, interpolation="nearest")
                if n == 0:
                    axis.set_title(name, fontsize=8)
        for axis in axes.flatten():
            axis.set(xticks=[], yticks=[])
        bar = figure.colorbar(mappable, ax=axes[:, 1:], shrink=min(1.0, 2 / count), aspect=16, pad=0.02)
        bar.set_ticks([0, uniform, top], labels=["0", f"{uniform:g} = uniform", f"{top:.1f}"])
        bar.outline.set_visible(False)
        bar.ax.axhline(uniform, color=INK, linewidth=1)
        return _to_uri(figure)


def region_chart(maps: ComputeMaps, inside_TL: Tensor, outside_TL: Tensor) -> str:
    """Mean experts per patch on objects and on background over sampling time, one panel per layer."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 2.2), layout="constrained")
        axes = figure.subplots(1, len(maps.layers), squeeze=False, sharey=True).flatten()
        for i, (axis, layer) in enumerate(zip(axes, maps.layers, strict=True)):
            axis.plot(maps.times, inside_TL[:, i], color=RED, label="on objects")
            axis.plot(maps.times, outside_TL[:, i], color=BLUE, label="background")
            axis.axhline(maps.capacity_factor, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), label="uniform")
            axis.invert_xaxis()
            axis.set(title=f"Block {layer}", xlabel=TIME, ylim=(0, None))
        axes[0].set_ylabel("experts per patch")
        axes[0].legend(loc="best")
        return _to_uri(figure)


def moved_chart(maps: ComputeMaps) -> str:
    """Share of the compute that the caption moves, over sampling time, one line per layer."""
    assert maps.moved_TL is not None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.0, 2.2), layout="constrained")
        axis = figure.subplots()
        colors = (BLUE, RED, GREEN, AMBER)
        for i, layer in enumerate(maps.layers):
            axis.plot(maps.times, maps.moved_TL[:, i], color=colors[i % len(colors)], label=f"block {layer}")
        axis.invert_xaxis()
        axis.set(xlabel=TIME, ylabel="share moved", ylim=(0, None))
        if len(maps.layers) <= len(colors):
            axis.legend(loc="best")
        return _to_uri(figure)
