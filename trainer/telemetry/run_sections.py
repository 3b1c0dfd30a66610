"""Parts of a page about a training run: its curves, the pictures that it drew, what its routers did.

Rows are lines of metrics.jsonl; what a run has not logged has no chart.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.formats.chart import AMBER, BLUE, GREEN, GREY, RED, line_chart, plots, share_chart
from trainer.formats.page import escape, file_uri, table
from trainer.telemetry.metrics_file import NUM_BINS

Rows = Sequence[Mapping[str, Any]]
CURVES = (
    ("loss", "Loss", BLUE, True, True),
    ("grad_norm", "Gradient norm", AMBER, True, True),
    ("learning_rate", "Learning rate", GREEN, False, True),
    ("images_per_second", "Images per second", GREY, True, True),
    ("seconds_per_step", "Seconds per step", GREY, True, True),
    ("mfu", "Share of the devices' peak (MFU)", GREY, True, True),
    ("memory_gb", "Memory, GB", RED, False, True),
)
SHOWN_GRIDS, GRID_WIDTH = 6, 1200  # pictures of the run; pixels that a wider one is embedded with
SHOWN_LAYERS = 4
ROUTER_COLUMNS = {
    "coverage_0": ("tokens without expert", "{:.1%}"),
    "max_load": ("rows of the fullest expert", "{:.2f}"),
    "dead_experts": ("dead experts", "{:.1f}"),
    "dropped": ("choices dropped", "{:.1%}"),
    "gate_entropy": ("gate entropy, nats", "{:.2f}"),
    "affinity_kept": ("affinity kept", "{:.0%}"),
    "overlap": ("overlap of experts", "{:.2f}"),
    "similarity": ("likeness of experts", "{:.2f}"),
}


def curve_section(rows: Rows) -> list[str]:
    """Curves over the steps of the run."""
    charts = [
        line_chart(title, points, color=color, noisy=noisy, from_zero=from_zero)
        for key, title, color, noisy, from_zero in CURVES
        if (points := _points(rows, key))
    ]
    return [plots(charts)]


def time_table(rows: Rows) -> list[str]:
    """Where the time of the newest measured step went (`train.profile_every`)."""
    row = next((row for row in reversed(rows) if any(key.startswith("time/") for key in row)), None)
    if row is None:
        return []
    seconds = {key.removeprefix("time/"): float(row[key]) for key in row if key.startswith("time/")}
    whole = sum(seconds.values()) or 1.0
    lines = [
        [escape(name.replace("_", " ")), f"{value:.4f}", f"{value / whole:.0%}"]
        for name, value in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    return [
        f"<h3>Where the time of step {row['step']:,} went</h3>",
        f'<div class="narrow">{table(["section", "seconds", "share"], lines)}</div>',
    ]


def grid_section(run_dir: Path, prompts: Sequence[str]) -> list[str]:
    """Grids of these prompts that the run drew, from the first to the newest."""
    grids = sorted((run_dir / "samples").glob("step_*.png"))
    if not grids:
        return []
    last = len(grids) - 1
    chosen = sorted({round(i * last / (SHOWN_GRIDS - 1)) for i in range(SHOWN_GRIDS)})
    figures = [
        f"<figure>{_grid_image(path)}<figcaption>step {int(path.stem.removeprefix('step_')):,}</figcaption></figure>"
        for path in (grids[i] for i in chosen)
    ]
    return [
        "<h3>Pictures drawn during training</h3>",
        f'<p class="key">{", ".join(map(escape, prompts))}</p>',
        f'<div class="strip">{"".join(figures)}</div>',
    ]


def coverage_section(rows: Rows) -> list[str]:
    """How many experts take a token, over training: the layers evenly spread, the others fold out."""
    layers = coverage_layers(rows)
    charts = [chart for layer, names in layers.items() if (chart := _coverage_chart(rows, layer, names))]
    if not charts:
        return []
    last = len(charts) - 1
    chosen = sorted({round(i * last / (SHOWN_LAYERS - 1)) for i in range(SHOWN_LAYERS)})
    rest = [chart for number, chart in enumerate(charts) if number not in chosen]
    folded = f'<details class="more"><summary>{len(rest)} more layers</summary>{plots(rest)}</details>'
    return [
        "<h3>How many experts take a token</h3>",
        "<p>Where experts choose their tokens, a token may be taken by none or by several. Shares of all tokens, over "
        "training.</p>",
        plots([charts[number] for number in chosen]),
        folded if rest else "",
    ]


def router_table(row: Mapping[str, Any]) -> list[str]:
    """What the routers of each layer did in the step of `row`."""
    layers = sorted({int(found[1]) for key in row if (found := re.match(r"moe/(\d+)/", key))})
    if not layers:
        return []
    kinds = {kind: shown for kind, shown in ROUTER_COLUMNS.items() if any(f"moe/{i}/{kind}" in row for i in layers)}
    header = ["block", *(escape(title) for title, _ in kinds.values())]
    lines = [[str(i), *(_cell(row.get(f"moe/{i}/{kind}"), form) for kind, (_, form) in kinds.items())] for i in layers]
    parts = [f"<h3>Routers at step {row['step']:,}</h3>", table(header, lines)]
    if any(key.endswith("/uncovered") for key in row):
        parts += [
            '<p class="key">Tokens without expert, by the time of the picture (1 is noise, 0 the picture):</p>',
            _time_map(row, layers),
        ]
    return parts


def coverage_layers(rows: Rows) -> dict[str, dict[str, str]]:
    """Per MoE layer the metric keys of its coverage: {layer prefix: {number of experts: key}}."""
    layers: dict[str, dict[str, str]] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        match = re.fullmatch(r"(.*?)/?coverage_(\d+)", key)
        if match:
            layers.setdefault(match[1], {})[match[2]] = key
    return layers


def _coverage_chart(rows: Rows, layer: str, names: Mapping[str, str]) -> str:
    whole = [row for row in rows if all(math.isfinite(row.get(key, math.nan)) for key in names.values())]
    order = sorted(names, key=int)
    bands = [
        (f"{name} or more" if name == order[-1] and int(name) > 1 else name, _points(whole, names[name]))
        for name in order
    ]
    return share_chart(f"Block {layer.rsplit('/', 1)[-1]}" if layer else "All MoE layers", bands)


def _time_map(row: Mapping[str, Any], layers: Sequence[int]) -> str:
    """Layers down, ranges of times across; the darker the more tokens no expert took."""
    values = {(i, n): row.get(f"moe/{i}/t{n}/uncovered") for i in layers for n in range(NUM_BINS)}
    top = max([value for value in values.values() if value is not None], default=0.0) or 1.0

    def cell(value: float | None) -> str:
        if value is None:  # no image of the step was in this range
            return "<td></td>"
        return f'<td style="background: rgba(47, 95, 208, {0.6 * value / top:.2f})">{value:.1%}</td>'

    header = ["block", *(f"{n / NUM_BINS:g} to {(n + 1) / NUM_BINS:g}" for n in range(NUM_BINS))]
    rows = [[str(i), *(cell(values[i, n]) for n in range(NUM_BINS))] for i in layers]
    return f'<div class="narrow">{table(header, rows)}</div>'


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _points(rows: Rows, key: str) -> list[tuple[float, float]]:
    return [(float(row["step"]), float(row[key])) for row in rows if key in row]


def _grid_image(path: Path) -> str:
    """A picture inside the page, a wide one made smaller, a small one shown at twice its size at most."""
    with Image.open(path) as picture:
        largest, uri = 2 * picture.width, file_uri(path.read_bytes(), "image/png")
        if picture.width > GRID_WIDTH:
            picture.thumbnail((GRID_WIDTH, GRID_WIDTH))
            buffer = io.BytesIO()
            picture.convert("RGB").save(buffer, format="JPEG", quality=85)
            uri = file_uri(buffer.getvalue(), "image/jpeg")
    return f'<img src="{uri}" alt="{path.stem}" style="width: min(100%, {largest}px)">'
