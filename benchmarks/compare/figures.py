"""Curves of a comparison as SVG in data URIs: no script, no outside file."""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.compare.statistics import Line, validation_curve
from benchmarks.compare.training import Record
from trainer.formats.page import file_uri

COLORS = ("#687083", "#2f5fd0", "#b5362f", "#23825a", "#b7791f", "#7a4fbf", "#0f8b8d", "#d16ba5", "#5a6b2f", "#2b2b2b")
Axis = Callable[[Record, list[int]], list[float]]


def _uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return file_uri(buffer.getvalue(), "image/svg+xml")


def curves(runs: Mapping[str, Sequence[Record]], title: str, axis: Axis) -> str:
    """Validation loss of each variant (all its seeds) against an axis, from where the curves lie near each other."""
    names = [textwrap.fill(name, 60) for name in runs]
    lines = sum(name.count("\n") + 1 for name in names)
    figure = Figure(figsize=(4.4, 3.1 + 0.17 * lines), layout="constrained")
    panel = figure.subplots()
    lowest = min(validation_curve(record)[1][-1] for records in runs.values() for record in records)
    for curve, (name, records) in enumerate(zip(names, runs.values(), strict=True)):
        round_, color = divmod(curve, len(COLORS))
        look: dict[str, Any] = {"color": COLORS[color], "linestyle": ("-", "--")[round_ % 2], "marker": ".", "lw": 1.3}
        for number, record in enumerate(records):
            steps, losses = validation_curve(record)
            panel.plot(axis(record, steps), losses, **look, label=name if number == 0 else None)
    panel.set_xlabel(title)
    panel.set_ylabel("validation loss")
    panel.set_ylim(0.97 * lowest, 1.6 * lowest)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower left", frameon=False, fontsize=8)
    return _uri(figure)


def line_chart(points: Mapping[float, float], line: Line, label: str) -> str:
    """Final losses over a doubling axis, with the fitted line."""
    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    panel = figure.subplots()
    x = sorted(points)
    panel.semilogx(x, [points[value] for value in x], "o", color=COLORS[1], base=2)
    ends = [x[0], x[-1]]
    panel.semilogx(ends, [line.at(value) for value in ends], color=COLORS[0], base=2)
    panel.set_xticks(x, [f"{value:g}" for value in x])
    panel.set_xlabel(label)
    panel.set_ylabel("validation loss")
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    return _uri(figure)
