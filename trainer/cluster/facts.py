"""What one process finds out about its node, without talking to any other process."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from trainer.cluster.binding import read_binding
from trainer.cluster.gpu_state import read_gpu
from trainer.cluster.memory_limit import limit_warning, read_limit
from trainer.cluster.node import node_name
from trainer.config import ConfigError, TrainConfig, require
from trainer.distributed import World
from trainer.files import git_commit
from trainer.plan.job import Job, Layout
from trainer.plan.memory import checkpoint_bytes, memory_need

WRITE_BYTES = 1 << 26
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Findings of one process; what concerns the whole node is filled in by the node's first process only.

    `problems` says what is wrong, each with its remedy; a healthy node has none. `warnings` do not stop a start.
    Sizes in GiB, speed in MiB/s.
    """

    rank: int
    node: str
    device: str
    driver: str = ""
    device_free: float = 0.0
    bound: str = "none"
    memory: float = 0.0
    disk_free: float = 0.0
    write_speed: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def gather_facts(config: TrainConfig, world: World, check_run: Callable[[], tuple[Job, Layout]]) -> Facts:
    """Look at this process's device, and as the first of its node at memory, disk, data and versions.

    `check_run` makes the checks of a start, reads a sample, and returns what the planner needs to count memory.
    """
    problems: list[str] = []
    warnings: list[str] = []
    device, driver, device_free = _device(world, problems, warnings)
    binding = read_binding(_pci_address(world) if device_free else "")
    if os.environ.get("SLURM_JOB_ID") and (words := binding.warning(world.local_size or world.size)):
        warnings.append(words)
    shared: dict[str, float] = {}
    if world.local_rank == 0:
        limit, processes = read_limit(), world.local_size or world.size
        shared["memory"] = min(psutil.virtual_memory().available, limit) / GIB
        with _noting(problems, "configuration and data"):
            job, layout = check_run()
            _check_room(job, layout, device_free, shared["memory"] / processes, warnings)
            if words := limit_warning(limit, job, layout, processes):
                warnings.append(words)
        with _noting(problems, f"run_dir={config.run_dir}"):
            shared["disk_free"], shared["write_speed"] = check_disk(Path(config.run_dir))
    return Facts(
        rank=world.rank, node=node_name(), device=device, driver=driver, device_free=device_free,
        bound=str(binding),
        versions=_versions(), problems=problems, warnings=warnings, **shared,
    )  # fmt: skip


@contextmanager
def _noting(problems: list[str], what: str) -> Iterator[None]:
    """What goes wrong in the block becomes a problem in the list, not an error."""
    try:
        yield
    except ConfigError as error:
        problems.append(str(error))
    except (OSError, RuntimeError) as error:
        problems.append(f"{what}: {type(error).__name__}: {error}")


def _device(world: World, problems: list[str], warnings: list[str]) -> tuple[str, str, float]:
    """Name, driver and free memory of this process's GPU after a product on it; a CPU has none of these."""
    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""  # --gpus-per-node=0 on nodes that have some
        if os.environ.get("SLURM_GPUS_ON_NODE") and not hidden and shutil.which("nvidia-smi"):
            problems.append("the job has GPUs that torch cannot use: see nvidia-smi on the node")
        return "cpu", "", 0.0
    if world.local_rank >= torch.cuda.device_count():
        problems.append(f"{torch.cuda.device_count()} GPUs for process {world.local_rank}: one task per GPU")
        return "none", "", 0.0
    with _noting(problems, f"GPU {world.local_rank}"):
        torch.cuda.set_device(world.local_rank)
        ones = torch.ones(1024, 1024, device="cuda", dtype=torch.bfloat16)
        require(bool(((ones @ ones) == 1024).all()), f"GPU {world.local_rank} multiplies wrongly: replace it")
        free, _ = torch.cuda.mem_get_info()
        state = read_gpu(_pci_address(world), f"GPU {world.local_rank} of node {node_name()}")
        problems += state.problems
        warnings += state.warnings
        return torch.cuda.get_device_name(), state.driver, free / GIB
    return "broken", "", 0.0


def _pci_address(world: World) -> str:
    """Of this process's GPU, as in /sys/bus/pci/devices."""
    found: Any = torch.cuda.get_device_properties(world.local_rank)  # torch's stubs lack these fields
    return f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"


def _check_room(job: Job, layout: Layout, device_free: float, memory: float, warnings: list[str]) -> None:
    """Room for a process in its device or its share of the node's memory (GiB), and for two checkpoints on the disk."""
    run_dir = job.config.run_dir
    need, available = memory_need(job, layout, on_device=device_free > 0), (device_free or memory) * GIB
    if warning := need.warning(available):
        warnings.append(warning)
    require(not need.problem(available), need.problem(available))
    needed, free = 2 * checkpoint_bytes(job), shutil.disk_usage(nearest_folder(Path(run_dir))).free
    require(
        free >= needed,
        f"run_dir={run_dir} has {free / GIB:.1f} GiB free, two checkpoints take {needed / GIB:.1f}: free space",
    )


def nearest_folder(path: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def check_disk(run_dir: Path) -> tuple[float, float]:
    """Free GiB of the disk and MiB/s written to it; checks that a rename replaces a file. Leaves no file behind."""
    folder = nearest_folder(run_dir)
    old, new = (folder / f".doctor.{node_name()}.{os.getpid()}.{name}" for name in ("old", "new"))
    try:
        old.write_text("old")
        content, start = os.urandom(WRITE_BYTES), time.perf_counter()
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - start
        os.replace(new, old)
        require(
            old.stat().st_size == WRITE_BYTES and not new.exists(),
            f"run_dir={run_dir}: a file does not replace another at once on this file system: choose another",
        )
    finally:
        old.unlink(missing_ok=True)
        new.unlink(missing_ok=True)
    return shutil.disk_usage(folder).free / GIB, WRITE_BYTES / seconds / (1 << 20)


def _versions() -> dict[str, str]:
    """Versions that must be the same on all nodes."""
    found = {name: version(name) for name in ("torch", "deepspeed", "numpy")} | {"code": git_commit()}
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found
