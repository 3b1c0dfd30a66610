"""What makes a GenEval score official, spelled out in constants, and that each option reaches the judge."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.metrics.geneval import Rules
from eval.networks.detectors import DETECTORS
from eval.networks.protocols import DetectorSource, FoundObject
from eval.pictures.geneval_names import CLASSES
from eval.pictures.geneval_prompts import geneval_prompts
from eval.pictures.image_files import picture_path, write_picture
from eval.run import parse as parse_run
from eval.score import build_parser, main
from eval.scoring.job import ScoreConfig, score_config
from eval.scoring.options import split_names
from eval.suites.geneval import PRECISION, departures
from eval.watch import parse as parse_watch
from trainer.config import ConfigError

OFFICIAL_RULES = {
    "score": 0.3, "counting_score": 0.9, "max_objects": 16, "max_overlap": 1.0, "position_margin": 0.1,
}  # fmt: skip
OFFICIAL = ScoreConfig(
    suites=("geneval",), out=Path("out"), num_samples=4, detector="mask2former", colors="clip", clip="ViT-L-14:openai",
    rules=Rules(**OFFICIAL_RULES),  # type: ignore[arg-type]
)  # fmt: skip


def test_defaults_are_the_official_protocol() -> None:
    assert asdict(Rules()) == OFFICIAL_RULES
    plain = ScoreConfig(suites=("geneval",), out=Path("out"))
    assert replace(plain, num_samples=4) == OFFICIAL
    asked = parse_run(["runs/x", "--prompts", "geneval", "--suite", "geneval", "--out", "out"])
    assert asked.score == OFFICIAL
    assert departures(asked.score, geneval_prompts(), "official") == [PRECISION]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rules": Rules(counting_score=0.3)}, "other thresholds"),
        ({"rules": Rules(score=0.31)}, "other thresholds"),
        ({"rules": Rules(max_objects=15)}, "other thresholds"),
        ({"rules": Rules(max_overlap=0.9)}, "other thresholds"),
        ({"rules": Rules(position_margin=0.2)}, "other thresholds"),
        ({"colors": "nearest"}, "colours by nearest"),
        ({"clip": "ViT-B-32:openai"}, "colours by ViT-B-32:openai"),
        ({"num_samples": 1}, "1 pictures per prompt"),
        ({"num_samples": 8}, "8 pictures per prompt"),
    ],
)
def test_each_departure_from_the_official_protocol_is_named(changed: dict[str, Any], words: str) -> None:
    by_clip = [] if words.startswith("colours by") else [PRECISION]
    assert departures(replace(OFFICIAL, **changed), geneval_prompts(), "official") == [*by_clip, words]


def test_detector_and_prompts_depart_too() -> None:
    assert departures(replace(OFFICIAL, detector="maskrcnn"), geneval_prompts(), "approximate") == [
        "detector maskrcnn", PRECISION,
    ]  # fmt: skip
    for prompts in (geneval_prompts()[:-1], geneval_prompts(1), geneval_prompts()[::-1]):
        assert departures(OFFICIAL, prompts, "official") == [PRECISION, "other prompts"]


OPTIONS = [
    "--reference", "real", "--true-pictures", "true", "--convention", "clean", "--clip", "a:b", "--cmmd-clip", "c:d",
    "--detector", "maskrcnn", "--colors", "nearest", "--min-score", "0.4", "--min-counting-score", "0.6",
    "--neighbours", "7", "--suite", "fid,geneval",
]  # fmt: skip


def _by_score(argv: list[str]) -> ScoreConfig:
    given = build_parser().parse_args(["pictures", "--out", "out", *argv])
    return score_config(given, split_names(given.suite), given.out, given.samples)


def _by_watch(argv: list[str], run: Path) -> ScoreConfig:
    found = parse_watch([str(run), "--prompts", "geneval", *argv]).score
    assert found is not None
    return replace(found, out=Path("out"))


@pytest.mark.parametrize("command", ["run", "score", "watch"])
def test_every_option_reaches_its_setting(command: str, tmp_path: Path) -> None:
    parsers: dict[str, Callable[[list[str]], ScoreConfig]] = {
        "run": lambda argv: (
            parse_run(["runs/x", "--prompts", "geneval", "--samples", "1", "--out", "out", *argv]).score
        ),
        "score": _by_score,
        "watch": lambda argv: _by_watch(argv, tmp_path),
    }
    assert parsers[command](OPTIONS) == ScoreConfig(
        suites=("fid", "geneval"), out=Path("out"), num_samples=1, reference=Path("real"), true_pictures=Path("true"),
        convention="clean", clip="a:b", cmmd_clip="c:d", detector="maskrcnn", colors="nearest", num_neighbours=7,
        rules=Rules(score=0.4, counting_score=0.6),
    )  # fmt: skip


def test_thresholds_below_what_is_kept_are_refused() -> None:
    for option in ("--min-score", "--min-counting-score"):
        with pytest.raises(ConfigError, match=rf"{option} is 0\.04: use 0\.05"):
            _by_score(["--suite", "geneval", option, "0.04"])
        with pytest.raises(ConfigError, match=rf"{option} is 1\.0: use 0\.05"):
            _by_score(["--suite", "geneval", option, "1"])
        with pytest.raises(ConfigError, match=rf"{option} is 0\.0: use 0\.05"):
            _by_score(["--suite", "geneval", option, "0"])
        assert _by_score(["--suite", "geneval", option, "0.05"]).rules != Rules()


def test_no_neighbours_are_refused_and_not_the_default() -> None:
    with pytest.raises(ConfigError, match="neighbours is 0: use 1 or more"):
        _by_score(["--suite", "fid", "--neighbours", "0"])


class _Boxes:
    """Finds three cats of the scores 0.95, 0.7 and 0.35 in every picture."""

    comparable = "official"
    card = {"detector": "boxes"}  # noqa: RUF012

    def detect(self, picture_HW3: Tensor) -> list[FoundObject]:
        boxes = [(1.0, 2.0, 7.0, 5.0), (8.0, 2.0, 14.0, 5.0), (1.0, 8.0, 9.0, 10.0)]
        return [
            FoundObject(class_number=CLASSES.index("cat"), score=score, box=box)
            for score, box in zip((0.95, 0.7, 0.35), boxes, strict=True)
        ]


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A picture for each of three prompts, and a detector for them; `set.jsonl` has the prompts."""
    source = DetectorSource(
        comparable="official",
        find_folder=lambda folder: tmp_path,
        card=lambda path: _Boxes.card,
        load=lambda path: _Boxes(),
    )
    monkeypatch.setitem(DETECTORS, "boxes", source)
    clauses = [("counting", 1), ("counting", 2), ("single_object", 3)]
    rows = [
        {"tag": tag, "prompt": f"{tag} {count}", "include": [{"class": "cat", "count": count}],
         **({"exclude": [{"class": "cat", "count": count + 1}]} if tag == "counting" else {})}
        for tag, count in clauses
    ]  # fmt: skip
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(3):
        write_picture(picture_path(tmp_path / "drawn", i, 0), torch.full((12, 20, 3), i, dtype=torch.uint8))
    return tmp_path


@pytest.mark.parametrize(
    ("options", "correct", "shown"),
    [
        ([], [True, False, True], [1, 1, 3]),
        (["--min-counting-score", "0.5"], [False, True, True], [2, 2, 3]),
        (["--min-counting-score", "0.05"], [False, False, True], [3, 3, 3]),
        (["--min-score", "0.5"], [True, False, False], [1, 1, 2]),
    ],
)
def test_thresholds_decide_verdicts_and_stand_on_the_card(
    pictures: Path, options: list[str], correct: list[bool], shown: list[int]
) -> None:
    out = pictures / "out"
    main([
        str(pictures / "drawn"), "--prompts", str(pictures / "set.jsonl"), "--suite", "geneval",
        "--detector", "boxes:x", "--out", str(out), *options,
    ])  # fmt: skip
    result = json.loads((out / "report.json").read_text())["results"]["geneval"]
    assert [verdict["correct"] for verdict in result["verdicts"]] == correct
    assert result["overall"]["value"] == pytest.approx((sum(correct[:2]) / 2 + correct[2]) / 2)
    given = dict(zip(options[::2], map(float, options[1::2]), strict=True))
    score, counting = given.get("--min-score", 0.3), given.get("--min-counting-score", 0.9)
    assert result["card"]["rules"] == {**OFFICIAL_RULES, "score": score, "counting_score": counting}
    thresholds = ["other thresholds"] if options else []
    assert result["card"]["departures"] == [*thresholds, "other prompts", "1 pictures per prompt"]
    assert result["card"]["comparable"] == "approximate"
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [len(json.loads(row["details"])["cat"]) for row in rows] == shown
    assert json.loads(rows[2]["details"])["cat"][0] == [1, 2, 7, 5, 0.95]
    page = (out / "report.html").read_text()
    assert 'viewBox="0 0 20 12"' in page
    assert '<rect x="8.0" y="2.0" width="6.0" height="3.0"' in page
