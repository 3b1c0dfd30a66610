"""Decisions of the batch scripts: verdicts, bad nodes, the time budget."""

import time
from pathlib import Path

import pytest

from trainer.checkpoint.folder import checkpoint_dir, list_checkpoints, step_of
from trainer.cluster import bad_nodes
from trainer.cluster.outcome import VARIABLE, Outcome, Recorder
from trainer.cluster.verdict import last_words, newest_step, settle, silent_nodes
from trainer.config import ConfigError
from trainer.loop.time_budget import TimeBudget


def checkpoint(run_dir: Path, step: int) -> None:
    checkpoint_dir(run_dir, step).mkdir(parents=True)


def test_the_newest_checkpoint_is_found_as_the_trainer_finds_it(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == -1
    for name in ("step_00000010", "step_00000007", "step_00000012.tmp", "step_x", "latest"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 10 == step_of(list_checkpoints(tmp_path / "checkpoints")[-1])


def action(run_dir: Path, kind: str | None, *, job: str = "7", told: bool = False) -> str:
    outcome = None if kind is None else Outcome(kind=kind, reason="words")  # type: ignore[arg-type]
    return settle(run_dir, outcome, job=job, told=told).action


def test_ends_that_are_no_failures(tmp_path: Path) -> None:
    assert action(tmp_path, "finished") == "done"
    assert action(tmp_path, "refused") == "fail"
    assert [action(tmp_path, "stopped") for _ in range(9)] == ["again"] * 9
    assert not list(tmp_path.iterdir())


def test_two_failures_at_one_step_are_enough(tmp_path: Path) -> None:
    assert [action(tmp_path, "failed"), action(tmp_path, None)] == ["again", "fail"]
    assert action(tmp_path, "failed", job="8") == "again", "a new job begins anew"
    for step in (5, 6):
        checkpoint(tmp_path, step)
        assert action(tmp_path, "failed", job="8") == "again"
    found = settle(tmp_path, Outcome(kind="failed", reason="OSError: words"), job="8", told=False)
    assert found.action == "fail"
    assert found.sentence == "failed (OSError: words) 2 times in a row at the checkpoint of step 6: giving up"


def test_being_told_too_late_is_forgiven_four_times(tmp_path: Path) -> None:
    assert [action(tmp_path, None, told=True) for _ in range(5)] == ["again"] * 4 + ["fail"]


def test_outcomes_are_taken_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "outcome"
    monkeypatch.setenv(VARIABLE, str(path))
    with pytest.raises(ConfigError), Recorder(is_main=False).watching():
        raise ConfigError("no")
    assert Outcome.read(path) is None
    for error, kind, reason in (
        (ConfigError("mend it"), "refused", "mend it"),
        (OSError("disk"), "failed", "OSError: disk"),
    ):
        with pytest.raises(type(error)), Recorder(is_main=True).watching():
            raise error
        assert Outcome.read(path) == Outcome(kind=kind, reason=reason)  # type: ignore[arg-type]
    Recorder(is_main=True).record(Outcome(kind="stopped", step=4))
    assert Outcome.read(path) == Outcome(kind="stopped", step=4)


def test_last_words_name_the_rank(tmp_path: Path) -> None:
    (tmp_path / "7.0.0.log").write_text("step 1\nstep 2\n")
    (tmp_path / "7.0.1.log").write_text("step 1\nRuntimeError: broken\n\n")
    (tmp_path / "7.0.2.log").write_text("rank 1 on node n2 is lost (silent for 60 s)\nRuntimeError: reset by peer\n")
    assert last_words(sorted(tmp_path.iterdir())) == [
        f"{tmp_path}/7.0.1.log: RuntimeError: broken",
        f"{tmp_path}/7.0.2.log: rank 1 on node n2 is lost (silent for 60 s)",
    ]


def test_nodes_that_fell_silent_are_named_but_not_processes_that_crashed(tmp_path: Path) -> None:
    path = tmp_path / "7.0.1.log"
    path.write_text(
        "rank 0 on node n1 is lost (silent for 60 s): this process\nrank 2 on node b7-x is lost (silent for 60 s)\n"
        "rank 3 on node n4 is lost (its process has ended): this process ends\n"
    )
    assert silent_nodes([path, path]) == ["b7-x"]


def test_bad_nodes_expire_and_never_starve_a_job(tmp_path: Path) -> None:
    assert bad_nodes.excluded(tmp_path, ["a", "b", "c"], 2) == []
    bad_nodes.add(tmp_path, "c", "long ago", hours=-1)
    bad_nodes.add(tmp_path, "a", "no GPU at all", hours=1)
    assert bad_nodes.excluded(tmp_path, ["a", "b", "c"], 2) == ["a"]
    bad_nodes.add(tmp_path, "b", "slow", hours=2)
    assert bad_nodes.excluded(tmp_path, ["a", "b", "c"], 1) == ["a", "b"]
    assert bad_nodes.excluded(tmp_path, ["a", "b", "c"], 2) == ["b"], "the newest finding counts most"
    assert bad_nodes.excluded(tmp_path, ["a", "b"], 2) == []


def test_the_time_budget_ends_before_the_save_would_not_fit() -> None:
    assert not TimeBudget().is_spent()
    assert not TimeBudget(deadline=time.time() - 100).is_spent(), "each start does at least one step"
    budget = TimeBudget(deadline=time.time() + 100, margin=20)
    budget.stepped(2)
    budget.saved(30)
    budget.saved(10)
    assert budget.needed == 1.5 * 32 + 20 and not budget.is_spent()
    budget.saved(60)
    assert budget.is_spent()
