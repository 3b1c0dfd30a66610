"""What the doctor reads of a node: GPU, memory limit, name. Both generations of nvidia-smi and of cgroups."""

import math
import subprocess
import time
from pathlib import Path

import pytest

from trainer.cluster import gpu_state
from trainer.cluster.gpu_state import read_gpu
from trainer.cluster.incidents import failure
from trainer.cluster.memory_limit import limit_warning, read_limit
from trainer.cluster.node import node_name
from trainer.config import load_config
from trainer.diffusion.model import ModelShape
from trainer.loop.run_lock import Holder
from trainer.plan.job import Job, Layout

GB = 1e9
ADDRESS = "0000:3b:00.0"
# As drivers 525 (throttle) and 550 (event) answer; an unknown field spoils the whole query.
NVIDIA_SMI = """#!/bin/bash
echo "$*" >>"{folder}/asked"
case "$*" in *--id={address}*) ;; *) echo "No devices were found"; exit 6 ;; esac
case "$*" in
  *driver_version,ecc.errors.uncorrected.volatile.total*) echo "{driver}, {ecc}" ;;
  *clocks_{generation}_reasons.hw_thermal_slowdown*) cat "{folder}/reasons" ;;
  *) echo 'Field "clocks_event_reasons.hw_thermal_slowdown" is not a valid field to query.'; echo; exit 2 ;;
esac
"""


def on_path(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """These programs are found first."""
    for name, text in programs.items():
        path = folder / name.replace("_", "-")
        path.write_text(text)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_state, "PAUSE_SECONDS", 0.0)


@pytest.mark.parametrize("generation", ["event", "throttle"])
@pytest.mark.parametrize(
    ("reasons", "words"),
    [
        ("Not Active, Not Active, Not Active, Not Active", ""),
        ("Active, Not Active, Not Active, Active", "held down by heat (hw_thermal_slowdown), and all ranks wait"),
        (
            "Not Active, Active, Active, Active",
            "by heat and its power supply (sw_thermal_slowdown, hw_power_brake_slow",
        ),
        ("Not Active, Not Active, Not Active, Active", "held down by its hardware (hw_slowdown)"),
        ("[N/A], [N/A], [N/A], [N/A]", ""),
    ],
)
def test_clocks_that_are_held_down_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generation: str, reasons: str, words: str
) -> None:
    smi = NVIDIA_SMI.format(folder=tmp_path, address=ADDRESS, driver="550.54.15", ecc="0", generation=generation)
    on_path(tmp_path, monkeypatch, nvidia_smi=smi, dmesg="#!/bin/bash\nexit 1\n")
    (tmp_path / "reasons").write_text(f"{reasons}\n")
    found = read_gpu(ADDRESS, "GPU 2 of node n7")
    assert (found.driver, found.problems, len(found.warnings)) == ("550.54.15", [], bool(words))
    assert words in "".join(found.warnings) and all(w.startswith("GPU 2 of node n7: clocks") for w in found.warnings)


def test_a_slowdown_of_an_instant_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look finds another reason."""
    looks = f'cat "{tmp_path}/reasons"; echo "Active, Not Active, Not Active, Not Active" >"{tmp_path}/reasons"'
    smi = NVIDIA_SMI.format(folder=tmp_path, address=ADDRESS, driver="1", ecc="0", generation="event")
    on_path(tmp_path, monkeypatch, nvidia_smi=smi.replace(f'cat "{tmp_path}/reasons"', looks), dmesg="#!/bin/bash\n")
    (tmp_path / "reasons").write_text("Not Active, Not Active, Not Active, Active\n")
    assert not read_gpu(ADDRESS, "GPU").warnings
    assert (tmp_path / "asked").read_text().count("hw_slowdown") == 2


def test_memory_errors_are_a_problem_and_no_answer_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ecc, problems in (("3", ["GPU 0 has 3 uncorrected memory errors: reset or replace it"]), ("[N/A]", [])):
        smi = NVIDIA_SMI.format(folder=tmp_path, address=ADDRESS, driver="535", ecc=ecc, generation="event")
        on_path(tmp_path, monkeypatch, nvidia_smi=smi, dmesg="#!/bin/bash\n")
        (tmp_path / "reasons").write_text("Not Active, Not Active, Not Active, Not Active\n")
        assert read_gpu(ADDRESS, "GPU 0").problems == problems
    assert "nvidia-smi does not answer" in read_gpu("0000:ff:00.0", "GPU 0").warnings[0]
    (tmp_path / "nvidia-smi").unlink()
    assert "nvidia-smi does not answer" in read_gpu(ADDRESS, "GPU 0").warnings[0]


def test_late_xids_of_the_hardware_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_state, "XID_SECONDS", 30.0)  # the machine may be up for less than a day
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    lines = [
        f"[{now - 9:12.6f}] NVRM: Xid (PCI:0000:3B:00): 74, pid=<unknown>, name=<unknown>, NVLink: fatal error",
        f"[{now - 8:12.6f}] NVRM: Xid (PCI:0000:3b:00): 74, pid=12, NVLink: fatal error detected on link 6",
        f"[{now - 7:12.6f}] NVRM: Xid (PCI:0000:3b:00): 31, pid=12, name=python, MMU Fault: ENGINE GRAPHICS",
        f"[{now - 6:12.6f}] NVRM: Xid (PCI:0000:18:00): 79, pid=1234, GPU has fallen off the bus.",
        f"[{now - 45:12.6f}] NVRM: Xid (PCI:0000:3b:00): 48, pid=12, DBE (double bit error)",
    ]
    smi = NVIDIA_SMI.format(folder=tmp_path, address=ADDRESS, driver="1", ecc="0", generation="event")
    on_path(tmp_path, monkeypatch, nvidia_smi=smi, dmesg="#!/bin/bash\ncat <<E\n" + "\n".join(lines) + "\nE\n")
    (tmp_path / "reasons").write_text("Not Active, Not Active, Not Active, Not Active\n")
    assert read_gpu(ADDRESS, "GPU 1 of node n7").warnings == [
        "GPU 1 of node n7: 2 x Xid 74 (NVLink error) in the last day (dmesg): if runs fail there, leave the node out "
        "(--exclude)"
    ]


def tree(root: Path, group: str, **limits: str) -> Path:
    """A file system with cgroups; names of files with `__` for `/`."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(group)
    (root / "proc/meminfo").write_text("MemTotal:       1000000000 kB\n")
    for name, text in limits.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("memory_", "memory.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_the_least_limit_of_all_groups_above_counts(tmp_path: Path) -> None:
    slurm = "0::/system.slice/job_7/step_0/task_0\n"
    second = {"system.slice__memory_max": "max", "system.slice__job_7__memory_max": "32000000000",
              "system.slice__job_7__memory_high": "30000000000",
              "system.slice__job_7__step_0__memory_max": "max"}  # fmt: skip
    assert read_limit(tree(tmp_path / "2", slurm, **second)) == 30e9
    first = {"memory__slurm__memory_limit_in_bytes": "9223372036854771712",
             "memory__slurm__job_7__memory_limit_in_bytes": "16000000000"}  # fmt: skip
    old = "11:cpuset,memory:/slurm/job_7\n1:name=systemd:/\n0::/\n"
    assert read_limit(tree(tmp_path / "1", old, **first)) == 16e9
    unlimited = {"memory__slurm__memory_limit_in_bytes": "9223372036854771712"}
    assert read_limit(tree(tmp_path / "none", "4:memory:/slurm\n", **unlimited)) == math.inf
    assert read_limit(tree(tmp_path / "container", "0::/a/b\n", memory_max="4000000000")) == 4e9
    assert read_limit(tree(tmp_path / "bare", "")) == math.inf


def test_a_limit_is_compared_with_what_the_plan_asks(tmp_path: Path) -> None:
    def words(limit: float, *overrides: str, zero: dict[str, object] | None = None) -> str:
        config = load_config("debug", [f"run_dir={tmp_path}", *overrides])
        shape = ModelShape(channels=3, height=32, width=32, text_dim=32)
        job = Job(config=config, shape=shape, text_tokens=8, zero=zero or {})
        layout = Layout(world_size=4, ep_size=1, stage=3, micro_batch_size=8, accumulation=1, recompute=False)
        return limit_warning(limit, job, layout, processes=4)

    assert words(33 * GB) == "" and words(math.inf) == ""
    assert words(31 * GB) == (
        "the job may use 31.0 GB of each node's memory, 7.8 for each of its 4 processes, which want about 8: "
        "submit with more --mem (0 is all of the node)"
    )
    large = ("model.dim=4096", "model.num_layers=32", "model.num_heads=32")
    offloaded = words(33 * GB, *large, zero={"offload_optimizer": {"device": "cpu"}})
    assert "8.2 for each of its 4 processes" in offloaded and not words(33 * GB, *large)
    assert "8.2 for each" in words(33 * GB, *large, "train.async_save=true")


def test_a_node_has_slurms_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    assert node_name() == failure(0, RuntimeError("x")).node == Holder().host == "n7"
    monkeypatch.delenv("SLURMD_NODENAME")
    assert node_name() == subprocess.run(["uname", "-n"], capture_output=True, text=True, check=True).stdout.strip()
