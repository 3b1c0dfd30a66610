"""Heartbeats: who is silent, who ended, who said goodbye; and what the others are told."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from trainer.cluster.heartbeat import Heartbeat
from trainer.cluster.incidents import Incident

SILENCE = 0.6


class Ring:
    """A main process and two others, in one."""

    def __init__(self) -> None:
        self.lost: dict[str, list[Incident]] = {name: [] for name in ("main", "one", "two")}
        self.beats = {name: Heartbeat(SILENCE, lost.append) for name, lost in self.lost.items()}
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
    assert "rank 0 on node 127.0.0.1 is lost (silent" in ring.told["one"][0]
