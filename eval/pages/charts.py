"""Charts of a report as SVG text in data URIs: the run's curves, expert coverage and compute maps.

Drawn with matplotlib's object interface (no global figure state), glyphs as paths, so that the page looks
the same everywhere. Shapes: N pictures, T times, L MoE layers, h x w patches.
"""

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from torch import Tensor

from eval.pages.compute_map import ComputeMaps
from trainer.formats.page import file_uri

INK, MUTED, RULE = "#1d2433", "#687083", "#dfe3ea"
BLUE, RED, GREEN, AMBER = "#2f5fd0", "#c2413b", "#23825a", "#b7791f"
COVERAGE_COLORS = ("#e4e7ee", "#b9cdf3", "#7fa3ea", "#3f6fd6", "#1f3f94")
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
Rows = Sequence[Mapping[str, Any]]


def _to_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return file_uri(buffer.getvalue(), "image/svg+xml")


def _panels(count: int, columns: int, height: float) -> tuple[Figure, list[Any]]:
    """A page-wide figure of `count` panels in rows of `height` inches."""
    lines = max(1, -(-count // columns))
    figure = Figure(figsize=(9.2, height * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flatten())
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def _series(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    pairs = [(int(row["step"]), float(row[key])) for row in rows if key in row]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred mean over a tenth of the run, so that the trend is seen through the noise."""
    width = max(1, len(values) // 20)
    return [float(np.mean(values[max(0, i - width) : i + width + 1])) for i in range(len(values))]


def training_chart(rows: Rows) -> str:
    """Loss, learning rate, gradient norm and speed over the steps of `metrics.jsonl`."""
    panels = (
        ("loss", "Loss", BLUE, True),
        ("learning_rate", "Learning rate", GREEN, False),
        ("grad_norm", "Gradient norm", AMBER, True),
        ("images_per_second", "Images per second", MUTED, True),
    )
    shown = [panel for panel in panels if _series(rows, panel[0])[0]]
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(len(shown), 2, 2.1)
        for axis, (key, title, color, noisy) in zip(axes, shown, strict=True):
            steps, values = _series(rows, key)
            if noisy:
                axis.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
            axis.plot(steps, _smooth(values) if noisy else values, color=color)
            axis.set_title(title)
            axis.margins(x=0.01)
            if key in ("loss", "images_per_second", "learning_rate"):
                axis.set_ylim(bottom=0)
        for axis in axes[-2:]:
            axis.set_xlabel("step")
        return _to_uri(figure)


def coverage_layers(rows: Rows) -> dict[str, dict[str, str]]:
    """Per MoE layer the metric keys of its coverage: {layer prefix: {number of experts: key}}."""
    layers: dict[str, dict[str, str]] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        match = re.fullmatch(r"(.*?)/?coverage_(\d+)", key)
        if match:
            layers.setdefault(match[1], {})[match[2]] = key
    return layers


def coverage_chart(rows: Rows) -> str | None:
    """Share of tokens taken by 0, 1, 2, ... experts over training, one panel per layer; None without data."""
    layers = coverage_layers(rows)
    if not layers:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(len(layers), min(2, len(layers)), 2.5)
        for axis, (layer, keys) in zip(axes, layers.items(), strict=True):
            names = sorted(keys, key=int)
            steps, _ = _series(rows, keys[names[0]])
            shares = [np.array(_series(rows, keys[name])[1]) * 100 for name in names]
            axis.stackplot(steps, shares, colors=COVERAGE_COLORS, edgecolor="white", linewidth=0.3)
            axis.set_title(f"Block {layer.rsplit('/', 1)[-1]}" if layer else "All MoE layers")
            axis.set(ylim=(0, 100), xlabel="step", ylabel="% of tokens")
            axis.margins(x=0)
            _label_bands(axis, shares, names)
        return _to_uri(figure)


def _label_bands(axis: Any, shares: list[Any], names: list[str]) -> None:
    """Write the number of experts at the right edge of each band that is wide enough to be named."""
    base = 0.0
    for name, share in zip(names, shares, strict=True):
        end = float(share[-1])
        if end >= 5:
            label = f"{name} or more" if name == names[-1] and int(name) > 1 else name
            place = {"xycoords": ("axes fraction", "data"), "xytext": (4, 0), "textcoords": "offset points"}
            axis.annotate(f"{label}: {end:.0f} %", (1, base + end / 2), va="center", color=INK, **place)
        base += end


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
