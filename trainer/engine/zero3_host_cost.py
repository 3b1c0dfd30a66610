"""ZeRO-3's bookkeeping of DeepSpeed 0.19.8, done once instead of in every pass: half of it is found anew each time.

Around each pass of a block DeepSpeed walks its modules for their parameters several times, writes messages that it does
not print, asks for its rank, wraps each input in autograd functions, and waits for gathers: measured on a CPU
(benchmarks/host_time.py) that takes the host as long as starting three quarters of the block's kernels. Here

- the coordinator keeps each module's parameters after the first steps, and lets the host be two fetches ahead of the
  GPU: DeepSpeed counts parameters, of which a block has fifteen, so the host waited for every gather;
- a block has one hook before it and one after it, and one autograd function for all its inputs;
- gathers are those of trainer/engine/zero3_gather.py.

DeepSpeed's own state (statuses, trace, queue of prefetches) is kept as DeepSpeed keeps it, so that all its other parts
work on, and what it computes is the same to the bit. Where its version is another, or a setting needs what is left out
here, its own bookkeeping stays.
"""

import logging
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, iter_params
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn

from trainer.engine.zero3_blocks import add_together, simplify_hooks
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
}  # fmt: skip


class _PartitionedParameterCoordinator(PartitionedParameterCoordinator):  # type: ignore[misc]
    """Named as its base is, so that Python's private names (`self.__step_id`) mean the base's."""

    def start(self, model: nn.Module) -> None:
        """Once, on an object that was made as the base."""
        self.everything = list(model.parameters())
        self.kept: dict[int, tuple[int, list[Any]]] = {}
        self.empty: dict[Any, Tensor] = {}

    def _clear_trace_structures(self) -> None:
        super()._clear_trace_structures()
        self.kept.clear()

    def _parameters(self, module: nn.Module) -> list[Any]:
        """What is fetched for a module, by their ids; `ds_external_parameters` may still grow."""
        num, found = self.kept.get(module.ds_id, (-1, []))
        if num != len(module._external_params):
            found = sorted(set(iter_params(module, recurse=z3_leaf_module(module))), key=lambda p: p.ds_id)
            self.kept[module.ds_id] = len(module._external_params), found
        return found

    def _fetch_sub_module_impl(self, current_submodule: nn.Module, forward: bool, is_leaf: bool) -> None:
        """Gather what the module needs and is not on its way, wait for it, begin to gather what comes next."""
        if not self.is_complete_trace():
            super()._fetch_sub_module_impl(current_submodule, forward, is_leaf)
            return
        params = self._parameters(current_submodule)
        missing = [param for param in params if param.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        if missing:
            self.__all_gather_params(missing, forward)
        self._wait_for(params, current_submodule.ds_id)
        self._leave_queue(params)
        self._prefetch(forward)
        self.__step_id += 1

    def _wait_for(self, params: list[Any], module: int) -> None:
        inflight, handles = self.__inflight_param_registry.data, {}
        for param in params:
            param.ds_active_sub_modules.add(module)
            if param.ds_status is ZeroParamStatus.INFLIGHT:
                handle = inflight.pop(param)
                handles[id(handle)] = handle
            elif param in inflight:  # another module has waited for it
                del inflight[param]
        accelerator = get_accelerator()
        if handles:
            events = self.__ongoing_fetch_events
            with accelerator.stream(self.__allgather_stream):
                while events and events[0].query():
                    events.popleft()
                if len(events) > self.__max_ongoing_fetch_events:
                    events.popleft().synchronize()
                for handle in handles.values():
                    handle.wait()
                if not accelerator.handles_memory_backpressure():
                    event = accelerator.Event()
                    event.record()
                    events.append(event)
        if not accelerator.resolves_data_dependency():
            accelerator.current_stream().wait_stream(self.__allgather_stream)

    def _leave_queue(self, params: list[Any]) -> None:
        """Take this module's parameters off the queue of prefetches, where they are the next."""
        recent, queue, step = self.__most_recent_step_id_param_fetched_for, self.__param_queue, self.__step_id
        wanted = {param for param in params if recent[param] < step}
        found = set()
        while queue and len(found) < len(wanted):
            entry = queue.popleft()
            recent[entry.param] = entry.step_id_last_used_at
            found.add(entry.param)
        if found != wanted:
            raise RuntimeError(f"tracing error at step {step}: {[p.ds_id for p in wanted]}, {[p.ds_id for p in found]}")

    def _prefetch(self, forward: bool) -> None:
        recent, queue = self.__most_recent_step_id_param_fetched_for, self.__param_queue
        limit = min(self.__max_n_available_params - self.__n_available_params, self.__prefetch_bucket_sz)
        num, wanted = 0, {}
        while queue and num < limit:
            entry = queue.popleft()
            param = entry.param
            recent[param] = max(recent[param], entry.step_id_last_used_at)
            if param.ds_status is ZeroParamStatus.NOT_AVAILABLE and param.ds_id not in wanted:
                wanted[param.ds_id] = param
                num += param.ds_numel
        if wanted:
            self.__all_gather_params(list(wanted.values()), forward)

    @torch.no_grad()
    def release_sub_module(self, submodule: nn.Module, forward: bool = False) -> None:
        """Forget a module's gathered parameters, as far as no other needs them soon."""
        if not self.is_complete_trace():
            super().release_sub_module(submodule, forward=forward)
            return
        wanted = self.__params_to_release(submodule, self.__step_id)
        if not forward:
            self.__active_backward_submodules.pop(submodule.ds_id, None)
        for param in self._parameters(submodule):
            param.ds_active_sub_modules.discard(submodule.ds_id)
            if param.ds_id in wanted and not param.is_external_param:
                self._free(param)

    def _free(self, param: Any) -> None:
        if param.ds_status is not ZeroParamStatus.AVAILABLE or param.ds_active_sub_modules:
            return
        if not get_accelerator().is_synchronized_device():
            param.data.record_stream(get_accelerator().current_stream())
        empty = self.empty.get(param.dtype)
        if empty is None:
            empty = self.empty[param.dtype] = torch.empty(0, dtype=param.dtype, device=param.device)
        param.data = empty
        param.ds_status = ZeroParamStatus.NOT_AVAILABLE
        self.__n_available_params -= param.ds_numel

    @torch.no_grad()
    def release_and_reset_all(self, module: nn.Module) -> None:
        """Forget all gathered parameters, persistent ones too."""
        inflight = self.__inflight_param_registry.data
        for param in self.everything:
            if param in inflight:
                inflight.pop(param).wait()
            param.ds_active_sub_modules.clear()
            self._free(param)


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
    why = _obstacle(engine)
    if why:
        if deepspeed.comm.get_rank() == 0:
            logger.info("DeepSpeed keeps its own bookkeeping of ZeRO-3, which costs the host more: %s", why)
        return
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    coordinator.__class__ = _PartitionedParameterCoordinator
    coordinator.start(engine.module)
    simplify_hooks(engine.optimizer)
    add_together(engine.optimizer)
    if not engine._config.zero_config.use_all_reduce_for_fetch_params:
        for parameter in engine.module.parameters():
            parameter.all_gather_coalesced = partial(parameter.all_gather_coalesced.func, gather)
