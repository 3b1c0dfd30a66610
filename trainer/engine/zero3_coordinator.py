"""Fetches and releases parameters of ZeRO-3 as DeepSpeed 0.19.8 does, from lists that are made once.

As soon as DeepSpeed knows in which order modules are run, nothing about a module changes between steps: neither its
parameters nor their ids. Until then, and in a pass out of that order, its own code runs.

The host may be two fetches ahead of the GPU, so that what is gathered ahead stays bounded. DeepSpeed says the same, but
counts one for each parameter of a fetch, and a block has fifteen: so its host waited until each gather had ended.
"""

from functools import partial
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, iter_params
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn

NOTHING: list[Any] = []


def keep_between_steps(engine: Any) -> None:
    """Have the coordinator of a stage 3 engine keep its lists."""
    offload = engine.optimizer.parameter_offload
    coordinator = offload.get_param_coordinator()
    coordinator.__class__ = _PartitionedParameterCoordinator
    coordinator.start(engine.module)
    # DeepSpeed's walks over the model once more to see that it is so.
    offload.partition_all_parameters = partial(coordinator.release_and_reset_all, engine.module)


class _PartitionedParameterCoordinator(PartitionedParameterCoordinator):  # type: ignore[misc]
    """Named as its base is, so that Python's private names (`self.__step_id`) mean the base's."""

    def start(self, model: nn.Module) -> None:
        """Once, on an object that was made as the base."""
        self.everything: list[Any] = list(model.parameters())
        self.kept: dict[int, tuple[int, list[Any]]] = {}
        self.empty: dict[Any, Tensor] = {}

    def _clear_trace_structures(self) -> None:
        super()._clear_trace_structures()
        self.kept.clear()

    def _parameters(self, module: Any) -> list[Any]:
        """What is fetched for a module, by their ids; `ds_external_parameters` may still grow."""
        num, found = self.kept.get(module.ds_id, (-1, NOTHING))
        if num != len(module._external_params):
            found = sorted(set(iter_params(module, recurse=z3_leaf_module(module))), key=lambda p: p.ds_id)
            self.kept[module.ds_id] = len(module._external_params), found
        return found

    def _fetch_sub_module_impl(self, current_submodule: Any, forward: bool, is_leaf: bool) -> None:
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
        found: set[Any] = set()
        while queue and len(found) < len(wanted):
            entry = queue.popleft()
            recent[entry.param] = entry.step_id_last_used_at
            found.add(entry.param)
        if found != wanted:
            raise RuntimeError(f"tracing error at step {step}: {[p.ds_id for p in wanted]}, {[p.ds_id for p in found]}")

    def _prefetch(self, forward: bool) -> None:
        recent, queue = self.__most_recent_step_id_param_fetched_for, self.__param_queue
        limit = min(self.__max_n_available_params - self.__n_available_params, self.__prefetch_bucket_sz)
        num, wanted = 0, dict[int, Any]()
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
    def release_sub_module(self, submodule: Any, forward: bool = False) -> None:
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
    def release_and_reset_all(self, module: Any) -> None:
        """Forget all gathered parameters, persistent ones too."""
        inflight = self.__inflight_param_registry.data
        for param in self.everything:
            if param in inflight:
                inflight.pop(param).wait()
            param.ds_active_sub_modules.clear()
            self._free(param)
