"""What GenEval's part of a page says of a result, by literal numbers."""

import re
from typing import Any

import pytest

from eval.pages.geneval_section import geneval_section, geneval_stat, interval_plot


def _result(comparable: str) -> dict[str, Any]:
    overall = {"value": 0.5, "low": 0.25, "high": 0.75, "total": 4, "correct": 2}
    controls = {"chance": 0.125, "shuffled": 0.375, "ceiling": 0.875}
    return {
        "overall": overall, "tags": {"single_object": overall}, "images": overall, "best_of": {"1": 0.5}, "faults": {},
        "controls": {name: {"overall": value, "single_object": value} for name, value in controls.items()},
        "card": {"comparable": comparable},
    }  # fmt: skip


def test_the_head_has_interval_and_the_controls_by_name() -> None:
    head = geneval_stat(_result("official"))
    assert "shuffled captions 37.5, true pictures 87.5" in head
    assert ">25.0 to 75.0<" in head and ">50.0<" in head


@pytest.mark.parametrize(("comparable", "words"), [("official", "comparable"), ("approximate", "not comparable")])
def test_only_the_official_protocol_is_called_comparable(comparable: str, words: str) -> None:
    text = "".join(geneval_section(_result(comparable)))
    assert f"<b>{comparable}</b>, {words} with published scores." in text


def test_an_interval_is_drawn_from_its_lower_to_its_upper_end() -> None:
    """220 wide with margins of 6: a share s is at 6 + 208 s."""
    drawn = interval_plot(0.5, 0.25, 0.75, {"chance": 0.125})
    ends = re.findall(r'<line x1="([0-9.]+)" x2="([0-9.]+)"', drawn)
    assert ends == [("6.0", "214.0"), ("32.0", "32.0"), ("58.0", "162.0")]
    assert '<circle cx="110.0"' in drawn and "<title>chance 12.5%</title>" in drawn
