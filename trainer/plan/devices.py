"""Devices that a job can be planned for, and how much of their nominal speed a training step reaches."""

from dataclasses import dataclass, replace

from trainer.errors import require

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator in its node, as sold: FLOP/s of dense bf16, bytes, bytes per second and direction."""

    name: str
    flops: float
    memory: float
    hbm: float  # bandwidth of its own memory
    node: float  # to the other devices of the node (NVLink)
    nic: float  # to other nodes, one network card per device
    per_node: int = 8


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of a device's nominal numbers that a training step reaches (0 to 1), and fixed costs.

    `gemm`, `passes` and `host` are fitted to `benchmarks.step` on one H200 (ZeRO-3, bf16, widths 1152 and 2304) and to
    a profile of it; the others are estimates.
    """

    gemm: float = 0.65  # of peak FLOP/s, of the matrix products alone
    rows: int = 512  # an expert with fewer rows than this reaches less of `gemm`
    passes: float = 1800.0  # bytes per token, width and block that all but matrix products move, forward and backward
    host: float = 20e-3  # seconds in which Python starts a block's kernels, both ways: a small micro-batch takes these
    node: float = 0.70
    nic: float = 0.80
    hbm: float = 0.80
    hidden: float = 0.90  # of ZeRO-3's gathers and reductions behind compute (overlap_comm); all-to-alls never hide
    memory: float = 0.90
    reserved: float = 4e9  # bytes: device context, communication library, fragments
    latency: float = 40e-6  # seconds of one collective


DEVICES = {
    device.name: device
    for device in (
        Device(name="a100", flops=312e12, memory=80 * GB, hbm=2.04e12, node=300 * GB, nic=25 * GB),
        Device(name="h100", flops=989e12, memory=80 * GB, hbm=3.35e12, node=450 * GB, nic=50 * GB),
        Device(name="h200", flops=989e12, memory=141 * GB, hbm=4.8e12, node=450 * GB, nic=50 * GB),
        Device(name="b200", flops=2250e12, memory=180 * GB, hbm=7.7e12, node=900 * GB, nic=50 * GB),
    )
}


def find_device(name: str, **given: float | None) -> Device:
    """A known device, with the numbers that are given in place of its own; ConfigError for an unknown one."""
    numbers = {key: value for key, value in given.items() if value is not None}
    if name == "custom":
        missing = [key for key in ("flops", "memory", "hbm", "node", "nic") if key not in numbers]
        require(not missing, f"--device custom has no {', '.join(f'--{key}' for key in missing)}: give all its numbers")
        device = Device(name=name, flops=1, memory=1, hbm=1, node=1, nic=1)
    else:
        require(name in DEVICES, f"--device {name} is not known: use {', '.join(DEVICES)}, or custom with its numbers")
        device = DEVICES[name]
    for key, value in numbers.items():
        require(value > 0, f"--{key.replace('_', '-')} is {value:g}: use more than 0")
    return replace(device, **numbers)  # type: ignore[arg-type]
