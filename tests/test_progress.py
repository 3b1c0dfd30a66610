"""How long a phase may take, who of several processes is behind, and what noting phases costs a step."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from trainer.cluster.progress import Beat, Progress, judge
from trainer.config import ConfigError, load_config
from trainer.loop.loop import Trainer

AT_REPORT = Beat(
    rank=0, node="n0", pid=1, step=7, phase="report", moves=70, collectives=900, still=61.0, overdue=True
)  # fmt: skip


def beat(rank: int, **different: object) -> Beat:
    return replace(AT_REPORT, rank=rank, node=f"n{rank // 2}", **different)  # type: ignore[arg-type]


BEHIND = {"phase": "data", "moves": 69, "collectives": 899}
ON_TIME = {"still": 50.0, "overdue": False}
CASES = {  # beats, ranks that have stopped beating -> rank, node and reason, or nobody
    "nobody is overdue": ([beat(0, **ON_TIME), beat(1, **ON_TIME)], [], None),
    "fewer collectives": ([beat(0), beat(1), beat(2, **BEHIND), beat(3)], [], (2, "n1", "hung")),
    "the main process": ([beat(0, **BEHIND), beat(1)], [], (0, "n0", "hung")),
    "only the waiting are overdue": ([beat(0), beat(1, **BEHIND | ON_TIME)], [], (1, "n0", "hung")),
    "an earlier phase": ([beat(0), beat(1), beat(2, moves=69)], [], (2, "n1", "hung")),
    "more phases of fewer collectives": ([beat(0), beat(1, collectives=899, moves=72)], [], (1, "n0", "hung")),
    "a whole node": ([beat(0), beat(1), beat(2, **BEHIND), beat(3, **BEHIND)], [], (2, "n1", "hung")),
    "ranks of two nodes": ([beat(0), beat(1, **BEHIND), beat(2, **BEHIND), beat(3)], [], (1, "", "hung")),
    "all wait": ([beat(0), beat(1), beat(2), beat(3)], [], (-1, "", "hung")),
    "alone": ([beat(0)], [], (0, "n0", "hung")),
    "stopped": ([beat(0), beat(1), beat(2, still=1.0)], [2], (2, "n1", "silent")),
    "has just gone on": ([beat(0), beat(1, **BEHIND | {"still": 0.0, "overdue": False})], [], None),
    "compiles": ([beat(0), beat(1, **BEHIND | ON_TIME | {"phase": "compile"})], [], None),
    "compiles for too long": ([beat(0), beat(1, **BEHIND | {"phase": "compile"})], [], (1, "n0", "hung")),
    "leaves after an error": ([beat(0), beat(1, phase="leaving", collectives=899, overdue=False)], [], None),
}


@pytest.mark.parametrize("case", CASES)
def test_who_is_behind(case: str) -> None:
    beats, quiet, expected = CASES[case]
    found = judge(beats, quiet, interval=5.0)
    assert (found and (found.rank, found.node, found.reason)) == expected
    assert found is None or found.kind == "lost_peer"


def test_sentences_name_rank_node_and_phase() -> None:
    found = judge([beat(0), beat(1), beat(2, **BEHIND), beat(3, **BEHIND)], [], 5.0)
    assert found is not None and found.sentence == (
        "rank 2 on node n1 hangs in data of step 7 (no progress for 61 s), as do 1 more, the last of them rank 3; "
        "others are ahead, in report of step 7"
    )
    found = judge([beat(0), beat(1, phase="save")], [1], 5.0)
    assert found is not None and found.sentence.startswith("rank 1 on node n0 stopped beating in save (step 7) (no")


def test_limits_are_learned_from_normal_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress(60.0)
    first = progress.limit("start-up")
    assert first == progress.limit("forward") == progress.limit("save") == 1200
    now, limits = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    # Compiles; 10 s; 40 s; 5000 s, of which all but one beat suspended; a slow save.
    for kind, seconds, beats in (
        ("step", 500, 100),
        ("step", 10, 2),
        ("step", 40, 8),
        ("step", 5000, 1),
        ("save", 700, 140),
    ):
        with progress.within(kind):
            now[0] += seconds
            for _ in range(beats):
                progress.look(0, 5.0)
        limits.append(progress.limit("data"))
    assert limits == [1200, 60, 100, 100, 100]
    assert progress.limit("save") == 2.5 * 700 and progress.limit("leaving") == float("inf")
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "60")
    assert Progress(60.0).limit("start-up") == 3600


def test_a_compilation_is_no_part_of_a_normal_step(monkeypatch: pytest.MonkeyPatch) -> None:
    progress, now = Progress(60.0), [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def passes(seconds: int) -> None:
        now[0] += seconds
        for _ in range(seconds // 5):
            progress.look(0, 5.0)

    for compiling in (0, 0, 500):  # the first step is never normal
        with progress.within("step"):
            passes(40)
            with progress.within("compile"):
                passes(compiling)
    assert progress.limit("data") == 100, "2.5 times the 40 seconds of a step without it"
    assert progress.limit("compile") == 1250


def test_a_beat_counts_its_own_time() -> None:
    progress = Progress(2.0)
    progress.slowest["step"] = 0.0
    progress.enter("data")
    looks = [progress.look(3, 0.5) for _ in range(6)]
    assert [look.still for look in looks] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert [look.overdue for look in looks] == [False] * 4 + [True] * 2
    progress.enter("report")
    assert (progress.look(3, 0.5).still, progress.look(3, 0.5).phase) == (0.0, "report")
    off = Progress(0.0)
    assert not any(off.look(0, 1000.0).overdue for _ in range(3))


def test_a_step_pays_less_than_50_microseconds() -> None:
    """With 8 micro-batches, which enter 4 phases each; measured 3 to 12."""
    progress, fastest = Progress(60.0), float("inf")
    for _ in range(20):
        start = time.perf_counter()
        with progress.within("step"):
            for _ in range(8):
                for phase in ("data", "forward", "backward", "optimizer"):
                    progress.enter(phase)
            progress.enter("data")
            progress.enter("report")
        fastest = min(fastest, time.perf_counter() - start)
    assert fastest < 50e-6, fastest


@pytest.mark.parametrize("value", ["-1", "0.5", ".nan"])
def test_a_senseless_limit_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"train.hang_seconds is .*: use (1 or more, or 0 \(off\)|0 or more)"):
        load_config("debug", [f"train.hang_seconds={value}"])


@pytest.mark.parametrize("around,left_out", [("forward", 1), ("samples", 0)])
def test_a_compilation_gives_back_the_phase_that_it_interrupts(around: str, left_out: int) -> None:
    """In a grid of samples, too, whose whole time is left out of the speed already."""
    pauses: list[float] = []
    trainer = SimpleNamespace(progress=Progress(60.0), reporter=SimpleNamespace(pause=pauses.append))
    trainer.progress.enter(around)
    with Trainer._compiling(trainer):  # type: ignore[arg-type]
        assert trainer.progress.phase == "compile"
    assert trainer.progress.phase == around and len(pauses) == left_out
