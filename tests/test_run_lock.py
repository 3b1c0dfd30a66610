"""The lease on a run folder: refused, handed over, taken from the dead, lost. Real processes hold it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests_launcher import ROOT, Launcher

from trainer.config import ConfigError
from trainer.loop.run_lock import Holder, RunLock

LEASE = 1.5
# Another host is another name: the lease's marker then says nothing about processes here.
HOLD = """
import os, socket, sys, time
if sys.argv[3]:
    socket.gethostname = lambda: sys.argv[3]
from pathlib import Path
from trainer.loop.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]), float(sys.argv[2]))
lock.acquire()
print("held", flush=True)
while not lock.lost:
    time.sleep(0.01)
print("lost", flush=True)
print(time.monotonic(), flush=True)
time.sleep(60)
"""


@contextmanager
def held(run_dir: Path, host: str = "", lease: float = LEASE, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the folder, as if on another host if named."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir), str(lease), host],
        cwd=ROOT, env=Launcher().environment() | environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def contents(run_dir: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in run_dir.iterdir()}


def test_taken_given_back_and_taken_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "new" / "run"
    for _ in range(2):
        lock = RunLock(run_dir, LEASE)
        lock.acquire()
        assert lock.holder() == Holder(since=json.loads(lock.record.read_text())["since"]) and not lock.lost
        lock.release()
        assert not list(run_dir.iterdir())
    RunLock(run_dir, LEASE).release()  # a process that never held it


def test_a_live_holder_on_this_host_is_named_at_once(tmp_path: Path) -> None:
    with held(tmp_path, SLURM_JOB_ID="77", SLURM_RESTART_COUNT="2") as process:
        before, start = contents(tmp_path), time.monotonic()
        with pytest.raises(
            ConfigError, match=rf"in use by process {process.pid} on .*, Slurm job 77 since 20"
        ) as error:
            RunLock(tmp_path, LEASE).acquire()
        assert time.monotonic() - start < 0.5 and "\n" not in str(error.value)
        assert contents(tmp_path) == before


def test_a_dead_holder_on_this_host_does_not_keep_it(tmp_path: Path) -> None:
    with held(tmp_path) as process:
        process.kill()
        process.wait()
        start = time.monotonic()
        lock = RunLock(tmp_path, LEASE)
        lock.acquire()
        assert time.monotonic() - start < 0.5
        lock.release()


def test_a_zombie_does_not_keep_it(tmp_path: Path) -> None:
    """A killed process whose parent does not wait for it: nothing renews its lease."""
    with held(tmp_path) as process:
        process.kill()
        while ") Z " not in Path(f"/proc/{process.pid}/stat").read_text():
            time.sleep(0.01)
        lock = RunLock(tmp_path, LEASE)
        lock.acquire()
        lock.release()


def test_another_host_keeps_it_while_it_renews(tmp_path: Path) -> None:
    with held(tmp_path, host="elsewhere") as process:
        start = time.monotonic()
        with pytest.raises(ConfigError, match=f"in use by process {process.pid} on elsewhere"):
            RunLock(tmp_path, LEASE).acquire()
        assert time.monotonic() - start < LEASE
        process.kill()
        process.wait()
        start = time.monotonic()
        lock = RunLock(tmp_path, LEASE)
        lock.acquire()
        assert LEASE * 0.5 < time.monotonic() - start < 2 * LEASE
        lock.release()


def test_a_requeued_job_takes_over_from_its_earlier_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a node out of Slurm's sight, too, where it goes on: it has lost the folder before the later one begins."""
    lease = 4 * LEASE  # a renewal a second: the machine may be busy
    with held(tmp_path, host="elsewhere", lease=lease, SLURM_JOB_ID="77") as process:
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        with pytest.raises(ConfigError, match=f"process {process.pid} on elsewhere, Slurm job 77"):
            RunLock(tmp_path, lease).acquire()  # the same start of the job
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        lock, start = RunLock(tmp_path, lease), time.monotonic()
        lock.acquire()
        began = time.monotonic()
        assert began - start < 1 + lease * 0.375
        assert process.stdout is not None and process.stdout.readline() == "lost\n"
        assert float(process.stdout.readline()) < began + 0.5, "it knew it when the later one began"
        holder = lock.holder()
        assert holder is not None and holder.pid == os.getpid() and holder.restart == 1
        lock.release()


def test_the_loser_of_a_lease_notices_and_leaves_the_new_holder_alone(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path, LEASE), RunLock(tmp_path, LEASE)
    first.acquire()
    second.lease.force_break()
    second.acquire()
    deadline = time.monotonic() + 10
    while not first.lost and time.monotonic() < deadline:
        time.sleep(0.05)
    assert first.lost and not second.lost
    first.release()
    assert second.holder() is not None and second.marker.exists()
    second.release()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir=.*file/run cannot be written"):
        RunLock(tmp_path / "file" / "run", LEASE).acquire()
