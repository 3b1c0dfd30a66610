"""Reports side by side, and numbers in a run's TensorBoard."""

import json
from pathlib import Path
from typing import Any

import pytest
from browser import DESK, PHONE, find_browser, width_in_browser
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eval.pages.numbers import log_numbers
from eval.report import ReportScores, card_differences, comparison_text, find_report, main, read_scores
from trainer.config import ConfigError


def _report(folder: Path, fid: float, **card: Any) -> Path:
    content = {"fid": fid, "kid": {"mean": 0.5}, "card": {"convention": "clean", "checkpoint_step": fid, **card}}
    folder.mkdir(parents=True)
    report = {"run": folder.name, "step": 10, "results": {"fid": content}}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_numbers_stand_side_by_side_with_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = _report(tmp_path / "a", 3.0)
    b = _report(tmp_path / "b" / "eval", 2.5, convention="torch-fidelity").parent
    same = card_differences([read_scores(a), read_scores(_report(tmp_path / "<c>", 4.0))])
    assert same == []
    page = tmp_path / "page.html"
    main(["compare", str(a), str(b), str(tmp_path / "<c>"), "--out", str(page)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'not the same protocol, fid: convention differs ("clean", "torch-fidelity")'
    assert lines[2].split() == ["fid/fid", "3", "2.5", "4"]
    if find_browser():
        for width in (PHONE, DESK):
            assert width_in_browser(page, width, tmp_path) <= width
    text = page.read_text()
    assert "convention differs" in text and "&lt;c&gt;" in text and "<c>" not in text


CARDS: dict[str, dict[str, Any]] = {
    "sampling": {
        "precision": "bf16", "sampler": "euler", "sampling_steps": 50, "guidance_scale": 3.0, "time_shift": 1.0,
        "guidance_interval": [0.0, 1.0], "image_size": 256, "codec": "pixel", "text_encoder": "minilm",
        "num_prompts": 553, "distinct_texts": 550, "pictures_per_prompt": 4, "prompts_sha256": "ab", "seeds": "x",
        "checkpoint_step": 10, "weights": "ema", "ema_decay": 0.9,
    },
    "geneval": {
        "metric": "geneval-1", "comparable": "official", "departures": "none", "detector": "mask2former",
        "weights_sha256": "12", "colors": "ViT-L-14", "rules": {"score": 0.3, "counting_score": 0.9},
        "interval": "95 %", "pictures": 2212, "prompts_sha256": "ab",
    },
    "fid": {
        "metric": "fid-2", "convention": "clean", "network": "inception", "weights_sha256": "34",
        "preprocess": "clean-299", "precision": "fp32", "pictures": 2212, "reference": "coco",
        "reference_pictures": 30000, "pictures_of_set_metrics": 2212,
    },
}  # fmt: skip
SUBJECT = ("checkpoint_step", "weights", "ema_decay")
KEYS = [(suite, key) for suite, card in CARDS.items() for key in card]


def _with(name: str, cards: dict[str, dict[str, Any]]) -> ReportScores:
    return ReportScores(name=name, step=10, numbers={}, cards=cards)


def _but(suite: str, card: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {**CARDS, suite: card}


@pytest.mark.parametrize(("suite", "key"), KEYS)
def test_every_setting_of_a_card_is_compared(suite: str, key: str) -> None:
    """But for those that say which model was scored; also in the last report alone, and where it is absent."""
    value, same = CARDS[suite][key], _with("a", CARDS)
    other = _with("b", _but(suite, {**CARDS[suite], key: "other"}))
    lacking = _with("c", _but(suite, {name: item for name, item in CARDS[suite].items() if name != key}))
    for scores, values in (
        ([same, other], [value, "other"]),
        ([same, same, other], [value, "other"]),
        ([other, same, same], ["other", value]),
        ([same, lacking], [value, None]),
        ([lacking, same], [None, value]),
        ([same, other, lacking], [value, "other", None]),
    ):
        said = f"{suite}: {key} differs ({', '.join(json.dumps(item, sort_keys=True) for item in values)})"
        assert card_differences(scores) == ([] if key in SUBJECT else [said])
    assert card_differences([same, same, same]) == []


def test_a_suite_that_one_report_lacks_is_not_compared() -> None:
    less = {suite: card for suite, card in CARDS.items() if suite != "fid"}
    assert card_differences([_with("a", CARDS), _with("b", less), _with("c", {**CARDS, "fid": {}})]) == []
    wrong = {**CARDS, "fid": {**CARDS["fid"], "convention": "pytorch-fid"}}
    assert card_differences([_with("a", CARDS), _with("b", less), _with("c", wrong)]) == [
        'fid: convention differs ("clean", "pytorch-fid")'
    ]


def test_cards_and_numbers_come_from_the_report(tmp_path: Path) -> None:
    results = {
        "geneval": {"overall": {"value": 0.5, "low": 0.4, "correct": 3}, "card": CARDS["geneval"], "skipped": {}},
        "fid": {"fid": 2.5, "kid": {"mean": 0.1, "std": 0.2}, "card": CARDS["fid"]},
    }
    report = {"run": "mine", "step": 40, "results": results, "sampling": CARDS["sampling"]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    found = read_scores(tmp_path)
    assert (found.name, found.step, found.cards) == ("mine", 40, CARDS)
    assert found.numbers == {
        "geneval/overall/value": 0.5, "geneval/overall/low": 0.4, "geneval/overall/correct": 3,
        "fid/fid": 2.5, "fid/kid/mean": 0.1, "fid/kid/std": 0.2,
    }  # fmt: skip
    lines = [line.split() for line in comparison_text([found, found]).splitlines()]
    assert lines[1:] == [
        ["geneval/overall", "0.5", "0.5"], ["fid/fid", "2.5", "2.5"], ["fid/kid/mean", "0.1", "0.1"],
        ["fid/kid/std", "0.2", "0.2"],
    ]  # fmt: skip


def test_missing_and_ambiguous_reports_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"has no report\.json: run python -m eval\.run"):
        find_report(tmp_path)
    run = tmp_path / "run"
    one, _ = (_report(run / "eval" / name, 1.0) for name in ("geneval", "coco"))
    with pytest.raises(ConfigError, match="has 2 reports: name one"):
        find_report(run)
    (one / "report.json").write_text('{"run": 1')
    with pytest.raises(ConfigError, match=r"is no report of eval\.run"):
        read_scores(one)
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(run)])
    assert stop.value.code == 2 and "two reports or more" in capsys.readouterr().err


def test_numbers_reach_tensorboard_at_the_checkpoints_step(tmp_path: Path) -> None:
    overall = {"value": 0.5, "low": 0.4, "high": 0.6, "correct": 2, "total": 4}
    report = {"step": 40, "results": {"geneval": {"overall": overall, "card": {"pictures": 3}}}}
    log_numbers(tmp_path, report)
    assert not list(tmp_path.iterdir()), "nothing is logged of what is no run"
    (tmp_path / "tensorboard").mkdir()
    assert log_numbers(tmp_path, report) == {"eval/geneval/overall": 0.5}
    events = EventAccumulator(str(tmp_path / "tensorboard" / "eval"))
    events.Reload()
    assert events.Tags()["scalars"] == ["eval/geneval/overall"]
    (point,) = events.Scalars("eval/geneval/overall")
    assert (point.step, point.value) == (40, 0.5)
