"""--help answers at once: what is slow to import, torch first of all, is not imported for it."""

import subprocess
import sys

import pytest
from tests_launcher import ROOT

COMMANDS = (
    "eval.coco", "eval.suites.reference_statistics", "eval.weights", "benchmarks.checkpoint_io", "benchmarks.compare",
    "benchmarks.data_loading", "benchmarks.eval", "benchmarks.moe_layer", "benchmarks.parity", "benchmarks.step",
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
def test_help_imports_nothing_heavy(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASK, module], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert "usage:" in done.stdout
    assert done.stdout.splitlines()[-1] == "imported:"
