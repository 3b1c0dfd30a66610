"""The doctor's reading of cores and memory: on made-up nodes, and of a process that is really bound."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests_launcher import ROOT

from trainer.cluster.binding import Binding, parse_list, read_binding

NEAR = Binding(cores=12, all_cores=96, cpu_nodes=(1,), memory_nodes=(1,), gpu_node=1)


def test_lists_of_the_kernel() -> None:
    assert parse_list("0-3,8\n") == {0, 1, 2, 3, 8} and parse_list("\n") == set()


def test_what_is_said_of_a_binding() -> None:
    assert str(NEAR) == "12 cores of NUMA 1" and NEAR.warning(8) == ""
    assert str(replace(NEAR, memory_nodes=(0, 1))) == "12 cores of NUMA 1, memory 0+1"
    far = replace(NEAR, gpu_node=0).warning(8)
    assert far.startswith("a process runs on NUMA 1 and its GPU is beside NUMA 0: ")
    free = replace(NEAR, cores=96, cpu_nodes=(0, 1))
    assert str(free) == "none" and free.warning(1) == ""
    assert free.warning(8).startswith("8 processes on each node share all 96 cores: ")


def made_up(root: Path, policy: str) -> Path:
    """This machine as a node of two NUMA nodes, the cores of this process on the second, a GPU beside the first."""
    mine = sorted(os.sched_getaffinity(0))
    for number, cores in enumerate((range(900, 904), mine)):
        (root / f"sys/devices/system/node/node{number}").mkdir(parents=True)
        (root / f"sys/devices/system/node/node{number}/cpulist").write_text(",".join(map(str, cores)) + "\n")
    (root / "sys/bus/pci/devices/0000:17:00.0").mkdir(parents=True)
    (root / "sys/bus/pci/devices/0000:17:00.0/numa_node").write_text("0\n")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/status").write_text("Name:\tpython\nMems_allowed_list:\t0-1\n")
    (root / "proc/self/numa_maps").write_text(f"55d4c0000000 {policy} file=/usr/bin/python3 N1=3\n")
    return root


@pytest.mark.parametrize(("policy", "memory"), [("default", (1,)), ("bind:0", (0,)), ("interleave:0-1", (0, 1))])
def test_memory_follows_the_policy_and_else_the_cores(tmp_path: Path, policy: str, memory: tuple[int, ...]) -> None:
    found = read_binding("0000:17:00.0", made_up(tmp_path, policy))
    assert (found.cpu_nodes, found.memory_nodes, found.gpu_node) == ((1,), memory, 0)
    assert found.cores == len(os.sched_getaffinity(0)) < found.all_cores


def test_a_process_on_one_core_knows_it() -> None:
    core = min(os.sched_getaffinity(0))
    code = (
        f"import os\nos.sched_setaffinity(0, [{core}])\nfrom trainer.cluster.binding import read_binding\n"
        "print(read_binding().cores, read_binding().all_cores)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", str(os.cpu_count())], done.stderr
