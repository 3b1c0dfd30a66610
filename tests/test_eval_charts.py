"""Charts show the numbers that they are given: lines and words are read back from the picture."""

import base64
import re
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from eval.pages.charts import BLUE, RED, coverage_chart, moved_chart, region_chart, training_chart
from eval.pages.compute_map import ComputeMaps

Points = NDArray[np.float64]
STEPS = list(range(10, 410, 10))


def _svg(uri: str) -> str:
    assert uri.startswith("data:image/svg+xml;base64,")
    return base64.b64decode(uri.split(",", 1)[1]).decode()


def _words(svg: str) -> list[str]:
    """Texts of the picture, whose glyphs are drawn."""
    return re.findall(r"<!-- (.*?) -->", svg)


def _lines(svg: str) -> list[list[tuple[str, Points]]]:
    """For each panel colour and points [n, 2] of its curves; lines of two points belong to grid and axes."""
    panels = []
    for part in svg.split('<g id="axes_')[1:]:
        found = []
        for path, style in re.findall(r'<path d="([^"]*)"[^>]*style="([^"]*)"', part.split('<g id="legend_')[0]):
            points = np.array([[float(value) for value in pair] for pair in re.findall(r"[ML] (\S+) (\S+)", path)])
            color = re.search(r"stroke: (#\w+)", style)
            if color and "fill: none" in style and len(points) > 2:
                found.append((color[1], points))
        panels.append(found)
    return panels


def _axis(places: Points, values: list[float]) -> tuple[float, float]:
    """Slope and start of the straight line from values to places; fails if they do not lie on one."""
    slope, start = np.polyfit(values, places, 1)
    assert np.abs(np.polyval([slope, start], values) - places).max() < 0.01
    return float(slope), float(start)


def _rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for n, step in enumerate(STEPS):
        row = {"step": step, "loss": 2 + 100 / step, "learning_rate": 1e-3 * n, "grad_norm": 1 + (n % 3)}
        rows.append(row | ({"images_per_second": 50.0 + n * n} if n % 2 else {}))
    return rows


def test_training_curves_are_those_of_the_metrics() -> None:
    rows = _rows()
    svg = _svg(training_chart(rows))
    titles = ["Loss", "Learning rate", "Gradient norm", "Images per second"]
    assert [word for word in _words(svg) if word in titles] == titles
    for key, panel in zip(("loss", "learning_rate", "grad_norm", "images_per_second"), _lines(svg), strict=True):
        shown = [row for row in rows if key in row]
        steps, values = [row["step"] for row in shown], [row[key] for row in shown]
        noisy = key != "learning_rate"
        assert len(panel) == 1 + noisy
        across, up = _axis(panel[0][1][:, 0], steps), _axis(panel[0][1][:, 1], values)
        assert across[0] > 0 > up[0]
        if noisy:  # each value with those within a twentieth of the run on both sides
            width = len(values) // 20
            means = [np.mean([v for j, v in enumerate(values) if abs(i - j) <= width]) for i in range(len(values))]
            assert np.abs(panel[1][1][:, 1] - np.polyval(up, means)).max() < 0.01
    assert training_chart(rows[:-1]) != training_chart(rows) == training_chart(_rows())


def test_what_a_run_has_not_logged_has_no_panel() -> None:
    svg = _svg(training_chart([{"step": step, "loss": 1.0 * step} for step in STEPS]))
    assert "Loss" in _words(svg) and "Learning rate" not in _words(svg)
    assert [len(panel) for panel in _lines(svg)] == [2]


def test_coverage_bands_are_named_by_their_last_share() -> None:
    shares = {10: {1: (0.5, 0.3, 0.2), 3: (1, 0, 0)}, 20: {1: (0.1, 0.4, 0.5), 3: (0.96, 0.04, 0)}}
    rows = [
        {"step": step, **{f"moe/{b}/coverage_{k}": s for b in blocks for k, s in enumerate(blocks[b])}}
        for step, blocks in shares.items()
    ]
    uri = coverage_chart(rows)
    assert uri is not None
    words = _words(_svg(uri))
    assert [word for word in words if "%" in word and ":" in word] == [
        "0: 10 %", "1: 40 %", "2 or more: 50 %", "0: 96 %",
    ]  # fmt: skip
    assert [word for word in words if word.startswith("Block")] == ["Block 1", "Block 3"]
    assert coverage_chart([{"step": 10, "loss": 1.0}]) is None


@pytest.fixture
def maps() -> ComputeMaps:
    """Two layers at four times."""
    return ComputeMaps(
        captions=("a cat",),
        pictures_NHWC=torch.zeros(1, 8, 8, 3, dtype=torch.uint8),
        times=(1.0, 0.75, 0.5, 0.2),
        layers=(1, 3),
        experts_NTLhw=torch.zeros(1, 4, 2, 2, 2),
        capacity_factor=2.0,
        num_experts=8,
        moved_TL=torch.tensor([[0.1, 0.9], [0.3, 0.8], [0.2, 0.7], [0.6, 0.1]]),
    )


def test_objects_are_red_and_background_blue(maps: ComputeMaps) -> None:
    inside = torch.tensor([[1.0, 4.0], [2.0, 3.0], [5.0, 2.0], [4.0, 1.0]])
    outside = torch.tensor([[2.0, 1.5], [1.0, 1.0], [0.5, 2.5], [1.5, 3.0]])
    for i, panel in enumerate(_lines(_svg(region_chart(maps, inside, outside)))):
        curves = dict(panel)
        for color, values in ((RED, inside), (BLUE, outside)):
            assert _axis(curves[color][:, 0], list(maps.times))[0] < 0, "from noise on the left to the picture"
            assert _axis(curves[color][:, 1], values[:, i].tolist())[0] < 0
        heights = np.concatenate([curves[RED][:, 1], curves[BLUE][:, 1]])
        _axis(heights, [*inside[:, i].tolist(), *outside[:, i].tolist()])  # on one scale


def test_what_the_caption_moves_is_a_curve_of_each_layer(maps: ComputeMaps) -> None:
    assert maps.moved_TL is not None
    svg = _svg(moved_chart(maps))
    (panel,) = _lines(svg)
    assert [color for color, _ in panel] == [BLUE, RED] and {"block 1", "block 3"} <= set(_words(svg))
    values = maps.moved_TL.T.flatten().tolist()
    assert _axis(np.concatenate([points[:, 1] for _, points in panel]), values)[0] < 0
    assert _axis(panel[0][1][:, 0], list(maps.times))[0] < 0
