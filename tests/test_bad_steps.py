"""What the record of skipped steps and roll-backs says to a run that starts again."""

import json
from pathlib import Path
from typing import Any

from trainer.data.position import DataState
from trainer.loop.bad_steps import BadSteps, Event, count_rollbacks, count_streak, position_after_rollback, read_events

BATCH = 8


def at(samples_seen: int) -> DataState:
    return DataState(seed=0, epoch=0, consumed=samples_seen, samples_seen=samples_seen)


def skip(step: int, samples_seen: int) -> Event:
    return Event(kind="skip", step=step, data=at(samples_seen))


def rollback(step: int, samples_seen: int) -> Event:
    return Event(kind="rollback", step=step, data=at(samples_seen))


def test_position_is_the_furthest_rollback_to_this_checkpoint() -> None:
    events = [skip(5, 40), rollback(4, 48), skip(5, 56), rollback(4, 64), rollback(6, 90)]
    assert position_after_rollback(events, 4, at(32)) == at(64)
    assert position_after_rollback(events, 4, at(72)) == at(72)
    assert position_after_rollback(events, 5, at(40)) == at(40)
    assert count_rollbacks(events, 4) == 2 and count_rollbacks(events, 5) == 0


def test_streak_is_unbroken_and_ends_here() -> None:
    events = [skip(3, 16), skip(4, 32), skip(4, 40)]
    assert count_streak(events, at(40), BATCH) == 2
    assert count_streak(events, at(48), BATCH) == 0
    assert count_streak([*events, rollback(2, 40)], at(40), BATCH) == 0
    assert count_streak([], at(0), BATCH) == 0


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_file_is_written_reread_and_cut_at_the_resumed_position(tmp_path: Path) -> None:
    path = tmp_path / "bad_steps.jsonl"
    assert read_events(path) == []
    bad = BadSteps(path, [], at(0), BATCH)
    silent = BadSteps(None, [], at(0), BATCH)
    for event in (skip(2, 16), skip(2, 24), rollback(1, 24), skip(2, 40), skip(2, 48)):
        for one in (bad, silent):
            one.record(event, samples=[1, 2])
    assert (
        bad.events == silent.events and bad.num_skipped == silent.num_skipped == 4 and bad.streak == silent.streak == 2
    )
    assert lines(path)[0] | {"time": ""} == {
        "kind": "skip", "step": 2, "data": {"seed": 0, "epoch": 0, "consumed": 16, "samples_seen": 16},
        "time": "", "samples": [1, 2],
    }  # fmt: skip
    with path.open("a") as file:
        file.write('{"kind": "sk')  # a killed process
    again = BadSteps(path, read_events(path), at(40), BATCH)
    assert again.events == bad.events[:4] and again.streak == 1 and again.num_skipped == 3
    assert read_events(path) == again.events and len(lines(path)) == 4
    again.step_applied()
    assert again.streak == 0
