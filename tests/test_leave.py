"""Programs end with their exit code and all that is to run at an exit, whatever the threads of process groups do."""

import subprocess
import sys
from subprocess import CompletedProcess
from typing import Any

import pytest
from tests_launcher import ROOT, Launcher

PROGRAM = """
import atexit, logging, os, sys, threading, time
from trainer.cluster.leave import run_and_leave
atexit.register(print, "at exit")
def main():
    {body}
{end}
"""
# Exchanges of which many are still to come when `main` returns, and whose tensors a thread of the group lets go of.
UNFINISHED = """
    import torch
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    for _ in range(20000): torch.distributed.all_reduce(torch.zeros(1), async_op=True)
"""


def run(body: str, end: str = "run_and_leave(main)", stdout: Any = subprocess.PIPE) -> "CompletedProcess[str]":
    environment = {name: value for name, value in Launcher().environment().items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body.strip(), end=end)], env=environment, cwd=ROOT, text=True,
        stdout=stdout, stderr=subprocess.PIPE, check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("body", "code", "stdout", "stderr"),
    [
        ("print('done')", 0, "done\nat exit\n", ""),
        ("sys.exit()", 0, "at exit\n", ""),
        ("sys.exit(2)", 2, "at exit\n", ""),
        ("sys.exit('too bad')", 1, "at exit\n", "too bad\n"),
        ("threading.Timer(0.3, print, ['thread']).start()", 0, "thread\nat exit\n", ""),
        ("sys.stdout.write('half')", 0, "halfat exit\n", ""),
    ],
)
def test_as_python_itself_ends(body: str, code: int, stdout: str, stderr: str) -> None:
    for end in ("run_and_leave(main)", "main()"):
        done = run(body, end)
        assert (done.returncode, done.stdout, done.stderr) == (code, stdout, stderr), end


def test_an_error_is_printed_with_its_notes() -> None:
    done = run("error = KeyError('x'); error.add_note('and this'); raise error")
    assert (done.returncode, done.stdout) == (1, "at exit\n")
    assert done.stderr.startswith("Traceback") and done.stderr.endswith("KeyError: 'x'\nand this\n")


def test_output_that_nobody_takes_is_a_failure_as_in_python() -> None:
    for end in ("run_and_leave(main)", "main()"):
        with open("/dev/full", "w") as full:
            assert run("print('lost')", end, full).returncode == 120, end


def test_threads_of_a_group_do_not_abort_it() -> None:
    """Python's own end does: `main()` in its place was aborted in 5 of 6 starts."""
    done = run(UNFINISHED)
    assert (done.returncode, done.stdout, done.stderr) == (0, "at exit\n", "")
