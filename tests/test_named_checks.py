"""A check that fails, hangs or dies hides none behind it: `run_checks` over a program that does all of that."""

from pathlib import Path

import pytest
from tests_launcher import Checked, run_checks

PROGRAM = """
import os, sys, time
folder, *names = sys.argv[1:]
open(folder + "/starts", "a").write(" ".join(names) + "\\n")
for name in names:
    if name == "fails":
        raise ValueError("seven")
    if name == "hangs":
        print("waits for the others", flush=True)
        time.sleep(600)
    if name == "dies":
        os._exit(0)
    print(f"rank 0: {name} holds", flush=True)
if names[-1] == "ends badly":
    sys.exit(3)
"""


def checked(folder: Path, *names: str, timeout: float = 60) -> tuple[Checked, list[str]]:
    """The result, and the checks that each start was asked for."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    found = run_checks(str(program), names, str(folder), processes=1, timeout=timeout)
    return found, (folder / "starts").read_text().splitlines()


def test_sound_checks_share_one_start(tmp_path: Path) -> None:
    found, starts = checked(tmp_path, "first", "second")
    assert found.problems == {"first": "", "second": ""} and starts == ["first second"]
    assert found.output == "rank 0: first holds\nrank 0: second holds\n"


@pytest.mark.parametrize(
    "bad,words", [("fails", "ValueError: seven"), ("dies", "exit code 0"), ("hangs", "stopped after 4")]
)
def test_those_behind_a_bad_check_have_results_of_their_own(tmp_path: Path, bad: str, words: str) -> None:
    found, starts = checked(tmp_path, "first", bad, "third", timeout=4)
    assert words in found.problems.pop(bad)
    assert found.problems == {"first": "", "third": ""} and starts == [f"first {bad} third", "third"]


def test_a_bad_end_is_a_fault_of_the_last_check(tmp_path: Path) -> None:
    found, _ = checked(tmp_path, "first", "ends badly")
    assert found.problems.keys() == {"first", "ends badly"} and not found.problems["first"]
    assert found.problems["ends badly"].startswith("exit code 3 of ")


@pytest.mark.slow
def test_a_check_holds_only_on_all_ranks(tmp_path: Path) -> None:
    program = tmp_path / "half.py"
    program.write_text("import os, sys\nif os.environ['RANK'] == '0':\n    print(f'rank 0: {sys.argv[1]} holds')\n")
    found = run_checks(str(program), ["whole", "second"], processes=2)
    assert found.problems["whole"] and found.problems["second"]
