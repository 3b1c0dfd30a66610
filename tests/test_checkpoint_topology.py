"""One trajectory over any topology: the oracle of saving and loading, in few starts of many processes.

Each load asserts, on real DeepSpeed: hashes of all full logical tensors (weights, average, both moments) equal
those of the origin, step counters and hyper-parameters of the optimizer right after loading, pieces where
`layout_places` says, the next ten losses within 1e-5 of the unbroken run, and all bitwise on the topology that
saved.
"""

from functools import cache
from pathlib import Path

import pytest
from tests_launcher import Checked, run_checks

pytestmark = pytest.mark.slow

ROUTER = "moe.router=diffmoe moe.pool=batch moe.num_shared_experts=1 moe.router_input=unmodulated"
BF16 = "train.precision=bf16"
# Starts: number of processes, starts that they go on from, commands. Unbroken runs with checkpoints are `two` of two
# processes, `four3` and `four2` of four.
STARTS: dict[str, tuple[int, tuple[str, ...], list[str]]] = {
    "begin": (2, (), ["save two 1 3"]),
    "four": (4, ("begin",), [
        "save four3 2 3", "save four2 2 2", "repeat four3 2 3", "repeat four2 2 2", "load four3 4 3", "load two 4 3",
        "load four3 4 2", "load four2 4 3",
    ]),
    "two": (2, ("four",), [
        "load four3 2 3", "load four3 1 3", "load four2 2 2", "load four2 1 1", "load four3 2 offload",
    ]),
    "one": (1, ("four",), ["load four3 1 3", "load four2 1 2"]),
    "router": (2, (), [f"save d 2 3 {ROUTER}", f"repeat d 2 3 {ROUTER}", f"load d 1 2 {ROUTER}"]),
    "bf16": (2, (), [
        f"save bf 2 3 {BF16}", f"repeat bf 2 3 {BF16}", f"save background 2 3 {BF16} train.async_save=true",
        "same bf background",
    ]),
}  # fmt: skip
CASES = [(start, command) for start, (_, _, commands) in STARTS.items() for command in commands]


class Starts:
    """Runs each start once, when a test first asks for one of its commands, after those that it builds on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checked = cache(self._run)

    def _run(self, name: str) -> Checked:
        processes, earlier, commands = STARTS[name]
        for needed in earlier:
            self.checked(needed)
        return run_checks("tests/checkpoint_checks.py", commands, str(self.folder), processes=processes, timeout=400)


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Starts:
    """One folder for all starts."""
    return Starts(tmp_path_factory.mktemp("topology"))


@pytest.mark.parametrize("start,command", CASES, ids=[f"{start}: {command[:26]}" for start, command in CASES])
def test_goes_on(starts: Starts, start: str, command: str) -> None:
    problem = starts.checked(start).problems[command]
    assert not problem, problem


def test_background_saves_copy_every_checkpoint(starts: Starts) -> None:
    starts.checked("bf16")
    log = (starts.folder / "background" / "train.log").read_text()
    assert log.count("copied step") == log.count("saved ") == 3
