"""Heartbeats: who is silent, who ended, who said goodbye; and what the others are told."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests_launcher import ROOT

from trainer.cluster.heartbeat import Heartbeat
from trainer.cluster.incidents import VARIABLE, Incident
from trainer.cluster.progress import Progress
from trainer.cluster.verdict import silent_nodes

SILENCE = 0.6


class Ring:
    """A main process and two others, in one."""

    def __init__(self, silence: float = SILENCE) -> None:
        self.lost: dict[str, list[Incident]] = {name: [] for name in ("main", "one", "two")}
        self.progress = {name: Progress(1.0) for name in self.lost}
        self.beats = {name: Heartbeat(silence, lost.append, self.progress[name]) for name, lost in self.lost.items()}
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        self.beats["main"].serve(listener)
        for rank, name in ((1, "one"), (2, "two")):
            self.beats[name].join(rank, "127.0.0.1", port)
        time.sleep(0.1)

    @property
    def told(self) -> dict[str, list[str]]:
        return {name: [incident.sentence for incident in lost] for name, lost in self.lost.items()}

    def wait(self, *names: str) -> None:
        end = time.time() + 5
        while not all(self.told[name] for name in names) and time.time() < end:
            time.sleep(0.02)


@pytest.fixture
def ring() -> Iterator[Ring]:
    found = Ring()
    yield found
    for name in ("one", "two", "main"):
        if not found.beats[name].loop.is_closed():
            found.beats[name].close(farewell=True)


def test_all_alive_and_goodbyes_say_nothing(ring: Ring, caplog: pytest.LogCaptureFixture) -> None:
    time.sleep(2 * SILENCE)
    ring.beats["two"].close(farewell=True)
    ring.beats["main"].close(farewell=True)
    time.sleep(2 * SILENCE)
    assert not any(ring.told.values()) and not caplog.records, ring.told


def test_an_ended_process_is_named_to_all(ring: Ring) -> None:
    ring.beats["two"].close(farewell=False)
    ring.wait("main", "one")
    expected = f"rank 2 on node {socket.gethostname()} is lost (its process has ended)"
    assert ring.told["main"] == ring.told["one"] == [expected]
    (found,) = ring.lost["one"]
    assert (found.kind, found.rank, found.node, found.reason) == ("lost_peer", 2, socket.gethostname(), "ended")


def test_a_silent_process_is_named_to_all(ring: Ring) -> None:
    release = threading.Event()
    ring.beats["two"].loop.call_soon_threadsafe(release.wait)  # as a stopped process: the connection stays open
    ring.wait("main", "one")
    release.set()
    assert "rank 2" in ring.told["main"][0] and "silent for 1 s" in ring.told["main"][0]
    assert ring.told["one"] == ring.told["main"] and ring.lost["one"] == ring.lost["main"]
    assert ring.lost["main"][0].reason == "silent"


def test_a_silent_main_process_is_named(ring: Ring) -> None:
    release = threading.Event()
    ring.beats["main"].loop.call_soon_threadsafe(release.wait)
    ring.wait("one", "two")
    release.set()
    assert f"rank 0 on node {socket.gethostname()} is lost (silent" in ring.told["one"][0]


def test_a_main_process_that_hangs_with_its_heartbeat_is_named_before_its_silence_is_over() -> None:
    ring, release = Ring(silence=60.0), threading.Event()
    for progress in ring.progress.values():
        for _ in range(2):
            with progress.within("step"):
                progress.enter("data")
    ring.beats["main"].loop.call_soon_threadsafe(release.wait)
    ring.wait("one", "two")
    release.set()
    for name in ("one", "two", "main"):
        ring.beats[name].close(farewell=True)
    assert ring.told["one"][0].startswith(f"rank 0 on node {socket.gethostname()} stopped beating in ")
    assert ring.lost["one"][0].reason == "silent" and ring.told["two"]


def test_a_process_that_lives_and_does_not_get_on_is_named_to_all(ring: Ring) -> None:
    """It entered fewer phases than those that wait; all of them stand still for longer than a step may take."""
    for progress in ring.progress.values():
        for _ in range(2):
            with progress.within("step"):
                progress.enter("data")
    ring.progress["main"].enter("report")
    ring.progress["one"].enter("report")
    ring.wait("main", "one", "two")
    (found,) = ring.lost["main"]
    assert (found.rank, found.node, found.pid, found.reason) == (2, socket.gethostname(), os.getpid(), "hung")
    assert " hangs in data of step 0 (no progress for 1 s); others are ahead, in report of step 0" in found.sentence
    assert ring.lost["one"] == ring.lost["two"] == [found]


def test_the_only_process_is_watched_too() -> None:
    lost: list[Incident] = []
    progress = Progress(1.0)
    progress.slowest["step"] = 0.0
    heartbeat = Heartbeat(SILENCE, lost.append, progress)
    heartbeat.watch_self()
    progress.enter("data")
    time.sleep(0.8)
    progress.enter("forward")  # it goes on
    time.sleep(0.8)
    assert not lost
    time.sleep(0.8)
    heartbeat.close(farewell=True)
    assert [found.sentence for found in lost] == [
        f"rank 0 on node {socket.gethostname()} hangs in forward of step 0 (no progress for 1 s)"
    ]


def test_a_loss_is_logged_and_recorded_and_ends_a_process_that_hangs(tmp_path: Path) -> None:
    """The record is there although the process never gets to an error of its own; verdict reads it back."""
    code = (
        "import logging, time\nfrom trainer.cluster import heartbeat\nlogging.basicConfig()\n"
        "heartbeat.GRACE_SECONDS = 0.5\nheartbeat.end_soon(heartbeat._lost(2, 'n7', 'silent', 'silent for 60 s'))\n"
        "time.sleep(60)\n"
    )
    variables = os.environ | {VARIABLE: str(tmp_path / "7.0.1.jsonl")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 1 and "most recent call first" in done.stderr
    assert "rank 2 on node n7 is lost (silent for 60 s): this process ends within" in done.stderr
    assert silent_nodes([tmp_path / "7.0.0.log", tmp_path / "7.0.1.log"]) == ["n7"]
