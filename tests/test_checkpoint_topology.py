"""One trajectory over any topology: the oracle of saving and loading, in few starts of many processes.

Each load asserts, on real DeepSpeed: hashes of all full logical tensors (weights, average, both moments) equal
those of the origin, step counters and hyper-parameters of the optimizer right after loading, pieces where
`layout_places` says, the next ten losses within 1e-5 of the unbroken run, and all bitwise on the topology that
saved.
"""

from pathlib import Path

import pytest
from tests_launcher import Launcher

pytestmark = pytest.mark.slow


def check(processes: int, folder: Path, *commands: str) -> list[str]:
    program = ["tests/checkpoint_checks.py", str(folder), *" + ".join(commands).split()]
    done = Launcher().run(*program, processes=processes, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-9000:]
    lines = [line for line in done.stdout.splitlines() if "same topology" in line]
    assert len(lines) == sum(command.startswith("load") for command in commands), done.stdout
    return lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unbroken runs with checkpoints: `two` of 2 processes, and in four processes `four3` and `four2`."""
    path = tmp_path_factory.mktemp("topology")
    check(2, path, "save two 1 3")
    lines = check(
        4, path, "save four3 2 3", "save four2 2 2",
        "load four3 2 3", "load four2 2 2", "load four3 4 3", "load two 4 3",
        "load four3 4 2", "load four2 4 3",
    )  # fmt: skip
    assert sum("same topology True, losses differ by 0.0e+00" in line for line in lines) == 2
    return path


def test_two_processes_go_on(folder: Path) -> None:
    check(
        2, folder, "load four3 2 3", "load four3 1 3", "load four2 2 2", "load four2 1 1", "load four3 2 offload",
    )  # fmt: skip


def test_one_process_goes_on(folder: Path) -> None:
    check(1, folder, "load four3 1 3", "load four2 1 2")


def test_what_routers_learn_goes_on_too(tmp_path: Path) -> None:
    """Predictor, thresholds and shared experts, on the topology that saved (bitwise) and on another."""
    router = "moe.router=diffmoe moe.pool=batch moe.num_shared_experts=1 moe.router_input=unmodulated"
    lines = check(
        2, tmp_path, f"save d 2 3 {router}", f"load d 2 3 {router}", f"load d 1 2 {router}",
    )  # fmt: skip
    assert "same topology True, losses differ by 0.0e+00" in lines[0]


def test_bf16_resumes_bitwise_and_background_saves_are_the_same(tmp_path: Path) -> None:
    precision = "train.precision=bf16"
    (line,) = check(
        2, tmp_path, f"save bf 2 3 {precision}", f"load bf 2 3 {precision}",
        f"save background 2 3 {precision} train.async_save=true", "same bf background",
    )  # fmt: skip
    assert "same topology True" in line
    log = (tmp_path / "background" / "train.log").read_text()
    assert log.count("copied step") == log.count("saved ") == 3
