"""A run of the campaign on the test cluster: how it is submitted, how far it is, and whether it lost anything."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

import psutil
from slurm_cluster import Cluster
from tests_launcher import ROOT, Launcher, metrics

SETTINGS = (
    "debug", "model.dim=16", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "moe.num_experts=4",
    "data.image_size=8", "train.checkpoint_every=30", "train.hang_seconds=15",
)  # fmt: skip
# Far above what a step or a start takes here, since other work may share the cores.
PATIENCE = {"TRAIN_SILENCE_SECONDS": "20", "DEEPSPEED_TIMEOUT": "2", "STOP_SECONDS": "60", "DOCTOR": "no"}
MEASURED = (
    "images_per_second",
    "seconds_per_step",
    "tflops_per_second",
    "memory_gb",
    "save_seconds",
)  # which no two runs have alike
TOLERANCE = 2e-7
# On the path of all processes: two signals by which a rank hangs in its main thread, between two bytecodes. The first
# lets other threads run, the second does not.
HOOKS = """import ctypes, signal, time
signal.signal(signal.SIGRTMIN, lambda *_: time.sleep(3600))
signal.signal(signal.SIGRTMIN + 1, lambda *_: ctypes.PyDLL(None).sleep(3600))
"""
TORCHRUN = """#!/bin/bash
#SBATCH --exclusive --requeue --open-mode=append
mkdir -p "$RUN/logs"
exec torchrun --standalone --nproc-per-node=2 -m trainer.train "$@" run_dir="$RUN" \\
  >>"$RUN/logs/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.0.log" 2>&1
"""


@dataclass(frozen=True)
class Shape:
    """Nodes, ranks on each, and whether torchrun starts them, from a script that knows nothing of requeueing."""

    name: str
    nodes: int
    per_node: int
    torchrun: bool = False

    @property
    def ranks(self) -> int:
        """In all."""
        return self.nodes * self.per_node

    def settings(self, steps: int) -> tuple[str, ...]:
        """The global batch is 8 in all shapes."""
        sizes = (f"train.micro_batch_size={8 // self.ranks}", f"parallel.ep_size={self.ranks}")
        return (*SETTINGS, *sizes, f"train.max_steps={steps}")


SHAPES = {
    shape.name: shape
    for shape in (Shape("pair", 2, 1), Shape("twin", 1, 2), Shape("task", 1, 1), Shape("torchrun", 1, 2, True))
}


class Site:
    """The cluster, for several threads: power and controller may be away at times. All runs have so many `steps`."""

    def __init__(self, cluster: Cluster, folder: Path, steps: int) -> None:
        self.cluster, self.folder, self.steps, self.power = cluster, folder, steps, RLock()
        self.script = folder / "torchrun.sbatch"
        self.script.write_text(TORCHRUN)
        (folder / "hooks").mkdir()
        (folder / "hooks" / "sitecustomize.py").write_text(HOOKS)
        self.references: dict[int, list[dict[str, Any]]] = {}
        self.tidied, self.last_tidy = 0, time.monotonic()

    def tidy(self) -> None:
        """What an administrator does now and then: drained nodes back to work, jobs that Slurm holds released.

        Slurm drains a node and holds a job that it started there while an earlier start, out of its sight, went on.
        """
        with self.power:
            if time.monotonic() < self.last_tidy + 15:
                return
            self.last_tidy, call = time.monotonic(), self.cluster.call
            drained = call("sinfo", "-h", "-N", "-t", "drain", "-o", "%N", check=False).split()
            held = call("squeue", "-h", "-o", "%i %r", check=False).splitlines()
            for node in set(drained):
                call("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
            for job in (line.split()[0] for line in held if "held" in line):
                call("scontrol", "release", job, check=False)
            self.tidied += len(set(drained)) + sum("held" in line for line in held)

    def power_on(self) -> None:
        """Start what is dead. Nodes need longer than that waits for them where cores are few and busy."""
        with self.power:
            self.ask(self.cluster.power_on)

    def ask(self, action: Callable[[], Any], seconds: float = 300) -> Any:
        """What Slurm answers, once its controller is there."""
        end = time.monotonic() + seconds
        while True:
            try:
                return action()
            except (RuntimeError, subprocess.TimeoutExpired):
                if time.monotonic() > end:
                    raise
                time.sleep(2)

    def reference(self, ranks: int) -> list[dict[str, Any]]:
        """Metrics of a run of so many processes that nothing happened to."""
        if ranks not in self.references:
            shape = next(shape for shape in SHAPES.values() if shape.ranks == ranks)
            run = self.folder / f"reference_{ranks}"
            done = Launcher().run("-m", "trainer.train", *shape.settings(self.steps), f"run_dir={run}", processes=ranks)
            assert done.returncode == 0, done.stderr[-2000:]
            self.references[ranks] = [stable(entry) for entry in metrics(run)]
        return self.references[ranks]


def stable(entry: dict[str, Any]) -> dict[str, Any]:
    """A step's metrics without what is measured."""
    return {name: value for name, value in entry.items() if name not in MEASURED}


class Run:
    """One run folder and the job that works on it."""

    def __init__(self, site: Site, shape: Shape, folder: Path, task: int | None = None) -> None:
        self.site, self.shape, self.folder, self.task = site, shape, folder, task
        self.job, self.jobs, self.given = "", list[str](), 0  # given: starts that events account for

    def submit(self) -> None:
        """A new job; of an array the one task that is this run's."""
        self.adopt(self.site.ask(lambda: submit_tasks(self.site, self.shape, self.folder, self.task)))

    def adopt(self, job: str) -> None:
        """This job works on the run from now on."""
        self.job = job if self.task is None else f"{job}_{self.task}"
        self.jobs.append(self.job)
        self.given += 1

    def state(self) -> dict[str, str]:
        """What Slurm knows of the job."""
        found: dict[str, str] = self.site.ask(lambda: self.site.cluster.job(self.job))
        return found

    def steps(self, start: str) -> int:
        """Steps that a start, `JOB.RESTART`, has logged."""
        path = self.folder / "logs" / f"{start}.0.log"
        return path.read_text(errors="replace").count("  loss ") if path.exists() else 0

    def log(self) -> str:
        """The run's own."""
        path = self.folder / "train.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def said(self) -> str:
        """All that the present job said: its own output, and for torchrun that of its processes."""
        logs = sorted((self.folder / "logs").glob(f"{self.job}.*.0.log")) if self.shape.torchrun else []
        return self.site.cluster.log(self.job) + "".join(path.read_text(errors="replace") for path in logs)

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return f"ended after step {self.site.steps} of {self.site.steps} " in self.log()

    def processes(self, program: str = "trainer.train") -> list[psutil.Process]:
        """Python processes of this run, in the order of ranks; launchers do not count."""
        found = []
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                if f"run_dir={self.folder}" in words and program in words and words[words.index(program) - 1] == "-m":
                    if Path(words[0]).name.startswith("python"):
                        found.append((process.environ().get("RANK", ""), process))
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return [process for rank, process in sorted(found, key=lambda pair: pair[0]) if rank]

    def verify(self) -> list[str]:
        """What is wrong with a finished run; empty if it is as if nothing had happened."""
        return [*self._trajectory(), *self._lost(), *self._left(), *self._starts()]

    def _trajectory(self) -> list[str]:
        expected, found = self.site.reference(self.shape.ranks), [stable(entry) for entry in metrics(self.folder)]
        if [entry["step"] for entry in found] != list(range(1, self.site.steps + 1)):
            return [f"steps of metrics.jsonl are not 1 to {self.site.steps}: {len(found)} lines"]
        for a, b in zip(found, expected, strict=True):
            off = [n for n in b if n not in a or abs(a[n] - b[n]) > TOLERANCE * max(1e-3, abs(b[n]))]
            if off:
                return [f"step {b['step']} differs: {[(n, a.get(n), b[n]) for n in off[:3]]}"]
        return []

    def _lost(self) -> list[str]:
        """Starts that began before the last step that had been saved."""
        saved, problems = 0, []
        for found in re.finditer(r" saved \S*step_(\d+)|(starting fresh)|resuming from \S*step_(\d+)", self.log()):
            if found[1]:
                saved = int(found[1])
            elif int(found[3] or 0) < saved:
                problems.append(f"step {saved} was saved, but a start began at {found[3] or 0}")
        return problems

    def _left(self) -> list[str]:
        end = time.monotonic() + 60
        while (alive := self.processes()) and time.monotonic() < end:
            time.sleep(1)
        left = [*self.folder.glob("run.lock*"), *self.folder.glob("checkpoints/step_*.*"), *self.folder.glob(".*.tmp"),
                *(self.folder / name for name in ("stop", "save") if (self.folder / name).exists())]  # fmt: skip
        return [*(f"left: {path.name}" for path in left), *(f"orphan: {process.cmdline()}" for process in alive)]

    def _starts(self) -> list[str]:
        starts = len(list((self.folder / "logs").glob("*.0.log")))
        return [f"{starts} starts, but events account for {self.given} at most"] if starts > self.given else []

    def as_json(self) -> str:
        """For a message."""
        return json.dumps({"run": str(self.folder), "shape": self.shape.name, "jobs": self.jobs})


def submit_tasks(site: Site, shape: Shape, folder: Path, *tasks: int | None) -> str:
    """sbatch for one run, or an array of tasks whose run folders end with their numbers; returns the job's number."""
    array = [f"--array={','.join(map(str, tasks))}"] if tasks[0] is not None else []
    name = "%A_%a" if array else "%j"
    run = f"run_dir={folder.with_name(folder.name.rsplit('_', 1)[0] + '_%a') if array else folder}"
    options = (f"--nodes={shape.nodes}", f"--ntasks-per-node={shape.per_node}", f"--gpus-per-node={shape.per_node}",
               f"--output={site.cluster.folder}/{name}.log", *array)  # fmt: skip
    hooks = PATIENCE | {"PYTHONPATH": str(site.folder / "hooks")}
    if not shape.torchrun:
        return site.cluster.submit("train", *shape.settings(site.steps), run, options=options, **hooks)
    hooks["PYTHONPATH"] += f":{ROOT}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ("sbatch", "--parsable", "--mem=1G", *options, str(site.script), *shape.settings(site.steps))
    return site.cluster.call(*command, RUN=str(folder), PATH=path, **hooks).strip()
