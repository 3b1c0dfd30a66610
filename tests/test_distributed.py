"""Real multi-process runs over gloo: the parity table and the checks of `distributed_checks.py`."""

from typing import Any

import pytest
from tests_launcher import Checked, asked_checks, run_checks


@pytest.mark.slow
def test_parity_with_one_plain_process(launcher: Any) -> None:
    """Expert groups of 1, 2 and 4 of four processes."""
    done = launcher.run("-m", "benchmarks.parity", processes=4, timeout=600)
    print(done.stdout)
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| sgd", "| adamw"))]
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len(rows) == 2 * 3 * 3


@pytest.mark.slow
def test_routers_are_the_same_with_and_without_expert_parallelism(launcher: Any) -> None:
    """Each against its plain loops; Expert Race's unequal shares and the router that reads the timestep included."""
    routers = ["group", "identity", "token_choice", "diffmoe", "expert_race", "nucleus"]
    done = launcher.run(
        "-m", "benchmarks.parity", "--optimizers", "sgd", "--stages", "3", "--ep-sizes", "1", "2", "--steps", "2",
        "--routers", *routers, processes=2, timeout=500,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert sum(line.startswith("| sgd") for line in done.stdout.splitlines()) == 2 * len(routers)


@pytest.mark.slow
def test_upstream_stage_0_still_clips_expert_gradients_wrongly(launcher: Any) -> None:
    """When this fails, DeepSpeed has fixed stage 0 under expert parallelism: allow it in deepspeed_config.py."""
    done = launcher.run(
        "-m", "benchmarks.parity", "--stages", "0", "--ep-sizes", "2", "--optimizers", "sgd", processes=2
    )
    assert done.returncode == 1 and "outside the bounds" in done.stdout, done.stdout + done.stderr[-2000:]


CHECKS = (
    "gathers_go_through_parameters_in_one_order",
    "construction_holds_one_layer_at_a_time",
    "construction_allocates_one_layer_beside_the_shards",
    "all_to_all_count",
    "chunks_change_rounding_only",
    "exchange_benchmark_measures_what_it_says",
    "routers_sample_alike_with_and_without_expert_parallelism",
    "routers_move_by_their_share_of_the_rate",
    "bf16_gradients_are_summed_in_fp32",
    "compiled_blocks_learn_what_plain_ones_do",
    "ema_is_the_average_of_the_weights",
    "topology_does_not_change_the_start",
    "one_rank_cannot_write",
    "background_save_keeps_its_step",
)


@pytest.fixture(scope="module")
def checked(request: pytest.FixtureRequest) -> Checked:
    """All checks in one start of two processes; those that count memory first."""
    return run_checks("tests/distributed_checks.py", asked_checks(request, CHECKS))


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_holds_on_two_processes(checked: Checked, check: str) -> None:
    assert not checked.problems[check], checked.problems[check]
