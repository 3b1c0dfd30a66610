"""ZeRO-3's bookkeeping: the same to the bit as DeepSpeed's own, with fewer gathers; `zero3_checks.py`.

On three processes, too: most numbers of elements cannot be cut into three, so that parts are padded.
"""

from collections.abc import Callable
from functools import cache

import pytest
from tests_launcher import Checked, asked_checks, run_checks

SAME = "lighter_bookkeeping_changes_no_bit"
CHECKS = (
    SAME,
    "each_parameter_is_gathered_no_more_often_than_needed",
    "published_weights_are_those_that_compute",
    "bookkeeping_stays_where_something_is_in_the_way",
)
CASES = [pytest.param(size, check, marks=[pytest.mark.slow] * (size - 1)) for size in (1, 2) for check in CHECKS]
CASES.append(pytest.param(3, SAME, marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def starts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Checked]:
    """All asked checks in one start for each number of processes, when a test first asks."""
    folder, checks = tmp_path_factory.mktemp("zero3"), asked_checks(request, CHECKS)

    def start(size: int) -> Checked:
        return run_checks("tests/zero3_checks.py", checks if size < 3 else [SAME], str(folder), processes=size)

    return cache(start)


@pytest.mark.parametrize("size,check", CASES)
def test_holds(starts: Callable[[int], Checked], size: int, check: str) -> None:
    problem = starts(size).problems[check]
    assert not problem, problem
