"""Trackers beside TensorBoard: they hold up nothing, say once what is wrong, and know a resumed run again."""

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainer.config import ConfigError, config_to_dict, load_config
from trainer.telemetry import trackers
from trainer.telemetry.trackers import QUEUE_SIZE, Sender, Trackers, check_trackers, send_scores

VALUES = {"loss": 1.5, "moe/1/coverage_0": 0.25, "grad_norm": float("nan")}


class Notebook:
    """A tracker that writes down what it is told; each job takes `seconds`, those of `refused` steps fail."""

    def __init__(self, seconds: float = 0.0, refused: tuple[int, ...] = ()) -> None:
        self.seconds, self.refused = seconds, refused
        self.lines: list[tuple[int, float]] = []
        self.closed = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        time.sleep(self.seconds)
        if step in self.refused:
            raise OSError("no route to host")
        self.lines.append((step, values["loss"]))

    def picture(self, step: int, path: Path) -> None:
        self.lines.append((step, 0.0))

    def attach(self, path: Path) -> None:
        self.lines.append((-1, 0.0))

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """What the log says."""
    monkeypatch.setattr(logging.getLogger("ec_dit"), "propagate", True)
    yield caplog


def send(sender: Sender, steps: range) -> None:
    for step in steps:
        sender.send(lambda tracker, step=step: tracker.log(step, {"loss": 2.0 * step}))  # type: ignore[misc]


def test_reports_arrive_in_order_and_none_is_waited_for() -> None:
    book, start = Notebook(seconds=0.05), time.monotonic()
    sender = Sender("train.wandb=a", lambda: book)
    send(sender, range(6))
    assert time.monotonic() - start < 0.05
    sender.close(time.monotonic() + 10)
    assert book.lines == [(step, 2.0 * step) for step in range(6)] and book.closed


def test_what_fails_is_said_once_and_the_rest_goes_on(logged: pytest.LogCaptureFixture) -> None:
    book = Notebook(refused=(1, 3))
    sender = Sender("train.wandb=a", lambda: book)
    send(sender, range(5))
    sender.close(time.monotonic() + 10)
    assert [step for step, _ in book.lines] == [0, 2, 4] and book.closed
    assert logged.messages == [
        "train.wandb=a cannot be written, and training goes on without it: no route to host",
        "train.wandb=a: 2 reports were lost",
    ]


def test_a_tracker_that_cannot_be_opened_loses_all(logged: pytest.LogCaptureFixture) -> None:
    def refuse() -> Notebook:
        raise RuntimeError("no\nlogin")

    sender = Sender("train.wandb=a", refuse)
    send(sender, range(3))
    sender.close(time.monotonic() + 10)
    assert logged.messages[0].endswith("without it: RuntimeError: no login") and "3 reports" in logged.messages[1]


def test_one_that_hangs_is_left_behind(logged: pytest.LogCaptureFixture) -> None:
    released = threading.Event()

    def hang() -> Notebook:
        released.wait()
        return Notebook()

    sender, start = Sender("train.mlflow=a", hang), time.monotonic()
    send(sender, range(QUEUE_SIZE + 5))
    sender.close(start + 0.2)
    assert 0.2 <= time.monotonic() - start < 2 and sender.thread.daemon
    assert "it cannot keep up" in logged.messages[0] and f"{QUEUE_SIZE + 5} reports" in logged.messages[1]
    released.set()


def test_a_package_that_is_missing_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    check_trackers("", "")
    with pytest.raises(ConfigError, match=r"^train\.wandb=a needs the package wandb: run pip install wandb$"):
        check_trackers("a", "")
    with pytest.raises(
        ConfigError, match=r"^train\.mlflow=b needs the package mlflow-skinny: run pip install mlflow-s"
    ):
        check_trackers("", "b")


def one_start(run: Path, config: dict[str, Any], step: int) -> None:
    """A start of a run that logs a step, a grid and its page."""
    found = Trackers(run, config)
    found.log(step, VALUES)
    found.picture(step, run / "grid.png")
    found.attach(run / "report.html")
    found.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "grid.png")
    (folder / "report.html").write_text("page")
    (folder / "eval").mkdir()
    (folder / "eval" / "report.html").write_text("scores")
    return folder


def settings(run: Path, *overrides: str) -> dict[str, Any]:
    config = config_to_dict(load_config("debug", overrides))
    (run / "config.yaml").write_text(json.dumps(config))
    return config


def test_without_a_tracker_nothing_is_written(run: Path) -> None:
    before = sorted(run.iterdir())
    one_start(run, settings(run), 1)
    send_scores(run, 1, {"eval/fid": 3.0}, [])
    assert sorted(run.iterdir()) == sorted([*before, run / "config.yaml"])


def test_mlflow_has_one_run_with_settings_numbers_pictures_and_scores(
    run: Path, tmp_path: Path, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    store = tmp_path / "store"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # set here, so that it is gone afterwards
    one_start(run, settings(run, f"train.mlflow={store}"), 1)
    one_start(run, settings(run, f"train.mlflow={store}", "train.max_steps=24"), 2)
    send_scores(run, 2, {"eval/fid": 3.0}, [run / "eval" / "report.html"])
    assert not [message for message in logged.messages if "train.mlflow" in message]
    client = mlflow.MlflowClient(tracking_uri=str(store))
    experiment = client.get_experiment_by_name("ec_dit")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == json.loads((run / "trackers.json").read_text())["mlflow"]
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params["moe.num_experts"] == "8" and found.data.tags["resumed.train.max_steps"] == "24"
    assert found.data.metrics == {"loss": 1.5, "moe/1/coverage_0": 0.25, "eval/fid": 3.0}
    assert [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "loss")] == [(1, 1.5), (2, 1.5)]
    files = {
        item.path for folder in ("samples", "run", "eval") for item in client.list_artifacts(found.info.run_id, folder)
    }
    assert files == {"samples/grid.png", "run/report.html", "eval/report.html"}


def test_wandb_goes_on_with_the_same_run_offline(
    run: Path, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = settings(run, "train.wandb=team/project")
    one_start(run, config, 1)
    time.sleep(1)  # its folders are named by the second
    one_start(run, config, 2)
    time.sleep(1)
    send_scores(run, 2, {"eval/fid": 3.0}, [run / "eval" / "report.html"])
    assert not [message for message in logged.messages if "train.wandb" in message]
    name = json.loads((run / "trackers.json").read_text())["wandb"]
    files = sorted((run / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(files) == 3 == len(list((run / "wandb").glob("offline-run-*")))
    wanted = {b"moe/1/coverage_0", b"num_experts", b"samples", b"eval/fid", b"team", b"project", b"report.html"}
    end = time.monotonic() + 20
    while missing := {words for words in wanted if not any(words in path.read_bytes() for path in files)}:
        assert time.monotonic() < end, missing
        time.sleep(0.1)  # what W&B has taken a process of its own writes
