"""The memory limit of this process's job, as the kernel has it: cgroups of version 1 and 2.

Slurm, Kubernetes and systemd limit a group of processes above this one, on a node that has more. Past it the kernel
ends a process without a word.
"""

import math
from pathlib import Path

from trainer.plan.devices import GB
from trainer.plan.job import Job, Layout
from trainer.plan.memory import host_bytes

LEAST = 8 * GB  # a process: Python, torch, CUDA's context and data workers take about 5
_NAMES = {1: ("memory.limit_in_bytes",), 2: ("memory.max", "memory.high")}  # `high` slows down, until nothing moves


def read_limit(root: Path = Path("/")) -> float:
    """The least limit of the groups that this process is in, in bytes; infinite without one. `root` is for tests."""
    groups = root / "proc/self/cgroup"
    found, present = [math.inf], float((root / "proc/meminfo").read_text().split()[1]) * 1024
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        folder = mount / path.strip("/")  # in a container the path may be one that only the host sees
        for place in (folder, *folder.parents):
            found += [_bytes(place / name) for name in _NAMES[1 if controllers else 2] if (place / name).is_file()]
            if place == mount:
                break
    least = min(found)
    return least if least < present else math.inf  # version 1 says "none" by a huge number


def _bytes(path: Path) -> float:
    text = path.read_text().strip()
    return math.inf if text == "max" else float(text)


def limit_warning(limit: float, job: Job, layout: Layout, processes: int) -> str:
    """The sentence if a process's share of the limit is small; empty otherwise. `processes` share it on each node."""
    asked, share = max(LEAST, host_bytes(job, layout)), limit / processes
    if share >= asked:
        return ""
    return (
        f"the job may use {limit / GB:.1f} GB of each node's memory, {share / GB:.1f} for each of its {processes} "
        f"processes, which want about {asked / GB:.0f}: submit with more --mem (0 is all of the node)"
    )
