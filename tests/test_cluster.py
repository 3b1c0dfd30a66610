"""Decisions of the batch scripts: verdicts, bad nodes, the time budget."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests_launcher import ROOT

from trainer.checkpoint.folder import checkpoint_dir, list_checkpoints, step_of
from trainer.cluster import bad_nodes
from trainer.cluster.incidents import VARIABLE as INCIDENTS
from trainer.cluster.incidents import Incident, failure, read_incidents, record_incident
from trainer.cluster.outcome import VARIABLE, Outcome, Recorder
from trainer.cluster.verdict import has_lost_or_hung, last_words, newest_step, out_of_memory, settle, silent_nodes
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
    assert action(tmp_path, "halted") == "halt"
    assert action(tmp_path, "refused") == "refused"
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
    monkeypatch.setenv(INCIDENTS, str(tmp_path / "7.0.1.jsonl"))
    with pytest.raises(ConfigError), Recorder(rank=1).watching():
        raise ConfigError("no")
    assert Outcome.read(path) is None
    (found,) = read_incidents(tmp_path / "7.0.1.log")  # of a rank whose stderr nobody reads
    assert (found.kind, found.rank, found.sentence) == ("failed", 1, "ConfigError: no")
    monkeypatch.delenv(INCIDENTS)
    for error, kind, reason in (
        (ConfigError("mend it"), "refused", "mend it"),
        (OSError("disk"), "failed", "OSError: disk"),
    ):
        with pytest.raises(type(error)), Recorder(rank=0).watching():
            raise error
        assert Outcome.read(path) == Outcome(kind=kind, reason=reason)  # type: ignore[arg-type]
    Recorder(rank=0).record(Outcome(kind="stopped", step=4))
    assert Outcome.read(path) == Outcome(kind="stopped", step=4)


def lost(rank: int, node: str, reason: str, why: str) -> Incident:
    sentence = f"rank {rank} on node {node} is lost ({why})"
    return Incident(kind="lost_peer", rank=rank, node=node, reason=reason, sentence=sentence)


def noted(folder: Path, monkeypatch: pytest.MonkeyPatch, rank: int, *incidents: Incident) -> Path:
    """The log of a process that recorded incidents."""
    monkeypatch.setenv(INCIDENTS, str(folder / f"7.0.{rank}.jsonl"))
    for incident in incidents:
        record_incident(incident)
    log = folder / f"7.0.{rank}.log"
    log.write_text("step 1\nstep 2\n\n")
    return log


def test_last_words_name_the_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost peer before the error that follows, records before silence, which is quoted as it is."""
    broken = failure(1, RuntimeError("broken\nin two"))
    silent = lost(1, "n2", "silent", "silent for 60 s")
    logs = [
        noted(tmp_path, monkeypatch, 0),
        noted(tmp_path, monkeypatch, 1, broken),
        noted(tmp_path, monkeypatch, 2, silent, failure(2, RuntimeError("reset by peer"))),
    ]
    words = last_words(logs)
    assert words == [
        f"{tmp_path}/7.0.1.log: RuntimeError: broken in two",
        f"{tmp_path}/7.0.2.log: rank 1 on node n2 is lost (silent for 60 s)",
        f"{tmp_path}/7.0.0.log: no record of its end, last line: step 2",
    ]
    assert last_words(logs, most=2) == words[:2]
    with (tmp_path / "7.0.1.jsonl").open("a") as file:
        file.write('{"kind": "fai')  # killed while it wrote
    assert last_words(logs) == words and read_incidents(logs[1]) == [broken]


def test_last_words_of_a_process_that_hung_say_where(tmp_path: Path) -> None:
    code = "import os, signal\ndef stuck():\n    os.kill(os.getpid(), signal.SIGABRT)\nstuck()\n"
    (tmp_path / "program.py").write_text(code)
    log = tmp_path / "7.0.0.log"
    with log.open("w") as file:
        command = ["bash", "-c", "ulimit -c 0; exec $0 -X faulthandler program.py", sys.executable]
        subprocess.run(command, cwd=tmp_path, stderr=file, check=False)
    (words,) = last_words([log])
    assert words.startswith(f"{log}: ended as it hung in ") and words.endswith("line 3 in stuck")


def test_a_kill_by_the_memory_limit_is_named(tmp_path: Path) -> None:
    launcher, log = tmp_path / "7.0.launcher", tmp_path / "7.0.1.log"
    log.write_text("step 1\n")
    assert out_of_memory(launcher, [log]) == out_of_memory(None, []) == []
    launcher.write_text("srun: error: n2: task 1: Out Of Memory\nsrun: error: n3: tasks 2-3: Out Of Memory\n")
    (words,) = out_of_memory(launcher, [log])
    assert words.startswith("out of memory: the kernel ended process 1 on n2, process 2-3 on n3 at the job's limit: ")
    log.write_text("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\n")
    assert "the kernel ended a process at" in out_of_memory(None, [log])[0]


def test_nodes_that_fell_silent_or_hung_are_named_but_not_processes_that_crashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = noted(
        tmp_path, monkeypatch, 1, lost(0, "n1", "silent", "silent for 60 s"),
        lost(2, "b7-x", "silent", "silent for 60 s"), lost(3, "n4", "ended", "its process has ended"),
        lost(4, "n5", "unreachable", "No route to host"),
        lost(0, "a1", "hung", "hangs"), lost(-1, "", "hung", "all hang"),
    )  # fmt: skip
    assert silent_nodes([path, path, tmp_path / "7.0.9.log"]) == ["a1", "b7-x"]


def test_a_lost_or_hung_process_need_not_be_the_programs_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also rank 0, whose node is not left out. One that ended is, and so are all that hang together."""
    program = noted(tmp_path, monkeypatch, 1, lost(3, "n4", "ended", "its process has ended"),
                    lost(-1, "", "hung", "all hang"), failure(1, RuntimeError("reset by peer")))  # fmt: skip
    assert not has_lost_or_hung([program, tmp_path / "7.0.9.log"])
    for rank, reason in enumerate(("silent", "hung", "unreachable"), start=2):
        assert has_lost_or_hung([program, noted(tmp_path, monkeypatch, rank, lost(0, "n1", reason, "gone"))])


def test_a_record_outlives_a_kill_right_after(tmp_path: Path) -> None:
    code = (
        "import os, signal\nfrom trainer.cluster.incidents import failure, record_incident\n"
        "record_incident(failure(3, OSError('disk')))\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {INCIDENTS: str(tmp_path / "3.jsonl")}
    )
    assert done.returncode == -signal.SIGKILL
    (found,) = read_incidents(tmp_path / "3.log")
    assert (found.kind, found.rank, found.reason, found.sentence) == ("failed", 3, "OSError", "OSError: disk")


def run_code(code: str) -> "subprocess.CompletedProcess[str]":
    code = f"import ctypes, time\nfrom trainer.cluster.watchdog import end_within, time_limit\n{code}"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)


def test_limits_end_a_process_that_holds_the_interpreter() -> None:
    done = run_code("end_within(0.5)\nctypes.PyDLL(None).sleep(20)")
    assert done.returncode == 1 and "most recent call first" in done.stderr


def test_each_cause_has_its_limit_and_the_earliest_counts() -> None:
    done = run_code("end_within(0.3)\nwith time_limit(20):\n    time.sleep(0.6)\ntime.sleep(0.3)")
    assert done.returncode == 0, "a block's limit takes the place of one of the same cause, and goes with the block"
    done = run_code("end_within(0.5, 'lost peer')\nwith time_limit(0.1):\n    pass\ntime.sleep(20)")
    assert done.returncode == 1 and "most recent call first" in done.stderr


def test_what_scripts_ask_does_not_import_torch(tmp_path: Path) -> None:
    """Answers are wanted within a grace time."""
    for arguments, said in (
        (["verdict", str(tmp_path), "--outcome", str(tmp_path / "none"), "--job", "1"], "again\n"),
        (["exclude", str(tmp_path), "--available", "a,b", "--needed", "1"], "\n"),
    ):
        code = (
            f"import sys\nfrom trainer.cluster.__main__ import main\nmain({arguments})\n"
            "assert 'torch' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, said), done.stderr


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
