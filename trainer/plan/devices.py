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
class HostCost:
    """Seconds in which Python starts the kernels of one block, both ways.

    Measured on a CPU with shapes so tiny that kernels take no time, by `benchmarks.host_time`; `scale` takes them to a
    machine with GPUs. It is fitted to two eager steps that waited for the host: an H100's says 6.9, an H200's 5.4.
    """

    scale: float = 6.2
    eager: float = 2.6e-3  # ZeRO 1 and 2
    eager_stage3: float = 2.25e-3  # with DeepSpeed's own bookkeeping 3.7e-3
    compiled: float = 1.4e-3  # ZeRO 1 and 2
    compiled_stage3: float = 1.1e-3
    shared: float = 0.3e-3  # more in stage 3 on several ranks: a block's gathers and its reduction
    ends: float = 4.1e-3  # of what is outside of blocks, once per micro-batch, in ZeRO 1 and 2
    ends_stage3: float = 2.8e-3  # with DeepSpeed's own 6.5e-3
    update: float = 0.47e-3  # of optimizer step and average in ZeRO 1 and 2, per block and step; the ends count as two
    update_stage3: float = 0.13e-3  # with DeepSpeed's own 0.25e-3


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of a device's nominal numbers that a training step reaches (0 to 1), and fixed costs.

    Measured are what says so; docs/plan.md has the numbers behind them. The others are estimates.
    """

    gemm: float = 0.72  # measured (H100): of peak FLOP/s, of the matrix products alone
    rows: int = 512  # an expert with fewer rows than this reaches less of `gemm`
    attention: float = 0.58  # fitted to six timings (H100): of peak FLOP/s, of attention's own products
    attention_hbm: float = 0.48  # the same: of memory bandwidth, of what attention reads and writes
    eager: float = 0.44  # fitted to one profile (H100): of memory bandwidth, of the counted bytes of eager kernels
    fused: float = 0.65  # derived from it: GELU and sums of two tensors reach 0.87, layer norms and other sums 0.55
    hbm: float = 0.80  # measured (H100): AdamW 0.77, a copy 0.90
    host: HostCost = HostCost()
    node: float = 0.70
    nic: float = 0.80
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
