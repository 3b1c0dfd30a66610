"""Fetches and releases parameters of ZeRO-3 as DeepSpeed 0.19.8 does, from lists that are made once.

As soon as DeepSpeed knows in which order modules are run, nothing about a step changes any more: neither the parameters
of a module, nor what is gathered ahead of it. So one more pass is left to DeepSpeed's own code and recorded, and those
after it do the same without its queue. A pass out of that order, or until then, is run by its own code.

The host may be two fetches ahead of the GPU, so that what is gathered ahead stays bounded. DeepSpeed says the same, but
counts one for each parameter of a fetch, and a block has fifteen: so its host waited until each gather had ended.
"""

from collections import deque
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
        self.ahead: dict[int, list[Any]] = {}  # what each place of the order gathers ahead, as recorded
        self.is_recorded = self.is_recording = False
        self.is_fresh = False  # whether nothing is gathered, but for what always is
        self.gathering: list[Any] = []  # during a recorded fetch: what it gathers
        self.on_the_way: deque[tuple[Any, list[Any]]] = deque()  # exchanges begun from the lists, in their order

    def _clear_trace_structures(self) -> None:
        super()._clear_trace_structures()
        self.kept.clear()
        self.ahead.clear()
        self.is_recorded = self.is_recording = False

    def _clean_inflight_param_registry(self) -> None:
        super()._clean_inflight_param_registry()
        while self.on_the_way:
            exchange, params = self.on_the_way.popleft()
            exchange.wait()
            for param in params:
                self._free(param)

    def reset_step(self) -> None:
        """Begin a pass through the order. The first is kept that began with nothing gathered and went to its end."""
        if self.is_recording and self.__step_id == len(self.__submodule_order):
            self.is_recorded = True
        super().reset_step()
        self.is_recording = self.is_complete_trace() and self.is_fresh and not self.is_recorded
        self.is_fresh = False

    def enter(self, module: Any, forward: bool) -> None:
        """What DeepSpeed's hooks do before either pass of a module."""
        self.trace_prologue(module)
        if self.is_record_trace():
            self.record_module(module)
        self.fetch_sub_module(module, forward=forward)

    def _parameters(self, module: Any) -> list[Any]:
        """What is fetched for a module, by their ids; `ds_external_parameters` may still grow."""
        num, found = self.kept.get(module.ds_id, (-1, NOTHING))
        if num != len(module._external_params):
            found = sorted(set(iter_params(module, recurse=z3_leaf_module(module))), key=lambda p: p.ds_id)
            self.kept[module.ds_id] = len(module._external_params), found
        return found

    def __all_gather_params(self, params: Any, forward: bool) -> None:
        self.gathering += params
        super().__all_gather_params(params, forward)

    @torch.no_grad()
    def fetch_sub_module(self, current_submodule: Any, forward: bool) -> None:
        """Gather what the module needs and is not on its way, wait for it, begin to gather what comes next."""
        params, step = self._parameters(current_submodule), self.__step_id
        if not self.is_recorded:
            self.gathering.clear()
            super().fetch_sub_module(current_submodule, forward)
            if self.is_recording:
                ahead = set(self.gathering) - set(params)
                self.ahead[step] = sorted(ahead, key=lambda param: param.ds_id)
            return
        if not forward:
            self.__active_backward_submodules[current_submodule.ds_id] = current_submodule
        self._begin(params)
        self._wait_for(params, current_submodule.ds_id)
        self._begin(self.ahead[step])
        self.__step_id += 1

    def _begin(self, params: list[Any]) -> None:
        """Begin to gather those that nobody has gathered."""
        missing = [param for param in params if param.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        if missing:
            self.__n_available_params += sum([param.ds_numel for param in missing])
            with get_accelerator().stream(self.__allgather_stream):
                self.on_the_way.append((missing[0].all_gather_coalesced(missing), missing))

    def _wait_for(self, params: list[Any], module: int) -> None:
        needed = False
        for param in params:
            param.ds_active_sub_modules.add(module)
            needed = needed or param.ds_status is ZeroParamStatus.INFLIGHT
        accelerator = get_accelerator()
        if needed:
            events = self.__ongoing_fetch_events
            with accelerator.stream(self.__allgather_stream):
                while events and events[0].query():
                    events.popleft()
                if len(events) > self.__max_ongoing_fetch_events:
                    events.popleft().synchronize()
                while any(param.ds_status is ZeroParamStatus.INFLIGHT for param in params):
                    self.on_the_way.popleft()[0].wait()
                if not accelerator.handles_memory_backpressure():
                    event = accelerator.Event()
                    event.record()
                    events.append(event)
        if not accelerator.resolves_data_dependency():
            accelerator.current_stream().wait_stream(self.__allgather_stream)

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
        self.is_fresh = True
        while self.on_the_way:
            self.on_the_way.popleft()[0].wait()
        inflight = self.__inflight_param_registry.data
        for param in self.everything:
            if param in inflight:
                inflight.pop(param).wait()
            param.ds_active_sub_modules.clear()
            self._free(param)
