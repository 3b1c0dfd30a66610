"""GenEval's judging rules on detections of any detector (arXiv 2310.11513, MIT licence of the original).

A prompt's metadata has `include` clauses {class, count[, color][, position: [relation, clause]]} and
optional `exclude` clauses. A picture is correct when every include clause finds its objects, with the
asked colour and place, and no exclude clause does. Six tags; overall = unweighted mean of their accuracies.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.pictures.geneval_names import Box

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
FAULTS = ("missing", "excess", "color", "position", "no_target")


@dataclass(frozen=True, kw_only=True)
class Detection:
    """One object found in a picture; `color` is the detector's colour judgement, empty if it has none."""

    name: str
    score: float
    box: Box
    color: str = ""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Thresholds of the judge; the defaults are the official ones for the official detector.

    `score` and `counting_score` are the least detection scores, `max_objects` the most detections of a
    class, `max_overlap` the IoU at which the weaker of two boxes of a class is dropped (1: never),
    `position_margin` the share of both sizes that is taken off a centre offset.
    """

    score: float = 0.3
    counting_score: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_margin: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Why a picture failed: the kind (one of FAULTS) and a phrase for the reader."""

    kind: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class PictureVerdict:
    """The judgement of one picture; correct when it has no faults."""

    faults: tuple[Fault, ...]

    @property
    def correct(self) -> bool:
        return not self.faults

    @property
    def reason(self) -> str:
        return "; ".join(fault.reason for fault in self.faults)


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union with the official scorer's pixel areas (one is added to each side)."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0.0) * max(y2 - y1 + 1, 0.0)

    overlap = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - overlap
    return overlap / union if union else 0.0


def select_objects(detections: Sequence[Detection], tag: str, rules: Rules) -> dict[str, list[Detection]]:
    """Detections by class, best first: score threshold, at most `max_objects`, optional overlap filter.

    Of equal scores the last comes first: the official order is an ascending one turned round.
    """
    threshold = rules.counting_score if tag == "counting" else rules.score
    by_class: dict[str, list[Detection]] = {}
    for detection in sorted(reversed(detections), key=lambda item: -item.score):
        if detection.score > threshold:
            by_class.setdefault(detection.name, []).append(detection)
    if rules.max_overlap >= 1:
        return {name: found[: rules.max_objects] for name, found in by_class.items()}
    kept: dict[str, list[Detection]] = {name: [] for name in by_class}
    for name, found in by_class.items():
        for item in found[: rules.max_objects]:
            if all(box_iou(other.box, item.box) < rules.max_overlap for other in kept[name]):
                kept[name].append(item)
    return kept


def relations(a: Box, b: Box, margin: float = 0.1) -> frozenset[str]:
    """Where box `a` lies relative to `b`; two words can hold at once, none when the centres are close."""
    offset = ((a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2)
    sizes = (a[2] - a[0] + b[2] - b[0], a[3] - a[1] + b[3] - b[1])
    reduced = [
        math.copysign(max(abs(shift) - margin * abs(size), 0.0), shift)
        for shift, size in zip(offset, sizes, strict=True)
    ]
    if all(abs(value) < 1e-3 for value in reduced):
        return frozenset()
    length = math.hypot(*offset)
    x, y = reduced[0] / length, reduced[1] / length
    words = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return frozenset(word for word, holds in words.items() if holds)


def judge(metadata: Mapping[str, Any], detections: Sequence[Detection], rules: Rules | None = None) -> PictureVerdict:
    """Judge one picture by the official rules: only the best `count` objects of a clause are looked at.

    `metadata` needs the keys `tag` and `include`; raises KeyError when they are absent.
    """
    rules = rules or Rules()
    objects = select_objects(detections, metadata["tag"], rules)
    faults: list[Fault] = []
    groups: list[list[Detection] | None] = []
    for clause in metadata["include"]:
        group = objects.get(clause["class"], [])[: clause["count"]]
        fault = _clause_fault(clause, group, groups, rules)
        groups.append(None if fault else group)
        if fault:
            faults.append(fault)
    for clause in metadata.get("exclude", []):
        found = len(objects.get(clause["class"], []))
        if found >= clause["count"]:
            reason = f"expected {clause['class']} < {clause['count']}, found {found}"
            faults.append(Fault(kind="excess", reason=reason))
    return PictureVerdict(faults=tuple(faults))


def _clause_fault(
    clause: Mapping[str, Any], group: list[Detection], groups: list[list[Detection] | None], rules: Rules
) -> Fault | None:
    """The first fault of an include clause, in the official order: number, colour, place."""
    name, count = clause["class"], clause["count"]
    if len(group) < count:
        return Fault(kind="missing", reason=f"expected {name} >= {count}, found {len(group)}")
    if "color" in clause:
        colors = [item.color for item in group]
        if colors.count(clause["color"]) < count:
            found = ", ".join(color or "none" for color in colors)
            return Fault(kind="color", reason=f"expected {clause['color']} {name}, found {found}")
    if "position" in clause:
        relation, target = clause["position"]
        targets = groups[target]
        if targets is None:
            return Fault(kind="no_target", reason=f"no target for {name} to be {relation}")
        for item in group:
            for other in targets:
                holds = relations(item.box, other.box, rules.position_margin)
                if relation not in holds:
                    found = " and ".join(sorted(holds)) or "no direction"
                    return Fault(kind="position", reason=f"expected {name} {relation} target, found {found}")
    return None


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % Wilson score interval of a share; (0, 1) for no observations."""
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    # The exact limits at 0 and 1, free of rounding.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == total else centre + half)


@dataclass(frozen=True, kw_only=True)
class Score:
    """A share in [0, 1] with its 95 % interval and what it was counted from."""

    value: float
    low: float
    high: float
    correct: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Accuracy per tag, their unweighted mean (`overall`), and plain shares over pictures and prompts."""

    tags: dict[str, Score]
    overall: Score
    images: Score
    prompts: Score
    faults: dict[str, dict[str, int]] = field(default_factory=dict)


def share_score(flags: Sequence[bool]) -> Score:
    """Share of true flags with its Wilson interval."""
    low, high = wilson_interval(sum(flags), len(flags))
    value = sum(flags) / len(flags) if flags else 0.0
    return Score(value=value, low=low, high=high, correct=sum(flags), total=len(flags))


def mean_score(scores: Sequence[Score]) -> Score:
    """Unweighted mean; its interval joins the parts' asymmetric half-widths in squares (MOVER, Zou 2008)."""
    count = max(len(scores), 1)
    value = sum(score.value for score in scores) / count
    below = math.sqrt(sum((score.value - score.low) ** 2 for score in scores)) / count
    above = math.sqrt(sum((score.high - score.value) ** 2 for score in scores)) / count
    correct, total = sum(score.correct for score in scores), sum(score.total for score in scores)
    return Score(value=value, low=max(value - below, 0.0), high=min(value + above, 1.0), correct=correct, total=total)


def summarize(tags: Sequence[str], prompt_ids: Sequence[str], verdicts: Sequence[PictureVerdict]) -> Summary:
    """Scores of judged pictures; a prompt counts as correct when any of its pictures is."""
    by_tag: dict[str, list[bool]] = {}
    by_prompt: dict[str, list[bool]] = {}
    faults: dict[str, dict[str, int]] = {}
    for tag, prompt_id, verdict in zip(tags, prompt_ids, verdicts, strict=True):
        by_tag.setdefault(tag, []).append(verdict.correct)
        by_prompt.setdefault(prompt_id, []).append(verdict.correct)
        for kind in {fault.kind for fault in verdict.faults}:
            faults.setdefault(tag, {})[kind] = faults.get(tag, {}).get(kind, 0) + 1
    order = [tag for tag in TAGS if tag in by_tag] + sorted(set(by_tag) - set(TAGS))
    scores = {tag: share_score(by_tag[tag]) for tag in order}
    return Summary(
        tags=scores,
        overall=mean_score(list(scores.values())),
        images=share_score([verdict.correct for verdict in verdicts]),
        prompts=share_score([any(flags) for flags in by_prompt.values()]),
        faults=faults,
    )


def result_row(filename: str, metadata: Mapping[str, Any], verdict: PictureVerdict, found: Sequence[Detection]) -> str:
    """One line of results.jsonl in the official format."""
    details: dict[str, list[list[float]]] = {}
    for item in found:
        box = [round(value, 2) for value in item.box]
        details.setdefault(item.name, []).append([*box, round(item.score, 4)])
    return json.dumps(
        {
            "filename": filename,
            "tag": metadata["tag"],
            "prompt": metadata["prompt"],
            "correct": verdict.correct,
            "reason": verdict.reason,
            "metadata": json.dumps(metadata),
            "details": json.dumps(details),
        }
    )
