"""Starts real commands of the repository, on one or more processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

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
        if processes == 1:
            return [sys.executable, *arguments]
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            *arguments,
        ]

    def run(self, *arguments: str, processes: int = 1, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments, processes=processes), capture_output=True, text=True, timeout=timeout,
            cwd=ROOT, env=self.environment(), check=False,
        )  # fmt: skip

    def start(self, *arguments: str, processes: int = 1) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            self.command(*arguments, processes=processes), cwd=ROOT, env=self.environment(),
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
