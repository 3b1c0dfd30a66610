"""Scores reach TensorBoard at their checkpoint's step, each under one name, and only that of a run."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eval.pages.numbers import log_numbers

RESULTS = {"geneval": {"overall": {"value": 0.5}, "tags": {"colors": {"value": 0.25}}}, "fid": {"fid": 7.0}}


def test_scores_are_logged_at_their_step(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    for step in (10, 20):
        log_numbers(tmp_path, {"step": step, "results": RESULTS})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "eval")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/fid/fid", "eval/geneval/overall", "eval/geneval/tags/colors"]
    assert [(event.step, event.value) for event in events.Scalars("eval/fid/fid")] == [(10, 7.0), (20, 7.0)]


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    log_numbers(tmp_path, {"step": 1, "results": RESULTS})
    assert not list(tmp_path.iterdir())
