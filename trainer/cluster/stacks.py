"""The stacks of all threads, when a run hangs: each process writes its own, and what it can see of a mute neighbour.

A process that does not run (SIGSTOP, a hanging file system) or holds the interpreter cannot write. Another one on its
node then writes down the process's state, and its stacks where `py-spy` is installed and may read them.
"""

import faulthandler
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import TextIO

import psutil

from trainer.cluster.incidents import VARIABLE, Incident
from trainer.cluster.node import node_name

PY_SPY_SECONDS = 5.0


def stacks_file(run_dir: Path, rank: int) -> Path:
    """Beside the process's log, where there is one."""
    name = os.environ.get(VARIABLE)
    return Path(name).with_suffix(".stacks") if name else run_dir / "logs" / f"{rank}.stacks"


def write_stacks(path: Path, lost: Incident) -> None:
    """Append the stacks of this process, and of `lost` if it is mute and on this node."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')} {lost.sentence}", file=file)
        print(f"process {os.getpid()} on node {node_name()}:", file=file, flush=True)
        faulthandler.dump_traceback(file)
        if lost.reason == "silent" and lost.pid and lost.node == node_name():
            _write_neighbour(file, lost)


def _write_neighbour(file: TextIO, lost: Incident) -> None:
    try:
        state = psutil.Process(lost.pid).status()
    except psutil.NoSuchProcess:
        state = "gone"
    print(f"rank {lost.rank}, process {lost.pid}, cannot write its stacks; its state: {state}", file=file, flush=True)
    tool = shutil.which("py-spy")
    if tool is None:
        print("its stacks cannot be read either: py-spy is not installed", file=file)
        return
    # A process that is stopped would never come to a pause of py-spy's own.
    command = [tool, "dump", "--nonblocking", "--pid", str(lost.pid)]
    try:
        subprocess.run(command, stdout=file, stderr=file, timeout=PY_SPY_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        print(f"py-spy has read nothing in {PY_SPY_SECONDS:.0f} s", file=file)
