"""Reports side by side, and numbers in a run's TensorBoard."""

import json
from pathlib import Path
from typing import Any

import pytest
from browser import DESK, PHONE, find_browser, width_in_browser
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eval.pages.numbers import log_numbers
from eval.report import card_differences, find_report, main, read_scores
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
    report = {"step": 40, "results": {"geneval": {"overall": {"value": 0.5, "low": 0.4}, "card": {"pictures": 3}}}}
    assert not log_numbers(tmp_path, report)
    (tmp_path / "tensorboard").mkdir()
    assert log_numbers(tmp_path, report)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "eval"))
    events.Reload()
    assert events.Tags()["scalars"] == ["eval/geneval/overall"]
    (point,) = events.Scalars("eval/geneval/overall")
    assert (point.step, point.value) == (40, 0.5)
