"""Devices that a job can be planned for, and how much of their nominal speed a training step reaches."""

from dataclasses import dataclass, replace

from trainer.config import require

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator in its node. Bandwidths are bytes per second and direction, as sold."""

    name: str
    flops: float  # dense bf16
    memory: float
    hbm: float
    node: float  # to the other devices of the node (NVLink)
    nic: float  # to other nodes, one network card per device
    per_node: int = 8


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of nominal speed, and fixed costs.

    `gemm`, `passes` and `host` are fitted to `benchmarks.step` on one H200 (ZeRO-3, bf16, widths 1152 and 2304) and to
    a profile of it. `gemm`: share of peak of the matrix products alone; fewer than `rows` rows per expert lower it.
    `passes`: bytes that norms, modulation, rotation, activations and casts move, forward and backward, per token,
    width and block, as PyTorch runs them one by one. `host`: seconds in which Python starts a block's kernels, forward
    and backward, DeepSpeed's hooks included; a small micro-batch does not get below it.
    The others are estimates. `hidden`: share of ZeRO-3's gathers and reductions behind compute with overlap_comm;
    stages 1 and 2 here run without. All-to-alls hide behind nothing.
    """

    gemm: float = 0.65
    passes: float = 1800.0
    host: float = 20e-3
    rows: int = 512
    node: float = 0.70
    nic: float = 0.80
    hbm: float = 0.80
    hidden: float = 0.90
    memory: float = 0.90
    reserved: float = 4e9  # device context, communication library, fragments
    latency: float = 40e-6  # of one collective


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
