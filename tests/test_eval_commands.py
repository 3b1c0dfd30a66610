"""--help of the evaluation's commands answers at once: nothing heavy is imported for it."""

import subprocess
import sys

import pytest
from tests_launcher import ROOT

COMMANDS = (
    "eval.run", "eval.score", "eval.watch", "eval.report", "eval.demo.detector_check", "eval.suites.geneval_results",
    "eval.suites.reference_statistics",
)  # fmt: skip
ASK = """
import runpy, sys
module, sys.argv = sys.argv[1], ["command", "--help"]
try:
    runpy.run_module(module, run_name="__main__")
except SystemExit as end:
    assert end.code == 0
print("imported:", *(name for name in ("torch", "deepspeed", "scipy", "matplotlib") if name in sys.modules))
"""


@pytest.mark.parametrize("module", COMMANDS)
def test_help_of_an_evaluation_imports_nothing_heavy(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASK, module], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert "usage:" in done.stdout
    assert done.stdout.splitlines()[-1] == "imported:"
