"""ZeRO-3's bookkeeping of DeepSpeed 0.19.8, done once instead of in every pass: half of it is found anew each time.

Around each pass of a block DeepSpeed walks its modules for their parameters several times, writes messages that it does
not print, asks for its rank, wraps each input in autograd functions, and waits for gathers: on a CPU four fifths of
what starting the block's kernels costs the host (benchmarks/host_time.py). In its place

- the coordinator keeps what it found (zero3_coordinator.py),
- a block has one hook before it and one after it, the rest of the model one in all (zero3_blocks.py),
- a gathered parameter is one copy, whatever the number of ranks (zero3_gather.py),
- gradients are reduced a bucket at once, not one by one (zero3_gradients.py).

DeepSpeed's own state (statuses, trace) is kept as DeepSpeed keeps it, so that all its other parts work on, and what it
computes is the same to the bit. Where its version is another, or a setting needs what is left out
here, its own bookkeeping stays.
"""

import logging
from functools import partial
from typing import Any

import deepspeed
import deepspeed.comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from trainer.engine import zero3_gradients
from trainer.engine.zero3_blocks import simplify_hooks
from trainer.engine.zero3_coordinator import keep_between_steps
from trainer.engine.zero3_gather import gather

logger = logging.getLogger("ec_dit")
VERSION = "0.19.8"
PRIVATE = (
    "all_gather_params", "allgather_stream", "inflight_param_registry", "max_n_available_params",
    "max_ongoing_fetch_events", "most_recent_step_id_param_fetched_for", "n_available_params", "ongoing_fetch_events",
    "active_backward_submodules", "param_queue", "params_to_release", "prefetch_bucket_sz", "step_id",
)  # fmt: skip
# With another value a pass has steps that are left out here.
PLAIN_SETTINGS = {
    "allgather_sequential": False, "module_granularity_threshold": 0, "offload_param": None,
    "zero_hpz_partition_size": 1, "zero_quantized_nontrainable_weights": False, "zero_quantized_weights": False,
    "zenflow": None,
}  # fmt: skip


def _obstacle(engine: Any) -> str:
    """Why DeepSpeed's own bookkeeping must stay, or "" if nothing is in the way."""
    if deepspeed.__version__ != VERSION:
        return f"deepspeed is {deepspeed.__version__}, and {VERSION} is what was looked into"
    optimizer = engine.optimizer
    offload = optimizer.parameter_offload
    coordinator = offload.get_param_coordinator()
    if type(coordinator) is not PartitionedParameterCoordinator:
        return f"its coordinator is a {type(coordinator).__name__}"
    prefix = "_PartitionedParameterCoordinator__"
    missing = [name for name in PRIVATE if not hasattr(coordinator, prefix + name)]
    if missing:
        return f"its coordinator lacks {', '.join(missing)}"
    settings = engine._config.zero_config
    for name, plain in PLAIN_SETTINGS.items():
        value = getattr(settings, name)
        if value != plain and not (value is None or getattr(value, "device", None) == "none"):
            return f"zero_optimization.{name} is {value}"
    if not all(parameter.requires_grad for parameter in engine.module.parameters()):
        return "some parameters are not trained"
    return ""


def lighten(engine: Any) -> None:
    """Replace the bookkeeping of an engine of stage 3, or say in the log why not."""
    if why := _obstacle(engine):
        _say("keeps its own bookkeeping of ZeRO-3", why)
        return
    keep_between_steps(engine)
    simplify_hooks(engine)
    if why := zero3_gradients.obstacle(engine.optimizer):
        _say("reduces ZeRO-3's gradients by its own code", why)
    else:
        zero3_gradients.reduce_together(engine.optimizer)
    if not engine._config.zero_config.use_all_reduce_for_fetch_params:
        for parameter in engine.module.parameters():
            parameter.all_gather_coalesced = partial(parameter.all_gather_coalesced.func, gather)
    # Asked at each reduction of gradients; on a CPU DeepSpeed starts a program every time to count.
    accelerator = get_accelerator()
    accelerator.device_count = partial(int, accelerator.device_count())


def _say(what: str, why: str) -> None:
    if deepspeed.comm.get_rank() == 0:
        logger.info("DeepSpeed %s, which costs the host more: %s", what, why)
