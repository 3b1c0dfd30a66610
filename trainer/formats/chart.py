"""Charts of numbers over steps as SVG elements of a page: milliseconds each, no library to load, text stays text.

A chart is a figure of its own of fixed proportions, so that a page may put charts beside or below each other. However
many steps a run has, it is at most `BINS` points wide: of each bin its mean, smallest and largest value are drawn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.formats.page import escape

Points = Sequence[tuple[float, float]]
BINS = 240
WIDTH, HEIGHT = 480.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 14.0, 8.0, 24.0
BLUE, GREEN, AMBER, RED, GREY = "#2f5fd0", "#23825a", "#b7791f", "#c2413b", "#687083"
SHADES = ("#e4e7ee", "#b9cdf3", "#7fa3ea", "#3f6fd6", "#1f3f94")


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Neighbouring points as one: the mean step, and mean, smallest and largest value."""

    x: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The scales of a chart: steps to the right, values upwards."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        """Place of a step."""
        return LEFT + (value - self.x0) / ((self.x1 - self.x0) or 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Place of a value; one outside is drawn at the border."""
        share = (value - self.y0) / ((self.y1 - self.y0) or 1)
        return HEIGHT - BOTTOM - min(max(share, 0.0), 1.0) * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Points) -> str:
        """Corners of a line as SVG writes them."""
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)


def binned(points: Points) -> list[Bin]:
    """At most `BINS` bins of equal width in steps; points that are no finite number are left out."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if not finite:
        return []
    first, last = finite[0][0], finite[-1][0]
    bins: dict[int, list[tuple[float, float]]] = {}
    for x, y in finite:
        bins.setdefault(min(BINS - 1, int((x - first) / ((last - first) or 1) * BINS)), []).append((x, y))
    return [
        Bin(x=sum(x for x, _ in part) / len(part), mean=sum(y for _, y in part) / len(part),
            low=min(y for _, y in part), high=max(y for _, y in part))
        for part in bins.values()
    ]  # fmt: skip


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred mean over a tenth of the values, over fewer near the ends: the trend is seen through the noise."""
    half, last = len(values) // 20, len(values) - 1
    widths = [min(half, i, last - i) for i in range(len(values))]
    return [sum(values[i - width : i + width + 1]) / (2 * width + 1) for i, width in enumerate(widths)]


def line_chart(title: str, points: Points, *, color: str = BLUE, noisy: bool = True, from_zero: bool = False) -> str:
    """A curve with its newest value in the title; `noisy` draws the trend over the range of the values.

    A few values far above all others do not flatten the rest: they end at the upper border, and the title names the
    largest. '' without a point.
    """
    bins = binned(points)
    if not bins:
        return ""
    means = [one.mean for one in bins]
    trend = smoothed(means) if noisy else means
    low, high = min(one.low for one in bins), max(one.high for one in bins)
    usual = max(sorted(one.high for one in bins)[int(0.97 * (len(bins) - 1))], max(trend))
    top = 1.3 * usual if usual > 0 and high > 3 * usual else high
    frame = Frame(x0=bins[0].x, x1=bins[-1].x, y0=0.0 if from_zero and low >= 0 else low, y1=top)
    newest = next(y for _, y in reversed(points) if math.isfinite(y))
    note = f"{short(newest)}, largest {short(high)}" if top < high else short(newest)
    outline = [(one.x, one.high) for one in bins] + [(one.x, one.low) for one in reversed(bins)]
    band = f'<polygon points="{frame.path(outline)}" fill="{color}" stroke="{color}" opacity="0.28"/>' if noisy else ""
    places = [(one.x, y) for one, y in zip(bins, trend, strict=True)]
    line = f'<polyline points="{frame.path(places)}" fill="none" stroke="{color}" stroke-width="1.8"/>'
    dot = f'<circle cx="{frame.x(bins[0].x):.1f}" cy="{frame.y(trend[0]):.1f}" r="2.5" fill="{color}"/>'
    return _figure(title, note, _axes(frame) + band + (line if len(bins) > 1 else dot))


def share_chart(title: str, bands: Sequence[tuple[str, Points]], colors: Sequence[str] = SHADES) -> str:
    """Shares of a whole (0 to 1) as bands one above the other, the wide ones with name and last share at the end."""
    columns = [binned(points) for _, points in bands]
    if not columns or not columns[0]:
        return ""
    steps = [one.x for one in columns[0]]
    frame = Frame(x0=steps[0], x1=steps[-1] if len(steps) > 1 else steps[0] + 1, y0=0.0, y1=1.0)
    steps = steps if len(steps) > 1 else [steps[0], steps[0] + 1]
    below, parts = [0.0] * len(steps), []
    for number, ((name, _), column) in enumerate(zip(bands, columns, strict=True)):
        means = [one.mean for one in column] * (len(steps) // len(column))
        above = [base + mean for base, mean in zip(below, means, strict=True)]
        corners = [*zip(steps, above, strict=True), *reversed(list(zip(steps, below, strict=True)))]
        color = colors[number % len(colors)]
        parts.append(f'<polygon points="{frame.path(corners)}" fill="{color}"/>')
        if means[-1] >= 0.08:
            y, ink = frame.y(below[-1] + means[-1] / 2) + 4, "#1d2433" if number < 3 else "#fff"
            words = escape(f"{name}: {means[-1]:.0%}")
            parts.append(
                f'<text x="{WIDTH - RIGHT - 6:.0f}" y="{y:.1f}" text-anchor="end" style="fill:{ink}">{words}</text>'
            )
        below = above
    return _figure(title, "", _axes(frame, percent=True) + "".join(parts))


def plots(charts: Sequence[str]) -> str:
    """Charts side by side, as many as fit the page; '' ones are left out."""
    return f'<div class="plots">{"".join(charts)}</div>'


def short(value: float) -> str:
    """A number for an axis: 1,500, 20k, 3M, 0.025, 1e-5."""
    size = abs(value)
    for limit, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= limit:
            return f"{value / unit:.4g}{letter}"
    if 0 < size < 1e-3:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    size = 10 ** math.floor(math.log10(rough))
    step = next(part * size for part in (1, 2, 2.5, 5, 10) if part * size >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _axes(frame: Frame, percent: bool = False) -> str:
    """Grid lines with their values, and steps below."""
    parts = []
    for value in ticks(frame.y0, frame.y1):
        y, words = frame.y(value), f"{value:.0%}" if percent else short(value)
        parts.append(
            f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#dfe3ea"/>'
            f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{words}</text>'
        )
    for value in ticks(frame.x0, frame.x1, 5):
        at = "middle" if frame.x(value) < WIDTH - 40 else "end"
        x = frame.x(value) if at == "middle" else min(frame.x(value) + 10, WIDTH)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 7}" text-anchor="{at}">{short(value)}</text>')
    return "".join(parts)


def _figure(title: str, note: str, content: str) -> str:
    return (
        f'<figure class="plot"><figcaption>{escape(title)} <span>{escape(note)}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{escape(title)} over steps">'
        f"{content}</svg></figure>"
    )
