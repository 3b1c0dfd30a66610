"""Which cores and memory a process is bound to, and whether they lie beside its GPU: as the kernel has it.

A process on the cores of one NUMA node gets its memory there, too (the kernel places pages where they are first
touched), unless a policy says otherwise. Data loading and copies to a GPU beside another node cross between CPUs.
"""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Binding:
    """`cores` of the node's `all_cores`; numbers of the NUMA nodes of the cores, of the memory, and beside the GPU.

    `gpu_node` is -1 without a GPU, or where the machine does not say.
    """

    cores: int
    all_cores: int
    cpu_nodes: tuple[int, ...]
    memory_nodes: tuple[int, ...]
    gpu_node: int = -1

    def __str__(self) -> str:
        """For the doctor's table: `none`, or the number of cores and their NUMA nodes, and of the memory if other."""
        if self.cores >= self.all_cores:
            return "none"
        memory = f", memory {_numbers(self.memory_nodes)}" if self.memory_nodes != self.cpu_nodes else ""
        return f"{self.cores} cores of NUMA {_numbers(self.cpu_nodes)}{memory}"

    def warning(self, num_processes: int) -> str:
        """What to mend, empty if nothing: for a node with so many processes."""
        if self.cores >= self.all_cores and num_processes > 1:
            return (
                f"{num_processes} processes on each node share all {self.all_cores} cores: see CPU_BIND in slurm/env.sh"
            )
        if self.gpu_node >= 0 and self.cpu_nodes and self.gpu_node not in self.cpu_nodes:
            return (
                f"a process runs on NUMA {_numbers(self.cpu_nodes)} and its GPU is beside NUMA {self.gpu_node}: set "
                "CPU_BIND=map_ldom:... in slurm/env.sh"
            )
        return ""


def read_binding(pci_address: str = "", root: Path = Path("/")) -> Binding:
    """Of this process; `pci_address` is its GPU's, as in /sys/bus/pci/devices. `root` is for tests."""
    mine = os.sched_getaffinity(0)
    nodes = {
        int(path.name.removeprefix("node")): parse_list((path / "cpulist").read_text())
        for path in (root / "sys/devices/system/node").glob("node[0-9]*")
    }
    status = (root / "proc/self/status").read_text().splitlines()
    allowed = next((line.split(":")[1] for line in status if line.startswith("Mems_allowed_list")), "")
    gpu = root / "sys/bus/pci/devices" / pci_address / "numa_node"
    return Binding(
        cores=len(mine),
        all_cores=max(sum(map(len, nodes.values())), os.cpu_count() or 1) if nodes else os.cpu_count() or 1,
        cpu_nodes=tuple(sorted(node for node, cores in nodes.items() if cores & mine)),
        memory_nodes=_memory_nodes(root, parse_list(allowed) & nodes.keys(), mine, nodes),
        gpu_node=int(gpu.read_text()) if pci_address and gpu.is_file() else -1,
    )


def _memory_nodes(root: Path, allowed: set[int], mine: set[int], nodes: dict[int, set[int]]) -> tuple[int, ...]:
    """Where new pages go: the policy of this process (numactl, srun --mem-bind), else beside its cores if allowed."""
    first = next(iter((root / "proc/self/numa_maps").read_text().splitlines()), "") if nodes else ""
    policy = first.split()[1] if first else "default"
    if policy.startswith(("bind:", "interleave:", "prefer:")):
        return tuple(sorted(parse_list(policy.split(":")[1])))
    beside = {node for node, cores in nodes.items() if cores & mine}
    return tuple(sorted(beside & allowed or allowed))


def parse_list(text: str) -> set[int]:
    """The kernel's lists: `0-3,8` is 0, 1, 2, 3 and 8."""
    ends = (part.split("-") for part in text.strip().split(",") if part.strip())
    return {number for pair in ends for number in range(int(pair[0]), int(pair[-1]) + 1)}


def _numbers(nodes: tuple[int, ...]) -> str:
    return "+".join(map(str, nodes)) or "?"
