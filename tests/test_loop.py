"""The loop under faults: `loop_checks.py` on two processes, and signals and the lock on the command line."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from tests_launcher import ROOT, Checked, Launcher, asked_checks, metrics, run_checks

MODULE = ("-m", "trainer.train", "debug")
TINY = ("model.dim=16", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "data.image_size=8")
CHECKS = (
    "skipped_steps_leave_no_trace",
    "going_back_goes_on_past_the_bad_samples",
    "going_back_has_an_end",
    "an_error_in_one_ranks_data_saves_on_all",
    "an_error_in_the_grid_saves_the_weights_not_the_average",
    "a_lost_lock_ends_the_run_unsaved",
    "ranks_agree_on_errors",
)


@pytest.fixture(scope="module")
def checked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checked:
    """All checks in one start of two processes."""
    return run_checks("tests/loop_checks.py", asked_checks(request, CHECKS), str(tmp_path_factory.mktemp("loop")))


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_holds_on_two_processes(checked: Checked, check: str) -> None:
    assert not checked.problems[check], checked.problems[check]


@pytest.mark.slow
def test_a_rank_that_cannot_go_on_ends_the_others(launcher: Launcher, tmp_path: Path) -> None:
    """Nothing can be saved when one rank is stuck in collective work; all end soon, with the error that began it."""
    check = "one_ranks_grid_fails_while_the_other_draws"
    done = launcher.run("tests/loop_checks.py", str(tmp_path), check, processes=2, timeout=120)
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stderr and "rank 1 failed while others went on" in done.stderr
    assert not list(tmp_path.rglob("step_*"))


def wait_for(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_second_job_is_refused_and_ctrl_c_saves(launcher: Launcher, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = (*MODULE, f"run_dir={run_dir}", *TINY, "train.max_steps=100000", "train.checkpoint_every=0")
    process = launcher.start(*arguments)
    wait_for(lambda: metrics(run_dir))
    log = (run_dir / "train.log").read_text()
    second = launcher.start_ranks(2, *arguments, log=tmp_path / "second.log")
    assert [rank.wait(120) for rank in second] == [2, 2]
    said = [line for line in (tmp_path / "second.log").read_text().splitlines() if line.startswith("error: ")]
    (sentence,) = said
    assert f"run_dir={run_dir} is in use by process {process.pid} on" in sentence and " since 20" in sentence
    assert (run_dir / "train.log").read_text().startswith(log)
    assert "resuming" not in (run_dir / "train.log").read_text()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    step = metrics(run_dir)[-1]["step"]
    assert f"ended after step {step} of 100000 (stop signal)" in (run_dir / "train.log").read_text()
    assert (run_dir / "checkpoints" / f"step_{step:08d}").is_dir()
    assert not list(run_dir.glob("run.lock*"))


@pytest.mark.slow
def test_files_save_and_stop_a_run(launcher: Launcher, tmp_path: Path) -> None:
    """For those who cannot signal it. Two processes, of which the first alone looks; `stop` stays, for later starts."""
    run_dir = tmp_path / "run"
    settings = (*TINY, "train.max_steps=100000", "train.checkpoint_every=0", "train.async_save=true")
    process = launcher.start(*MODULE, f"run_dir={run_dir}", *settings, processes=2)
    wait_for(lambda: metrics(run_dir))
    (run_dir / "save").touch()
    wait_for(lambda: not (run_dir / "save").exists())
    (saved,) = (run_dir / "checkpoints").glob("step_????????")
    wait_for(lambda: metrics(run_dir)[-1]["step"] > int(saved.name[5:]))
    assert len(list((run_dir / "checkpoints").glob("step_*"))) == 1, "asked once, saved once"
    (run_dir / "stop").touch()
    assert process.wait(60) == 0
    step = metrics(run_dir)[-1]["step"]
    log = (run_dir / "train.log").read_text()
    assert f"ended after step {step} of 100000 (RUN/stop)" in log
    assert (run_dir / "checkpoints" / f"step_{step:08d}").is_dir()
    done = launcher.run(*MODULE, f"run_dir={run_dir}", *settings, processes=2)
    assert done.returncode != 0 and (run_dir / "train.log").read_text() == log, "torchrun's code is its own"
    assert done.stderr.count(f"error: {run_dir}/stop asks this run to stop: remove the file, then start it again") == 1


@pytest.mark.slow
def test_signals_before_the_first_step(launcher: Launcher, tmp_path: Path) -> None:
    """A task that was started with the signal ignored, and is signalled from then on, ends by itself with code 0.

    A second Ctrl-C ends another one at once. Neither has anything to save.
    """
    command = launcher.command(*MODULE, f"run_dir={tmp_path / 'run'}", *TINY, "train.max_steps=100000")
    shell = ["bash", "-c", 'trap "" USR1; exec "$@"', "-", *command]
    environment = launcher.environment() | {"DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(shell, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    time.sleep(0.2)  # until bash has run its trap
    while process.poll() is None:
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
    assert process.returncode == 0 and process.stdout is not None
    assert "ended after step 0 of 100000 (stop signal)" in process.stdout.read()
    other = launcher.start(*MODULE, f"run_dir={tmp_path / 'other'}", *TINY, "train.max_steps=100000")
    wait_for(lambda: (tmp_path / "other" / "run.lock").exists())  # in the middle of its start
    for _ in range(2):
        other.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert other.wait(10) == -signal.SIGINT
    assert not list((tmp_path / "other").rglob("step_*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP, signal.SIGKILL])
def test_what_ends_torchrun_saves_the_run(launcher: Launcher, tmp_path: Path, number: signal.Signals) -> None:
    """SIGHUP is passed on to the workers; of the others torchrun dies, which they notice."""
    run_dir = tmp_path / "run"
    arguments = (*MODULE, f"run_dir={run_dir}", *TINY, "train.max_steps=100000", "train.checkpoint_every=0")
    torchrun = launcher.start(*arguments, processes=2)
    wait_for(lambda: metrics(run_dir))
    torchrun.send_signal(number)
    assert torchrun.wait(60) != 0
    wait_for(lambda: not list(run_dir.glob("run.lock*")))
    step = metrics(run_dir)[-1]["step"]
    assert (run_dir / "checkpoints" / f"step_{step:08d}").is_dir()
    assert f"ended after step {step} of 100000 (stop signal)" in (run_dir / "train.log").read_text()


@pytest.mark.slow
def test_a_dead_rank_ends_the_other(launcher: Launcher, tmp_path: Path) -> None:
    """Without a launcher that would end the others: they notice by themselves."""
    run_dir = tmp_path / "run"
    arguments = (*MODULE, f"run_dir={run_dir}", *TINY, "train.max_steps=100000", "train.checkpoint_every=0")
    ranks = launcher.start_ranks(2, *arguments)
    wait_for(lambda: metrics(run_dir))
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert ranks[1].wait(10) == -signal.SIGKILL
    assert ranks[0].wait(60) == 1
    assert not list(run_dir.rglob("step_*"))
