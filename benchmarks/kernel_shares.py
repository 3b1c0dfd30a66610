"""What kinds of kernels a GPU's time goes to, in one profiled call."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

# By their names, the first that matches: attention's kernels contain products, but are not counted as such.
KINDS = (
    ("attention", r"flash|fmha|cudnn.*sdpa|attention"),
    ("products", r"gemm|nvjet|cutlass|xmma|cublas|splitk"),
    ("communication", r"nccl"),
    ("fused passes", r"^triton_"),
    ("row sums", r"_sum_rows"),
    ("copies", r"memcpy|memset|copy|CatArray"),
    ("optimizer", r"multi_tensor|FusedAdam|foreach"),
)


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other passes")


def kernel_seconds(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds of each kind of kernels that a call starts on the GPU, the largest first; nothing without one."""
    if not torch.cuda.is_available():
        call()
        return {}
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        torch.cuda.synchronize()
    seconds: Counter[str] = Counter()
    for event in profiler.events() or []:
        if event.device_type.name == "CUDA":
            seconds[kind_of(event.name)] += event.time_range.elapsed_us() / 1e6
    return dict(seconds.most_common())


def shares(seconds: dict[str, float]) -> str:
    """One line for a reader."""
    total = sum(seconds.values())
    parts = ", ".join(f"{kind} {value / total:.0%}" for kind, value in seconds.items())
    return f"kernels of a step take {1e3 * total:.1f} ms: {parts}"
