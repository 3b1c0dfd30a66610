"""The list of planted faults is well-formed; the program that plants them tells caught from survived, and goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tests.mutation
from tests.mutation.listing import Mutation, as_toml, faults, from_line, read_list
from tests.mutation.run import chosen, main

HALF = "def half(x):\n    return x / 2 if x | 1 else 0\n\n\ndef idle():\n    return 7\n"
TEST = "from half import half\n\n\ndef test_half():\n    assert half(4) == 2\n"
LIST = """
[[mutation]]
file = "half.py"
old = "x / 2"
new = "x / 3"
tests = ["test_half.py::test_half"]

[[mutation]]
file = "half.py"
old = "return 7"
new = "return 8"
tests = ["test_half.py"]

[[mutation]]
file = "half.py"
old = "else 0"
new = "else 1"
equivalent = "x | 1 is never 0"
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A repository of one module and its test."""
    for name, content in (("half.py", HALF), ("test_half.py", TEST), ("list.toml", LIST)):
        (tmp_path / name).write_text(content)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


def _paths(toy: Path) -> list[str]:
    return ["--root", str(toy), "--list", str(toy / "list.toml"), "--results", str(toy / "results.jsonl")]


def test_every_planted_fault_is_in_its_file_once_and_names_tests_that_exist() -> None:
    mutations = read_list()
    assert not [fault for item in mutations for fault in faults(item)]
    places = [(item.file, item.old, item.new) for item in mutations]
    assert len(set(places)) == len(places)


def test_faults_of_an_entry_are_named(toy: Path) -> None:
    for change, words in (
        ({"old": "x", "new": "y"}, "old text occurs 3 times"),
        ({"old": "y / 2"}, "old text occurs 0 times"),
        ({"new": "x / 2"}, "old and new are the same"),
        ({"new": "x / / 3"}, "is no Python any more"),
        ({"tests": ()}, "names no test"),
        ({"tests": ("test_half.py::test_double",)}, "there is no test test_half.py::test_double"),
        ({"tests": ("test_third.py",)}, "there is no test test_third.py"),
    ):
        entry = {"file": "half.py", "old": "x / 2", "new": "x", "tests": ("test_half.py",), **change}
        (fault,) = faults(Mutation(**entry), toy)  # type: ignore[arg-type]
        assert words in fault


def test_lines_become_entries(toy: Path) -> None:
    found = from_line(r"half.py | if x | 1 else 0\n | if x | 2 else 0\n | test_half.py::test_half test_half.py", toy)
    assert (found.old, found.new) == ("if x | 1 else 0\n", "if x | 2 else 0\n")
    assert found.tests == ("test_half.py::test_half", "test_half.py")
    (toy / "again.toml").write_text(as_toml(found))
    assert read_list(toy / "again.toml") == [found]
    with pytest.raises(ValueError, match="0 ways to read this line"):
        from_line("half.py | x / 9 | x | test_half.py", toy)


def test_shares_part_the_list() -> None:
    items = [Mutation(file=f"{i}.py", old="a", new="b") for i in range(7)]
    parts = [chosen(items, "", f"{n}/3") for n in (1, 2, 3)]
    assert sorted(item.file for part in parts for item in part) == [f"{i}.py" for i in range(7)]
    assert chosen(items, "4.py", "1/1") == [items[4]]


def test_caught_and_survived_are_told_apart_and_kept(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*_paths(toy), "--preload", ""]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--workers", "1"])
    said = capsys.readouterr().out
    assert stop.value.code == 1 and "SURVIVED: half.py: return 7 -> return 8" in said
    assert said.splitlines()[-2].split() == ["all", "1", "1", "1", "0"]
    assert (toy / "half.py").read_text() == HALF
    rows = [json.loads(line) for line in (toy / "results.jsonl").read_text().splitlines()]
    assert [row["verdict"] for row in rows] == ["caught", "SURVIVED"]
    # A test that now sees the second fault: only what its change concerns is tried again.
    (toy / "test_half.py").write_text(
        TEST.replace("2\n", "2\n\n\ndef test_idle():\n    import half as h\n\n    assert h.idle() == 7\n")
    )
    for tried in (2, 0):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--workers", "2"])
        assert stop.value.code == 0
        assert sum(" s  half.py" in line for line in capsys.readouterr().out.splitlines()) == tried


def test_a_test_that_fails_by_itself_is_no_verdict(toy: Path) -> None:
    (toy / "test_half.py").write_text(TEST.replace("== 2", "== 5"))
    with pytest.raises(SystemExit, match="tests fail without a planted fault"):
        main([*_paths(toy), "--preload", ""])
    assert not (toy / "results.jsonl").exists()
