"""Starts real commands of the repository, on one or more processes."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics; an unfinished last line does not count."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


class Launcher:
    """Starts commands of the repository in a process of their own."""

    def environment(self) -> dict[str, str]:
        keep = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
        return keep | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

    def command(self, *arguments: str, processes: int = 1) -> list[str]:
        ranks = [str(ROOT / "tests" / "start_ranks.py"), str(processes)] if processes > 1 else []
        return [sys.executable, *ranks, *arguments]

    def run(self, *arguments: str, processes: int = 1, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments, processes=processes), capture_output=True, text=True, timeout=timeout,
            cwd=ROOT, env=self.environment(), check=False,
        )  # fmt: skip

    def start(self, *arguments: str, processes: int = 1) -> "subprocess.Popen[bytes]":
        """In the background, several processes by torchrun."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        return subprocess.Popen(
            [sys.executable, *(torchrun if processes > 1 else []), *arguments], cwd=ROOT, env=self.environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def start_ranks(self, size: int, *arguments: str, log: Path | None = None) -> "list[subprocess.Popen[bytes]]":
        """The processes of a run as srun starts them: without a parent that ends the others when one dies."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = self.environment() | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        output = log.open("ab") if log else subprocess.DEVNULL
        return [
            subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=output, stderr=output, start_new_session=True,
            )
            for rank in range(size)
        ]  # fmt: skip


@dataclass(frozen=True)
class Checked:
    """What a program of named checks said: `problems[name]` is empty where the check held on all ranks."""

    problems: dict[str, str]
    output: str


def asked_checks(request: pytest.FixtureRequest, names: Sequence[str]) -> list[str]:
    """Those of `names` that are the `check` of a chosen test of the file: who asks for one waits for no other."""
    chosen = [item for item in request.session.items if item.path == request.path and isinstance(item, pytest.Function)]
    asked = {item.callspec.params.get("check") for item in chosen if hasattr(item, "callspec")}
    return [name for name in names if name in asked]


def run_checks(
    program: str, names: Sequence[str], *arguments: str, processes: int = 2, timeout: float = 300
) -> Checked:
    """Run checks of one of the `*_checks.py`, which says `rank R: NAME holds` after each, in as few starts as possible.

    What a check leaves behind when it fails on one rank, others cannot build on: it ends the start, and those behind
    it are run in another one.
    """
    left, problems, said = list(names), dict.fromkeys(names, ""), ""
    while left:
        output, code = _run_or_end(Launcher().command(program, *arguments, *left, processes=processes), timeout)
        said += output
        held = [name for name in left if output.count(f": {name} holds\n") == processes]
        failed = next((name for name in left if name not in held), left[-1] if code else None)
        if failed is None:
            break
        problems[failed] = f"exit code {code} of {program}\n" + output[-6000:]
        left = left[left.index(failed) + 1 :]
    return Checked(problems, said)


def _run_or_end(command: list[str], timeout: float) -> tuple[str, int]:
    """Output, both streams, and exit code of a command; one that takes too long is ended with all it has started."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=Launcher().environment(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        return process.communicate(timeout=timeout)[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its processes
        try:
            output = process.communicate(timeout=10)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output = process.communicate()[0]
        return f"{output}\nstopped after {timeout} s", process.returncode
