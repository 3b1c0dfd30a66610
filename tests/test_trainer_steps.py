"""Rates, capacity, masks, average, reports and losses of each step: `trainer_checks.py` on one and two processes.

ZeRO-3's bookkeeping on three, too: most numbers of elements cannot be cut into three, so that parts are padded.
"""

from functools import cache
from pathlib import Path

import pytest
from tests_launcher import Checked, asked_checks, run_checks

BOOKKEEPING = "lighter_bookkeeping_changes_no_bit"
CHECKS = (
    "the_average_is_a_plain_lerp_of_whole_weights",
    "every_step_has_its_rate_capacity_and_mask",
    "a_report_is_the_mean_of_its_steps_over_any_number_of_stops",
    "a_routers_loss_is_learned_and_not_reported",
    BOOKKEEPING,
    "bookkeeping_stays_where_something_is_in_the_way",
)
CASES = [pytest.param(size, check, marks=[pytest.mark.slow] * (size - 1)) for size in (1, 2) for check in CHECKS]
CASES.append(pytest.param(3, BOOKKEEPING, marks=pytest.mark.slow))


class Starts:
    """All asked checks in one start for each number of processes, when a test first asks."""

    def __init__(self, folder: Path, checks: list[str]) -> None:
        self.checks = checks
        self.checked = cache(lambda size: self._run(folder / str(size), size))

    def _run(self, folder: Path, size: int) -> Checked:
        checks = self.checks if size < 3 else [BOOKKEEPING]
        return run_checks("tests/trainer_checks.py", checks, str(folder), processes=size)


@pytest.fixture(scope="module")
def starts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Starts:
    """One folder for all starts."""
    return Starts(tmp_path_factory.mktemp("steps"), asked_checks(request, CHECKS))


@pytest.mark.parametrize("size,check", CASES)
def test_holds(starts: Starts, size: int, check: str) -> None:
    problem = starts.checked(size).problems[check]
    assert not problem, problem
