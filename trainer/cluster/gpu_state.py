"""What driver and kernel say of one GPU: memory errors, faults of the hardware, clocks that are held down.

| found                                     | where                          | then                            |
|-------------------------------------------|--------------------------------|---------------------------------|
| uncorrected memory errors since the reset | nvidia-smi                     | a problem: the node is left out |
| clocks held down by heat or power supply  | nvidia-smi, at two looks       | a warning                       |
| fault of the hardware (Xid) in a day      | dmesg, where users may read it | a warning                       |

Slow clocks are no reason to refuse: the only node there is may be a hot one. All ranks then go at its pace, which the
warning says.
"""

import re
import shutil
import subprocess
import time
from dataclasses import dataclass, field

# Since driver 535 "event", before "throttle". Without those by design: idle, a power cap, clocks that somebody has set.
_PREFIXES = ("clocks_event_reasons", "clocks_throttle_reasons")
_REASONS = {
    "hw_thermal_slowdown": "heat", "sw_thermal_slowdown": "heat", "hw_power_brake_slowdown": "its power supply",
    "hw_slowdown": "its hardware",
}  # fmt: skip
PAUSE_SECONDS = 0.5  # a change of clocks shows as a slowdown for an instant
# NVIDIA's list of Xids: those that tell of the GPU, its memory, firmware or links, and not of the program on it.
_XIDS = {
    48: "double-bit memory error", 62: "fault of its controller", 64: "memory could not be repaired",
    74: "NVLink error", 79: "fallen off the bus", 94: "memory error, contained", 95: "memory error, not contained",
    119: "firmware does not answer", 120: "firmware fault",
}  # fmt: skip
_XID = re.compile(r"^\[ *(?P<time>[\d.]+)\] NVRM: Xid \(PCI:(?P<address>[\da-fA-F:]+)[.\d]*\): (?P<number>\d+)", re.M)
XID_SECONDS = 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class GpuState:
    """Driver version, and sentences."""

    driver: str
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_gpu(address: str, where: str) -> GpuState:
    """Of the GPU with a PCI address; `where` names it in sentences."""
    problems, warnings = list[str](), list[str]()
    answer = _query(address, "driver_version", "ecc.errors.uncorrected.volatile.total")
    if answer is None:
        warnings.append(f"{where}: nvidia-smi does not answer, so neither its memory errors nor its clocks are known")
    driver, errors = answer or ("", "")
    if errors.isdigit() and int(errors):
        problems.append(f"{where} has {errors} uncorrected memory errors: reset or replace it")
    if reasons := _held_down(address):
        causes = " and ".join(dict.fromkeys(_REASONS[reason] for reason in reasons))
        warnings.append(
            f"{where}: clocks are held down by {causes} ({', '.join(reasons)}), and all ranks wait for it: see "
            "`nvidia-smi -q -d PERFORMANCE,TEMPERATURE` there, or leave the node out with --exclude"
        )
    if xids := _faults(address):
        warnings.append(f"{where}: {xids} in the last day (dmesg): if runs fail there, leave the node out (--exclude)")
    return GpuState(driver=driver, problems=problems, warnings=warnings)


def _query(address: str, *fields: str) -> list[str] | None:
    """Their values; None where nvidia-smi is missing, hangs, or does not know one of them."""
    command = ["nvidia-smi", f"--id={address}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return values if done.returncode == 0 and len(values) == len(fields) else None


def _held_down(address: str) -> list[str]:
    """Reasons that are active at two looks, the special ones before the general one that they imply."""
    seen = [set(_REASONS), set(_REASONS)]
    for look in range(2):
        for prefix in _PREFIXES:
            if (values := _query(address, *(f"{prefix}.{reason}" for reason in _REASONS))) is not None:
                seen[look] = {reason for reason, value in zip(_REASONS, values, strict=True) if value == "Active"}
                break
        else:
            return []
        if not seen[look]:
            return []
        time.sleep(PAUSE_SECONDS * (look == 0))
    both = [reason for reason in _REASONS if reason in seen[0] & seen[1]]
    return [reason for reason in both if reason != "hw_slowdown" or len(both) == 1]


def _faults(address: str) -> str:
    """Xids of this GPU with their numbers of times; empty also where the kernel's messages may not be read."""
    if shutil.which("dmesg") is None:
        return ""
    done = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=30, check=False)
    since, bus = time.clock_gettime(time.CLOCK_BOOTTIME) - XID_SECONDS, address.rpartition(".")[0].lower()
    recent = (m for m in _XID.finditer(done.stdout) if float(m["time"]) >= since and m["address"].lower() == bus)
    numbers = [int(m["number"]) for m in recent if int(m["number"]) in _XIDS]
    return ", ".join(f"{numbers.count(n)} x Xid {n} ({_XIDS[n]})" for n in dict.fromkeys(numbers))
