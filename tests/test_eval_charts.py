"""Charts show the numbers that they are given: lines and words are read back from the picture."""

import base64
import re

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from eval.pages.charts import BLUE, RED, moved_chart, region_chart
from eval.pages.compute_map import ComputeMaps

Points = NDArray[np.float64]


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
