"""The judge against a slow, literal version of the published rules; intervals against brute force."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval.metrics.geneval import (
    TAGS,
    Detection,
    Fault,
    PictureVerdict,
    Rules,
    box_iou,
    judge,
    mean_score,
    relations,
    result_row,
    select_objects,
    summarize,
    wilson_interval,
)
from eval.networks.protocols import FoundObject
from eval.pictures.geneval_names import Box
from eval.pictures.geneval_prompts import geneval_prompts
from eval.scoring.detection_cache import from_line, to_line
from eval.scoring.job import ScoreConfig
from eval.suites.geneval import PRECISION, departures

NAMES = ("cat", "dog", "cup")
COLORS = ("red", "blue")
RELATIONS = ("left of", "right of", "above", "below")


def slow_relations(a: list[float], b: list[float]) -> set[str]:
    """The position rule with arrays, step by step."""
    box_a, box_b = np.array(a).reshape(2, 2), np.array(b).reshape(2, 2)
    offset = box_a.mean(0) - box_b.mean(0)
    dims = np.abs(np.diff(box_a, axis=0))[0] + np.abs(np.diff(box_b, axis=0))[0]
    revised = np.maximum(np.abs(offset) - 0.1 * dims, 0) * np.sign(offset)
    found: set[str] = set()
    if np.all(np.abs(revised) < 1e-3):
        return found
    dx, dy = revised / np.linalg.norm(offset)
    if dx < -0.5:
        found.add("left of")
    if dx > 0.5:
        found.add("right of")
    if dy < -0.5:
        found.add("above")
    if dy > 0.5:
        found.add("below")
    return found


def slow_judge(metadata: dict[str, Any], detections: list[Detection], rules: Rules) -> bool:
    """The published rules as one long loop."""
    threshold = rules.counting_score if metadata["tag"] == "counting" else rules.score
    objects: dict[str, list[Detection]] = {}
    for name in NAMES:
        found = [d for d in detections if d.name == name]
        found = [found[i] for i in np.argsort([d.score for d in found], kind="stable")[::-1]]  # the last of equal ones
        found = [d for d in found if d.score > threshold][: rules.max_objects]
        while rules.max_overlap < 1 and found:
            best = found.pop(0)
            objects.setdefault(name, []).append(best)
            found = [d for d in found if box_iou(best.box, d.box) < rules.max_overlap]
        if rules.max_overlap >= 1 and found:
            objects[name] = found
    correct = True
    matched: list[list[Detection] | None] = []
    for clause in metadata["include"]:
        ok = True
        found = objects.get(clause["class"], [])[: clause["count"]]
        if len(found) < clause["count"]:
            correct = ok = False
        else:
            if "color" in clause and [d.color for d in found].count(clause["color"]) < clause["count"]:
                correct = ok = False
            if "position" in clause and ok:
                relation, group = clause["position"]
                targets = matched[group]
                if targets is None:
                    correct = ok = False
                else:
                    for d in found:
                        for target in targets:
                            if relation not in slow_relations(list(d.box), list(target.box)):
                                correct = ok = False
        matched.append(found if ok else None)
    for clause in metadata.get("exclude", []):
        if len(objects.get(clause["class"], [])) >= clause["count"]:
            correct = False
    return correct


def random_case(rng: random.Random) -> tuple[dict[str, Any], list[Detection]]:
    """Metadata of a random tag with detections that satisfy it fairly often."""
    tag = rng.choice(TAGS)
    a, b = rng.sample(NAMES, 2)
    count = rng.randint(1, 3)
    include: list[dict[str, Any]] = [{"class": a, "count": count if tag == "counting" else 1}]
    if tag in ("two_object", "position", "color_attr"):
        include.append({"class": b, "count": 1})
    if tag in ("colors", "color_attr"):
        for clause in include:
            clause["color"] = rng.choice(COLORS)
    if tag == "position":
        include[1]["position"] = [rng.choice(RELATIONS), 0]
    metadata: dict[str, Any] = {"tag": tag, "include": include, "prompt": "a prompt"}
    if tag == "counting":
        metadata["exclude"] = [{"class": a, "count": count + 1}]
    detections, digits = [], rng.choice((1, 9))  # scores of one digit tie
    for _ in range(rng.randint(0, 6)):
        x, y, w, h = rng.randint(0, 20), rng.randint(0, 20), rng.randint(1, 12), rng.randint(1, 12)
        box = (float(x), float(y), float(x + w), float(y + h))
        detections.append(
            Detection(
                name=rng.choice(NAMES), score=round(rng.random() ** 0.3, digits), box=box, color=rng.choice(COLORS)
            )
        )
    return metadata, detections


@pytest.mark.parametrize("rules", [Rules(), Rules(max_overlap=0.4, max_objects=2, counting_score=0.5)])
def test_judge_equals_the_literal_rules(rules: Rules) -> None:
    rng = random.Random(0)
    positive = 0
    for _ in range(6000):
        metadata, detections = random_case(rng)
        expected = slow_judge(metadata, detections, rules)
        assert judge(metadata, detections, rules).correct == expected, (metadata, detections)
        positive += expected
    assert positive > 1000


def test_judge_equals_the_literal_rules_in_many_cases() -> None:
    rng = random.Random(2)
    positive = 0
    for number in range(44_000):
        rules = (
            Rules() if number % 2 else Rules(max_overlap=rng.random(), score=rng.random(), counting_score=rng.random())
        )
        metadata, detections = random_case(rng)
        expected = slow_judge(metadata, detections, rules)
        assert judge(metadata, detections, rules).correct == expected, (metadata, detections)
        positive += expected
    assert positive > 5000


def test_the_last_of_equal_scores_comes_first_also_from_the_cache() -> None:
    objects = [FoundObject(class_number=15, score=score, box=(x, 0.0, x + 1, 1.0)) for x, score in
               ((0.0, 0.9000002), (1.0, 0.9000001), (2.0, 0.8), (3.0, 0.8))]  # fmt: skip
    line = json.loads(json.dumps(to_line("a", torch.zeros(4, 4, 3), objects)))
    kept = [Detection(name=item.name, score=item.score, box=item.box) for item in from_line(line)]
    assert [item.box[0] for item in select_objects(kept, "counting", Rules(counting_score=0.5))["cat"]] == [0, 1, 3, 2]
    metadata = {"tag": "single_object", "include": [{"class": "cat", "count": 1, "color": "red"}]}
    tied = [Detection(name="cat", score=0.5, box=(0, 0, 1, 1), color=color) for color in ("blue", "red")]
    assert judge(metadata, tied).correct and not judge(metadata, tied[::-1]).correct


def test_the_official_protocol_departs_in_precision_only(tmp_path: Path) -> None:
    config, prompts = ScoreConfig(suites=("geneval",), out=tmp_path, num_samples=4), geneval_prompts()
    assert departures(config, prompts, "official") == [PRECISION] and "0.03" in PRECISION
    assert departures(config, [p for p in prompts if p.tag == "counting"], "official") == ["other prompts"]
    assert departures(replace(config, colors="nearest"), prompts, "official") == ["colours by nearest"]


def test_relations_equal_the_array_version() -> None:
    rng = random.Random(1)
    for _ in range(3000):
        a, b = ([rng.randint(0, 9), rng.randint(0, 9), rng.randint(10, 20), rng.randint(10, 20)] for _ in "ab")
        box_a, box_b = (a[0], a[1], a[2], a[3]), (b[0], b[1], b[2], b[3])
        assert relations(box_a, box_b) == slow_relations(a, b)


def _boxed(*boxes: Box, score: float = 0.95) -> list[Detection]:
    return [Detection(name="cat", score=score, box=box) for box in boxes]


@pytest.mark.parametrize(("tag", "least"), [("single_object", 0.3), ("counting", 0.9)])
def test_a_score_at_the_threshold_is_no_object(tag: str, least: float) -> None:
    for score, number in ((least, 0), (math.nextafter(least, 0), 0), (math.nextafter(least, 1), 1)):
        found = select_objects(_boxed((0, 0, 8, 8), score=score), tag, Rules())
        assert len(found.get("cat", [])) == number
    rules = Rules(score=0.5, counting_score=0.6)
    assert not select_objects(_boxed((0, 0, 8, 8), score=0.6), "counting", rules)
    assert select_objects(_boxed((0, 0, 8, 8), score=0.6), "two_object", rules)


def test_the_best_sixteen_of_a_class_count() -> None:
    found = [Detection(name="cat", score=0.5 + i / 100, box=(0, 0, 8, 8)) for i in range(20)]
    kept = select_objects(found, "position", Rules())["cat"]
    assert [item.score for item in kept] == [0.5 + i / 100 for i in range(19, 3, -1)]


def test_boxes_have_official_areas_and_a_tie_of_overlap_is_dropped() -> None:
    wide, below, beside = (0.0, 0.0, 9.0, 4.0), (0.0, 3.0, 9.0, 7.0), (5.0, 0.0, 14.0, 4.0)
    assert box_iou(wide, below) == pytest.approx(20 / 80)  # rows 3 and 4 of ten pixels
    assert box_iou(wide, beside) == pytest.approx(25 / 75)  # columns 5 to 9 of five pixels
    assert box_iou(wide, (0.0, 6.0, 9.0, 8.0)) == 0
    half = (0.0, 0.0, 4.0, 4.0)
    assert box_iou(wide, half) == 0.5
    for limit, kept in ((0.5, 1), (0.51, 2), (1.0, 2)):
        assert len(select_objects(_boxed(wide, half), "counting", Rules(max_overlap=limit))["cat"]) == kept


@pytest.mark.parametrize(
    ("a", "words"),
    [
        ((10, 0, 12, 20), {"right of"}),  # the other is tall: its height must not count for the offset across
        ((-10, 0, -8, 20), {"left of"}),
        ((0, 30, 2, 50), {"below"}),
        ((0, -30, 2, -10), {"above"}),
        ((20, 30, 22, 50), {"below", "right of"}),
        ((0, 4, 2, 24), set()),  # 4 pixels lower, of which a tenth of both heights is taken off: nothing is left
        ((0, 5, 2, 25), set()),  # 1 of 5 pixels is left
    ],
)
def test_places_of_tall_boxes(a: Box, words: set[str]) -> None:
    assert relations(a, (0, 0, 2, 20)) == words


def test_exactly_half_the_offset_is_no_direction() -> None:
    """Centres 10 apart, a tenth of both sizes is 5: half of the offset is left, and more than half is asked for."""
    wide, tall = (0.0, 0.0, 25.0, 4.0), (0.0, 0.0, 4.0, 25.0)
    assert relations((10.0, 0.0, 35.0, 4.0), wide) == relations((-10.0, 0.0, 15.0, 4.0), wide) == set()
    assert relations((0.0, 10.0, 4.0, 35.0), tall) == relations((0.0, -10.0, 4.0, 15.0), tall) == set()
    assert relations((10.5, 0.0, 35.5, 4.0), wide) == {"right of"}
    assert relations((0.0, -10.5, 4.0, 14.5), tall) == {"above"}
    assert relations((10.0, 0.0, 35.0, 4.0), wide, margin=0.09) == {"right of"}


def test_as_many_as_excluded_are_too_many() -> None:
    metadata = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}
    for number, kinds in ((1, ["missing"]), (2, []), (3, ["excess"]), (4, ["excess"])):
        found = _boxed(*((10.0 * i, 0.0, 10.0 * i + 8, 8.0) for i in range(number)))
        assert [fault.kind for fault in judge(metadata, found).faults] == kinds


def _found(name: str, x: float, y: float, color: str = "red") -> Detection:
    return Detection(name=name, score=0.95, box=(x, y, x + 8, y + 8), color=color)


def test_each_failure_kind_has_its_reason() -> None:
    def kind(metadata: dict[str, Any], *detections: Detection) -> list[str]:
        return [fault.kind for fault in judge(metadata, detections).faults]

    one = {"class": "cat", "count": 1}
    assert kind({"tag": "single_object", "include": [one]}) == ["missing"]
    counting = {"tag": "counting", "include": [one], "exclude": [{"class": "cat", "count": 2}]}
    assert kind(counting, _found("cat", 0, 0), _found("cat", 20, 0)) == ["excess"]
    colors = {"tag": "colors", "include": [{**one, "color": "blue"}]}
    assert kind(colors, _found("cat", 0, 0)) == ["color"]
    assert "expected blue cat, found red" in judge(colors, [_found("cat", 0, 0)]).reason
    position = {"tag": "position", "include": [{"class": "dog", "count": 1}, {**one, "position": ["left of", 0]}]}
    assert kind(position, _found("cat", 20, 0), _found("dog", 0, 0)) == ["position"]
    assert kind(position, _found("cat", 0, 0), _found("dog", 20, 0)) == []
    assert kind(position, _found("cat", 0, 0)) == ["missing", "no_target"]


def test_wilson_interval_inverts_the_score_test() -> None:
    for correct, total in ((0, 10), (3, 10), (39, 40), (40, 40)):
        low, high = wilson_interval(correct, total)
        grid = np.linspace(1e-6, 1 - 1e-6, 200_001)
        inside = grid[np.abs(correct / total - grid) <= 1.959964 * np.sqrt(grid * (1 - grid) / total)]
        assert low == pytest.approx(inside.min(), abs=1e-4)
        assert high == pytest.approx(inside.max(), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_overall_is_the_unweighted_mean_of_the_tags() -> None:
    right, wrong = PictureVerdict(faults=()), PictureVerdict(faults=(Fault(kind="missing", reason="r"),))
    summary = summarize(
        ["counting", "counting", "counting", "colors"], ["0", "0", "1", "2"], [right, wrong, wrong, right]
    )
    assert list(summary.tags) == ["counting", "colors"]
    assert summary.overall.value == pytest.approx((1 / 3 + 1) / 2)
    assert (summary.images.correct, summary.images.total) == (2, 4)
    assert (summary.prompts.correct, summary.prompts.total) == (2, 3)
    assert summary.faults == {"counting": {"missing": 2}}
    alone = mean_score([summary.tags["counting"]])
    assert (alone.low, alone.high) == pytest.approx(wilson_interval(1, 3))


def test_result_row_has_the_official_keys() -> None:
    metadata = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"}
    found = [_found("cat", 1, 2)]
    row = json.loads(result_row("00000/samples/0000.png", metadata, judge(metadata, found), found))
    assert set(row) == {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"}
    assert row["correct"] is True
    assert json.loads(row["metadata"]) == metadata
    assert json.loads(row["details"]) == {"cat": [[1, 2, 9, 10, 0.95]]}
