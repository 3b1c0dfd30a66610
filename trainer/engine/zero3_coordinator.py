"""Fetches and releases parameters of ZeRO-3 as DeepSpeed 0.19.8 does, from lists that are made once.

As soon as DeepSpeed knows in which order modules are run, nothing about a step changes any more: neither the parameters
of a module, nor what is gathered ahead of it. So one more pass is left to DeepSpeed's own code and recorded, and those
after it do the same without its queue. A pass out of that order, or until then, is run by its own code.

What a rank shares with nobody (experts that no other rank has; on one GPU everything) is neither gathered nor released:
its part is the whole parameter, so that nothing would be freed.

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
from deepspeed.utils.z3_leaf_module import z3_leaf_parameter
from torch import Tensor, nn


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
        self.alone = [param for param in self.everything if param.ds_zero_partition_world_size == 1]
        self.shared = [param for param in self.everything if param.ds_zero_partition_world_size > 1]
        # The limit is for what comes and goes; what is outside of blocks counts, but stays.
        ends = [param for param in self.shared if not z3_leaf_parameter(param)]
        self.__max_n_available_params += sum(param.ds_numel for param in ends)
        self.kept: dict[int, list[Any]] = {}  # what is fetched for a module
        self.empty: dict[Any, Tensor] = {}
        self.ahead: dict[int, list[Any]] = {}  # what each place of the order gathers ahead, as recorded
        self.leaving: dict[tuple[int, int], list[Any]] = {}  # what a module gives back at a place of the order
        self.is_recorded = self.is_recording = False
        self.is_fresh = False  # whether nothing is gathered, but for what always is
        self.gathering: list[Any] = []  # during a recorded fetch: what it gathers
        self.on_the_way: deque[tuple[Any, list[Any]]] = deque()  # exchanges begun from the lists, in their order

    def _clear_trace_structures(self) -> None:
        super()._clear_trace_structures()
        self.kept.clear()
        self.ahead.clear()
        self.leaving.clear()
        self.is_recorded = self.is_recording = False

    def _clean_inflight_param_registry(self) -> None:
        super()._clean_inflight_param_registry()
        while self.on_the_way:
            exchange, params = self.on_the_way.popleft()
            exchange.wait()
            self._free(params)

    def reset_step(self) -> None:
        """Begin a pass through the order. The first is kept that began with nothing gathered and went to its end."""
        if self.is_recording and self.__step_id == len(self.__submodule_order):
            self.is_recorded = True
        super().reset_step()
        self._keep_whole()
        self.is_recording = self.is_complete_trace() and self.is_fresh and not self.is_recorded
        self.is_fresh = False

    def _keep_whole(self) -> None:
        """Have each parameter that is shared with nobody be its part, which the update writes into."""
        for param in self.alone:
            if param.data_ptr() != param.ds_tensor.data_ptr():
                param.data = param.ds_tensor.view(param.ds_shape)
                param.ds_status = ZeroParamStatus.AVAILABLE

    def enter(self, module: Any, forward: bool) -> None:
        """What DeepSpeed's hooks do before either pass of a module."""
        self.trace_prologue(module)
        if self.is_record_trace():
            self.record_module(module)
        self.fetch_sub_module(module, forward=forward)

    def _parameters(self, module: Any) -> list[Any]:
        """What is fetched for a module, by their ids."""
        if module.ds_id not in self.kept:
            params = set(iter_params(module, recurse=z3_leaf_module(module)))
            shared = [param for param in params if param.ds_zero_partition_world_size > 1]
            self.kept[module.ds_id] = sorted(shared, key=lambda param: param.ds_id)
        return self.kept[module.ds_id]

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
        self._wait_for(params)
        self._begin(self.ahead[step])
        self.__step_id += 1

    def _begin(self, params: list[Any]) -> None:
        """Begin to gather those that nobody has gathered."""
        missing = [param for param in params if param.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        if missing:
            self.__n_available_params += sum([param.ds_numel for param in missing])
            with get_accelerator().stream(self.__allgather_stream):
                self.on_the_way.append((missing[0].all_gather_coalesced(missing), missing))

    def _wait_for(self, params: list[Any]) -> None:
        """DeepSpeed also notes who uses them. Here each has one user: its block, or the model until the update."""
        needed = any([param.ds_status is ZeroParamStatus.INFLIGHT for param in params])
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
        step, module = self.__step_id, submodule.ds_id
        leaving = self.leaving.get((module, step))
        if leaving is None:
            wanted, params = self.__params_to_release(submodule, step), self._parameters(submodule)
            leaving = [param for param in params if param.ds_id in wanted]
            self.leaving[module, step] = leaving
        if not forward:
            self.__active_backward_submodules.pop(module, None)
        if not self.is_recorded:
            for param in iter_params(submodule, recurse=z3_leaf_module(submodule)):
                param.ds_active_sub_modules.discard(module)
        self._free(leaving)

    def _free(self, params: list[Any]) -> None:
        """Give back what is gathered and used by nobody."""
        accelerator = get_accelerator()
        stream = None if accelerator.is_synchronized_device() else accelerator.current_stream()
        freed = 0
        for param in params:
            if param.ds_status is not ZeroParamStatus.AVAILABLE or param.ds_active_sub_modules:
                continue
            if stream is not None:
                param.data.record_stream(stream)
            empty = self.empty.get(param.dtype)
            if empty is None:
                empty = self.empty[param.dtype] = torch.empty(0, dtype=param.dtype, device=param.device)
            param.data = empty
            param.ds_status = ZeroParamStatus.NOT_AVAILABLE
            freed += param.ds_numel
        self.__n_available_params -= freed

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
        self._free(self.shared)
        self.__n_available_params = 0
