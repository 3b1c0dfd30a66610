"""A rank that lives and does not get on: named by rank and node, with stacks, in bounded time. Real runs, gloo."""

import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from hang_checks import CULPRIT, HANG_SECONDS, STEP, WAYS
from tests_launcher import Launcher

from trainer.cluster.incidents import Incident, read_incidents
from trainer.cluster.outcome import Outcome
from trainer.cluster.verdict import last_words, settle, silent_nodes

MUTE = ("stopped", "interpreter")  # a process whose heartbeat cannot run either


def end_of(ranks: "list[subprocess.Popen[bytes]]", expected: list[int]) -> dict[int, int]:
    """Exit codes of the ranks that must end by themselves; then the others are killed."""
    try:
        return {rank: ranks[rank].wait(150) for rank in expected}
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("how", WAYS)
def test_who_is_behind_is_named_with_stacks(launcher: Launcher, tmp_path: Path, how: str) -> None:
    ranks = launcher.start_ranks(3, "tests/hang_checks.py", str(tmp_path), how, log=tmp_path / "output")
    codes = end_of(ranks, [0, 2] if how in MUTE else [0, 1, 2])
    output = (tmp_path / "output").read_text()
    assert set(codes.values()) == {1}, output[-6000:]
    logs = [tmp_path / f"7.0.{rank}.log" for rank in codes]
    for log in logs:
        found = read_incidents(log)[0]
        check_incident(found, how)
        waited = found.time - float((tmp_path / "stalled").read_text())
        assert waited < 3 * HANG_SECONDS + 1, waited  # 1 s: two cores for three ranks
        stacks = log.with_suffix(".stacks").read_text()
        assert found.sentence in stacks and "most recent call first" in stacks
    outcome = Outcome.read(tmp_path / "outcome.json")
    assert outcome is not None and outcome.kind == "failed" and outcome.reason.startswith(f"rank {CULPRIT} on node n1")
    assert silent_nodes(logs) == ["n1"]
    assert settle(tmp_path / "run", outcome, job="7", told=True).action == "again"
    for log in logs:
        log.touch()
    assert all(f"rank {CULPRIT} on node n1" in words for words in last_words(logs))
    if how in MUTE:
        neighbour = (tmp_path / "7.0.2.stacks").read_text()
        assert f"rank {CULPRIT}, process {ranks[CULPRIT].pid}, cannot write its stacks; its state: " in neighbour
        assert ("state: stopped" in neighbour) == (how == "stopped")
        assert ("py-spy is not installed" in neighbour) == (shutil.which("py-spy") is None)
    else:
        assert "in stall\n" in (tmp_path / f"7.0.{CULPRIT}.stacks").read_text()
    assert "in stall\n" not in (tmp_path / "7.0.0.stacks").read_text()


def check_incident(found: Incident, how: str) -> None:
    assert (found.kind, found.rank, found.node) == ("lost_peer", CULPRIT, "n1"), found
    assert found.reason == ("silent" if how in MUTE else "hung")
    where = {"data": "data", "absent": "report"}.get(how, "")
    assert f"{where} of step {STEP - (how == 'data') - (how == 'absent')}" in found.sentence or how in MUTE, found
