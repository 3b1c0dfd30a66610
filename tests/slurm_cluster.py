"""A real Slurm of several nodes on this machine, for tests of the batch scripts; see tests/slurm/start-test-slurm."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests_launcher import ROOT

START, STOP = (ROOT / "tests" / "slurm" / f"{verb}-test-slurm" for verb in ("start", "stop"))
POLL_SECONDS = 0.3


def why_not() -> str:
    """Why no cluster can be started here; empty if it can."""
    if os.geteuid() != 0:
        return "a test Slurm is made of namespaces: only root can start one"
    if not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))) and not shutil.which("apt-get"):
        return "Slurm is not installed, and this is no Debian where it could be"
    return ""


class NoPackagesError(RuntimeError):
    """Slurm's packages cannot be installed."""


class Cluster:
    """A running cluster. Nodes are n1, n2, ... unless named; its folder is short, since sockets lie in it."""

    def __init__(self, nodes: int | str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
        self.nodes = nodes
        self.power_on()

    def power_on(self) -> None:
        """Start what does not run: the whole cluster, or nodes and a controller that were killed."""
        command = [str(START), str(self.folder), "--nodes", str(self.nodes)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if "apt-get failed" in done.stderr:
            raise NoPackagesError((self.folder / "log" / "apt.log").read_text()[-500:])
        if done.returncode:
            raise RuntimeError(done.stderr)

    def shape(self) -> dict[str, str]:
        """What start-test-slurm has chosen: mode, names, bridge, net."""
        return dict(re.findall(r'(\w+)="(.*)"', (self.folder / "run" / "shape").read_text()))

    def address(self) -> str:
        """Under which its nodes reach this machine."""
        return "127.0.0.1" if self.shape()["mode"] == "loopback" else f"{self.shape()['net']}.254"

    def link(self, node: str) -> str:
        """The network interface of this machine to which a node is connected; empty if they share one."""
        shape = self.shape()
        return "" if shape["mode"] == "loopback" else f"{shape['bridge']}.{shape['names'].split().index(node) + 1}"

    def power_off(self, name: str) -> None:
        """Power cut of a node, or of `ctl`, the controller."""
        subprocess.run(["kill", "-9", (self.folder / "run" / f"{name}.pid").read_text().strip()], check=True)

    def stop(self) -> None:
        """End everything and forget it."""
        subprocess.run([str(STOP), str(self.folder)], check=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def environment(self, **more: str) -> dict[str, str]:
        """Of a user who submits."""
        keep = {
            k: v for k, v in os.environ.items() if not re.match(r"RANK|WORLD_SIZE|LOCAL_|MASTER_|SLURM_|SBATCH_", k)
        }
        return keep | {
            "SLURM_CONF": str(self.folder / "etc" / "slurm.conf"), "VENV": str(Path(sys.executable).parent.parent),
            "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "DS_ACCELERATOR": "cpu", "CPU_BIND": "none",
            "LOGS": str(self.folder / "log" / "jobs"),
        } | more  # fmt: skip

    def call(self, *command: str, check: bool = True, cwd: Path = ROOT, **environment: str) -> str:
        """Standard output of a Slurm command."""
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=cwd, env=self.environment(**environment), timeout=300,
            check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"{command}: {done.stderr}")
        return done.stdout + ("" if check else done.stderr)

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = (), **environment: str) -> str:
        """sbatch a script of slurm/ with small resources; returns the job's number."""
        small = ["--mem=1G", "--cpus-per-task=1", "--parsable", f"--output={self.folder}/%j.log"]
        return self.call("sbatch", *small, *options, f"slurm/{script}.sbatch", *arguments, **environment).strip()

    def log(self, job: str) -> str:
        """The job's own output."""
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", "-o", job)))

    def wait(self, *jobs: str, seconds: float = 240) -> list[str]:
        """Until the jobs have ended; returns their states."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        found = lambda: [self.job(job)["JobState"] for job in jobs]  # noqa: E731
        self.until(lambda: all(state in ended for state in found()), seconds, *jobs)
        return found()

    def until(self, condition: Callable[[], object], seconds: float, *jobs: str) -> None:
        """Wait for a condition; an error quotes the jobs' logs."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = "\n".join(self.log(job)[-3000:] for job in jobs)
                raise TimeoutError(f"{self.call('squeue', check=False)}\n{logs}")
            time.sleep(POLL_SECONDS)
