"""The commands of data and checkpoints answer --help at once: they import torch only when they have work to do."""

import pytest
from tests_launcher import Launcher

COMMANDS = [
    *("trainer.checkpoint", "trainer.data.download", "trainer.data.index", "trainer.data.encode"),
    *("trainer.data.inspect", "trainer.data.train_vae", "trainer.data.demo.scene_shards"),
    *("benchmarks.checkpoint_io", "benchmarks.data_loading"),
]
PROGRAM = """
import runpy, sys
sys.argv = ["command", "--help"]
try:
    runpy.run_module({name!r}, run_name="__main__")
except SystemExit as stop:
    assert not stop.code
print("slow imports:", sorted({{"torch", "deepspeed", "transformers"}} & sys.modules.keys()))
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_torch(name: str, launcher: Launcher) -> None:
    done = launcher.run("-c", PROGRAM.format(name=name))
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout and "slow imports: []" in done.stdout, done.stdout[-300:]
