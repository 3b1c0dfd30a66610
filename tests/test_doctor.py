"""The doctor's judgement on made-up facts, its pairing of nodes, and its command line on this machine."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from trainer.cluster.facts import Facts, check_disk
from trainer.cluster.health import judge_network, judge_nodes, table
from trainer.cluster.network import MAX_ROUNDS, Network, rounds
from trainer.doctor import main
from trainer.plan.memory import MemoryNeed


def healthy(num_nodes: int = 3) -> list[Facts]:
    return [
        Facts(rank=rank, node=f"n{rank // 2}", device="H100", driver="1", versions={"torch": "2"})
        for rank in range(2 * num_nodes)
    ]


def network(num_nodes: int = 3) -> Network:
    pair = {a: {b: 10.0 for b in range(num_nodes) if b != a} for a in range(num_nodes)}
    return Network(wrong=[], all_reduce=1, all_to_all=1, pair=pair, clock=[100.0] * (2 * num_nodes))


def test_healthy_nodes_are_sound() -> None:
    assert judge_nodes(healthy(), {}).is_sound and judge_network(healthy(), network()).is_sound


def test_one_nodes_problem_is_its_own_and_everyones_is_nobodys() -> None:
    facts = healthy()
    facts[2] = replace(facts[2], problems=["no GPU"])
    assert judge_nodes(facts, {}).bad == {"n1": "no GPU"}
    assert judge_nodes(facts, {}).sentences() == ["fix: node n1: no GPU"]
    found = judge_nodes([replace(fact, problems=["no data"]) for fact in facts], {})
    assert (found.bad, found.general) == ({}, ["no data"])
    assert judge_nodes([replace(facts[0], problems=["no data"])], {}).bad == {}, "one node has no others to blame"


def test_missing_processes_and_other_versions_are_named() -> None:
    facts = healthy()
    assert "process 5 did not report" in judge_nodes(facts[:5], {5: "n2"}).bad["n2"]
    facts[4] = replace(facts[4], versions={"torch": "1"})
    assert judge_nodes(facts, {}).bad == {"n2": "torch is 1, elsewhere 2: install the same"}


def test_warnings_are_said_once_and_end_nothing() -> None:
    facts = [replace(fact, warnings=["tight"]) for fact in healthy()]
    for found in (judge_nodes(facts, {}), judge_network(facts, network())):
        assert found.is_sound and found.warnings == ["tight"]


def test_memory_state_that_does_not_fit_is_a_problem_and_a_peak_a_warning() -> None:
    need = MemoryNeed(layout="ep_size 8", state=40e9, peak=70e9)
    assert not need.problem(80e9) and not need.warning(80e9)
    assert not need.problem(60e9) and "needs about 70.0 GB at its peak (ep_size 8), more" in need.warning(60e9)
    assert "needs 40.0 GB of weights" in need.problem(30e9) and not need.warning(30e9)
    assert need.problem(30e9) == need.problem(20e9), "one sentence of all nodes is no node's fault"


def test_slow_links_clocks_and_wrong_sums_are_named() -> None:
    facts, slow = healthy(), network()
    for share, bad, num_warnings in ((0.4, set[str](), 1), (0.1, {"n1"}, 0)):
        slow.pair.update({1: {0: 10 * share, 2: 10 * share}})
        slow.pair[0][1] = slow.pair[2][1] = 10 * share
        found = judge_network(facts, replace(slow, pair={**slow.pair, 0: {2: 10.0}, 2: {0: 10.0}}))
        assert found.bad.keys() == bad and len(found.warnings) == num_warnings
    clock = [100.0] * 6
    clock[4] = 107.0
    assert judge_network(facts, replace(network(), clock=clock)).bad == {
        "n2": "its clock is +7.0 s off the others': synchronise it"
    }
    wrong = judge_network(facts, replace(network(), wrong=["rank 1: all-reduce gave 2"]))
    assert not wrong.is_sound and "bad" not in "\n".join(table(facts, network(), wrong))


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 6, 7])
def test_every_pair_meets_once(num_nodes: int) -> None:
    plan = rounds(num_nodes)
    met = [tuple(sorted(pair)) for pairs in plan for pair in pairs]
    assert sorted(met) == list(combinations(range(num_nodes), 2))
    assert all(len({node for pair in pairs for node in pair}) == 2 * len(pairs) for pairs in plan)
    assert len(rounds(64)) == MAX_ROUNDS


def test_disk_checks_leave_nothing(tmp_path: Path) -> None:
    free, speed = check_disk(tmp_path / "runs" / "new")
    assert free > 0 and speed > 0 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_command_line(launcher: Any, tmp_path: Path) -> None:
    """One process; tests/test_slurm.py has four."""
    done = launcher.run("-m", "trainer.doctor", "debug", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 0 and "\nsound, checked 1 processes" in done.stdout, done.stderr[-2000:]
    assert not list(tmp_path.iterdir())
    done = launcher.run("-m", "trainer.doctor", "debug", f"run_dir={tmp_path}", "train.micro_batch_size=100000")
    assert done.returncode == 1 and "fix: train.micro_batch_size=100000" in done.stdout
    huge = ("model.dim=16384", "model.num_layers=64")
    done = launcher.run("-m", "trainer.doctor", "debug", f"run_dir={tmp_path}", *huge)
    assert done.returncode == 1 and "fix: a process needs" in done.stdout, done.stdout


def test_only_the_configuration_is_checked(launcher: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As the batch scripts ask before a start: nothing is written, mistakes are one sentence."""
    run = f"run_dir={tmp_path / 'run'}"
    done = launcher.run("-m", "trainer.doctor", "--only-config", "debug", run, "data.images=pictures")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'run'}\npictures\n"), done.stderr[-2000:]
    command = ["--only-config", "--world-size", "2", "--local-size", "1", "debug", run]
    main(command)
    assert capfd.readouterr().out.splitlines()[0] == str(tmp_path / "run")
    with pytest.raises(SystemExit, match="2"):
        main([*command, "parallel.ep_size=4"])
    assert "error: parallel.ep_size=4 does not divide the number of processes" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    with pytest.raises(SystemExit, match="2"):
        main(command)
    said = f"error: {tmp_path}/run/stop asks this run to stop: remove the file, then start it again\n"
    assert capfd.readouterr().err == said
