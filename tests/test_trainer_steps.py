"""Rates, capacity, masks, average, reports and losses of each step: `trainer_checks.py` on one and two processes."""

from collections.abc import Callable
from functools import cache

import pytest
from tests_launcher import Checked, asked_checks, run_checks

CHECKS = (
    "the_average_is_a_plain_lerp_of_whole_weights",
    "every_step_has_its_rate_capacity_and_mask",
    "a_report_is_the_mean_of_its_steps_over_any_number_of_stops",
    "a_routers_loss_is_learned_and_not_reported",
)
CASES = [pytest.param(size, check, marks=[pytest.mark.slow] * (size - 1)) for size in (1, 2) for check in CHECKS]


@pytest.fixture(scope="module")
def starts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Checked]:
    """All asked checks in one start for each number of processes, when a test first asks."""
    folder, checks = tmp_path_factory.mktemp("steps"), asked_checks(request, CHECKS)
    return cache(lambda size: run_checks("tests/trainer_checks.py", checks, str(folder / str(size)), processes=size))


@pytest.mark.parametrize("size,check", CASES)
def test_holds(starts: Callable[[int], Checked], size: int, check: str) -> None:
    problem = starts(size).problems[check]
    assert not problem, problem
