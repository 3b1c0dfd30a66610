"""A metric is one file and one line: a toy suite in the registry, and nothing else of the evaluation changed."""

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eval import score_folder
from eval.pictures.image_files import picture_path, read_picture, write_picture
from eval.pictures.prompts import Prompt
from eval.report import read_scores
from eval.run import parse
from eval.score import main
from eval.scoring.job import Result, ScoreConfig, ScoringJob, Suite
from eval.scoring.options import SUITES
from eval.scoring.score_and_report import ScoredSubject, score_and_report
from trainer.config import ConfigError, require
from trainer.files import write_text


def _check(config: ScoreConfig, prompts: list[Prompt]) -> None:
    del config
    require(bool(prompts), "--suite toy needs --prompts")


def _prepare(job: ScoringJob) -> None:
    mine = range(job.world.rank, len(job.files), job.world.size)
    means = {str(i): float(read_picture(job.files[i]).float().mean()) for i in mine}
    write_text(job.config.out / "toy" / f"{job.world.rank}.json", json.dumps(means))


def _score(job: ScoringJob) -> Result:
    parts = [json.loads(path.read_text()) for path in (job.config.out / "toy").glob("*.json")]
    means = [value for part in parts for value in part.values()]
    return {
        "brightness": {"mean": sum(means) / len(means), "std": 0.25},
        "skipped": {"contrast": "one colour"},
        "card": {"metric": "toy-1", "pictures": len(means)},
    }


SUITE = Suite(
    check=_check, prepare=_prepare, score=_score, title="Light & shade", headlines=("brightness/mean",),
    names={"brightness/mean": "mean brightness"}, spreads={"brightness/mean": "brightness/std"},
)  # fmt: skip


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line."""
    monkeypatch.setitem(SUITES, "toy", "test_metric_seam")


def _write_set(folder: Path) -> Path:
    for i in range(2):
        write_picture(picture_path(folder / "drawn", i, 0), torch.full((8, 8, 3), 40 + 20 * i, dtype=torch.uint8))
    (folder / "prompts.txt").write_text("dark\nlight\n")
    return folder / "prompts.txt"


def test_commands_report_table_and_comparison_have_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out = _write_set(tmp_path), tmp_path / "out"
    main([str(tmp_path / "drawn"), "--prompts", str(prompts), "--suite", "toy", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "toy/brightness/mean 50\n" in printed and "toy: contrast not computed, one colour" in printed
    page = (out / "report.html").read_text()
    assert "<h2>Light &amp; shade</h2>" in page and "toy-1" in page and "Not computed: contrast" in page
    assert "<td>mean brightness</td><td>50</td><td>&plusmn; 0.25</td>" in page
    assert (out / "report.csv").read_text() == "name,value\ntoy/brightness/mean,50.0\ntoy/brightness/std,0.25\n"
    assert read_scores(out).numbers["toy/brightness/mean"] == 50
    called = score_folder(str(tmp_path / "drawn"), suite="toy", prompts=str(prompts), out=tmp_path / "called")
    assert called == json.loads((out / "report.json").read_text())["results"]
    assert (tmp_path / "called" / "report.csv").read_text() == (out / "report.csv").read_text()
    assert parse([str(tmp_path), "--prompts", str(prompts), "--suite", "toy"]).score.suites == ("toy",)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "drawn"), "--suite", "toy", "--out", str(out)])
    assert "--suite toy needs --prompts" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"choose from .*text, toy"):
        ScoreConfig(suites=("toys",), out=out)


def test_its_numbers_reach_tensorboard(tmp_path: Path) -> None:
    _write_set(tmp_path)
    (tmp_path / "run" / "tensorboard").mkdir(parents=True)
    job = ScoringJob(
        config=ScoreConfig(suites=("toy",), out=tmp_path / "out"),
        prompts=[Prompt(id=text, text=text, tag="", metadata={}) for text in ("dark", "light")],
        files=[picture_path(tmp_path / "drawn", i, 0) for i in range(2)],
    )
    subject = ScoredSubject(name="run", summary="two pictures", step=30, run_dir=tmp_path / "run")
    score_and_report(job, subject)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "eval")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/toy/brightness/mean", "eval/toy/brightness/std"]
    (point,) = events.Scalars("eval/toy/brightness/mean")
    assert (point.step, point.value) == (30, 50)
