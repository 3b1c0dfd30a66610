"""A session in which a test is skipped for a reason that is not listed fails."""

import subprocess
import sys
from pathlib import Path

import pytest
from skip_list import listed_reasons

TESTS = Path(__file__).parent


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "side by side"])
def test_a_skip_that_is_not_listed_fails_the_session(tmp_path: Path, workers: list[str]) -> None:
    listed = next(reason for reason in listed_reasons() if reason.startswith("needs a GPU"))
    lines = ["import pytest", f"def test_a(): pytest.skip('{listed}: none here')", "def test_b(): pass"]
    other = {
        "in a test": ["def test_c(): pytest.skip('no time')"],
        "by a mark": ["@pytest.mark.skipif(True, reason='no time')", "def test_c(): pass"],
        "of a file": ["pytest.skip('no time', allow_module_level=True)"],
    }
    for name, more in {"listed only": [], **other}.items():
        file = tmp_path / "test_toy.py"
        file.write_text("\n".join([lines[0], *more, *lines[1:]]))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "skip_list", "-p", "no:cacheprovider", *workers]
        done = subprocess.run(
            [*command, "--rootdir", str(tmp_path), str(file)], capture_output=True, text=True, check=False,
            cwd=tmp_path, env={"PYTHONPATH": str(TESTS), "PATH": ""},
        )  # fmt: skip
        # A file that is skipped as a whole leaves no test: pytest's own code for that is an error, too.
        assert (done.returncode != 0) == (name in other), (name, done.stdout)
        assert ("does not list (no time)" in done.stdout) == (name in other), (name, done.stdout)
