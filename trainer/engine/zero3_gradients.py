"""Reduces, norms and hands over ZeRO-3's gradients as DeepSpeed 0.19.8 does, a bucket or sub-group at once.

DeepSpeed copies each gradient into a bucket, joins copies of these for the exchange, and then takes the parts, their
norms and their places in the update one by one: a dozen small operations for each parameter of a block. Here

- gradients stay where the backward pass left them until enough of them wait; joined once, they are exchanged. A rank
  that shares a parameter with nobody (experts of a group of one, a single GPU) joins nothing;
- parts are added, and their norms taken, by one call for all of them;
- the update reads the parts of a sub-group as the one tensor in which they lie end to end, cast and clipped at once.

Values are the same to the bit, but for norms on a GPU, which are summed in another order (in fp64, too).

Shapes: W ranks that share the parameters, n elements of a parameter's part.
"""

from typing import Any

import deepspeed.comm
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.pg_utils import is_parallel
from deepspeed.runtime.zero.utils import get_norm_dtype
from deepspeed.utils.z3_leaf_module import z3_leaf_parameter
from torch import Tensor
from torch.nn import functional

PREFIX = "_DeepSpeedZeroOptimizer_Stage3__"
# With other values a reduction has steps that are left out here.
PLAIN = {
    "all2all_process_group": None, "autoep_folding_tp_group": None, "enable_sanity_checks": False,
    "gradient_predivide_factor": 1.0, "model_parallel_group": None, "offload_optimizer": False, "reduce_scatter": True,
    "swap_optimizer": False, "use_muon": False,
}  # fmt: skip


def obstacle(optimizer: Any) -> str:
    """Why a stage 3 optimizer must reduce by its own code, or "" if nothing is in the way."""
    for name, plain in PLAIN.items():
        value = getattr(optimizer, name)
        if value != plain:
            return f"its {name} is {value}"
    return ""


def reduce_together(optimizer: Any) -> None:
    """Replace what a stage 3 optimizer does with gradients between the backward pass and the update."""
    gradients = _Gradients(optimizer)
    for bucket in optimizer.ipg_buckets.values():
        bucket.buffer = None  # gradients wait where they are
    optimizer.reduce_ready_partitions_and_remove_grads = gradients.add
    setattr(optimizer, f"{PREFIX}reduce_and_partition_ipg_grads", gradients.reduce)
    optimizer.get_grad_norm_direct = gradients.norm
    optimizer._prepare_fp32_grad_for_sub_group = lambda _: None  # until it is known how long they are
    optimizer.unscale_and_clip_grads = gradients.hand_over
    optimizer._unflatten_partitioned_parameters = gradients.keep_views


class _Gradients:
    """The gradients of one optimizer; methods are named for what they replace in `reduce_together`."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.last = {params[-1].ds_id for params in optimizer.leaf_parameters.values()}
        self.waiting: list[Any] = []
        # Where the part of a parameter's gradient is summed, by `ds_id`; in the parameter's shape where that is whole.
        self.places: dict[int, Tensor] = dict(getattr(optimizer, f"{PREFIX}param_id_to_grad_partition"))
        for param in (param for group in optimizer.fp16_groups for param in group):
            if param.ds_zero_partition_world_size == 1:
                self.places[param.ds_id] = self.places[param.ds_id].view(param.ds_shape)
        sizes = [sum(param.partition_numel() for param in group) for group in optimizer.fp16_groups]
        self.flats = optimizer.grad_partitions_flat_buffer.split(sizes)

    def add(self, param: Any) -> None:
        """Have the gradient wait; those of a block are counted together."""
        self.waiting.append(param)
        if param.ds_id not in self.last and z3_leaf_parameter(param):
            return
        optimizer = self.optimizer
        dtype, size = optimizer.communication_data_type, optimizer.reduce_bucket_size
        bucket = optimizer.ipg_buckets[dtype]
        for param in self.waiting:
            group = param.ds_process_group
            if bucket.params and (group is not bucket.process_group or bucket.elements + param.ds_numel > size):
                self.reduce(dtype)
            bucket.process_group = group
            bucket.params.append(param)
            bucket.elements += param.ds_numel
        self.waiting.clear()

    @torch.no_grad()
    def reduce(self, dtype: torch.dtype) -> None:
        """Average the waiting gradients over the ranks, and add this rank's parts to their places."""
        optimizer, accelerator = self.optimizer, get_accelerator()
        bucket = optimizer.ipg_buckets[dtype]
        if not bucket.params:
            return
        events = optimizer.param_reduce_events
        while events and events[0].query():
            events.popleft()
        if len(events) > optimizer.max_param_reduce_events:
            events.popleft().synchronize()
        if not accelerator.resolves_data_dependency():
            optimizer.reduce_and_partition_stream.wait_stream(accelerator.current_stream())
        with accelerator.stream(optimizer.reduce_and_partition_stream):
            params = sorted(bucket.params, key=lambda param: param.ds_id)
            self._place(params, self._averaged(params, bucket.process_group, dtype))
            bucket.clear_params()
            if not accelerator.handles_memory_backpressure():
                events.append(event := accelerator.Event())
                event.record()

    def _averaged(self, params: list[Any], group: Any, dtype: torch.dtype) -> list[Tensor]:
        """This rank's part of each averaged gradient, the last ranks' padded with zeros."""
        optimizer = self.optimizer
        grads = [param.grad if param.grad.dtype is dtype else param.grad.to(dtype) for param in params]
        W = params[0].ds_zero_partition_world_size
        if W == 1:
            parts = grads
        else:
            columns = [_rows(grad, W) for grad in grads]
            joined_WN = torch.cat(columns, dim=1).div_(W)
            part_N = joined_WN[params[0].ds_zero_partition_rank]
            deepspeed.comm.reduce_scatter_fn(part_N, joined_WN.view(-1), group=group)
            parts = list(part_N.split([column.shape[1] for column in columns]))
        averaging = optimizer._gradient_averaging_world_size(params, W)
        if averaging != W:
            torch._foreach_mul_(parts, W / float(averaging))
        return parts

    def _place(self, params: list[Any], parts: list[Tensor]) -> None:
        places = [self.places[param.ds_id] for param in params]
        if self.optimizer.micro_step_id == 0:
            torch._foreach_copy_(places, parts)
        else:
            torch._foreach_add_(places, [part.to(place.dtype) for part, place in zip(parts, places, strict=True)])
        accelerator = get_accelerator()
        for param in params:
            if not accelerator.is_synchronized_device():
                param.grad.record_stream(accelerator.current_stream())
            param.grad = None

    def norm(self, gradients: list[Tensor], params: list[Any]) -> Tensor:
        """2-norm of the gradients of a sub-group on all ranks; -1 if it is not finite, as DeepSpeed marks that."""
        total = torch.stack(torch._foreach_norm(gradients, 2, dtype=get_norm_dtype())).pow(2).sum()
        deepspeed.comm.all_reduce(total, group=params[0].ds_process_group)
        experts = self.optimizer._autoep_expert_parallel_group(params)
        if is_parallel(experts):
            deepspeed.comm.all_reduce(total, group=experts)
        norm = total.sqrt()
        return torch.where(norm.isfinite(), norm, -1.0)

    def hand_over(self, group: int, norm: Tensor) -> None:
        """Give the update the gradients of a sub-group as one tensor, in its dtype and clipped by the norm of all."""
        optimizer = self.optimizer
        master, gradient = optimizer.fp32_partitioned_groups_flat[group], self.flats[group]
        if optimizer.clip_grad > 0.0:
            clip = ((norm / optimizer.loss_scale + 1e-6) / optimizer.clip_grad).clamp(min=1.0)
            # As a tensor with an axis it makes the product one of its own dtype: the cast is in the same pass.
            factor = (1.0 / (clip * optimizer.loss_scale)).to(master.dtype).view(1)
        else:
            factor = torch.full((1,), 1.0 / optimizer.loss_scale, dtype=master.dtype, device=gradient.device)
        master.grad = gradient.mul_(factor) if gradient.dtype == master.dtype else gradient * factor
        optimizer.averaged_gradients[group] = None

    def keep_views(self, group: int) -> None:
        """Have a sub-group's parts lie in its flat tensor, into which the update was just copied: they do."""
        optimizer = self.optimizer
        flat = optimizer.fp16_partitioned_groups_flat[group]
        place = flat.data_ptr()
        for part in optimizer.fp16_partitioned_groups[group]:
            if part.data_ptr() != place:
                type(optimizer)._unflatten_partitioned_parameters(optimizer, group)
                return
            place += part.numel() * part.element_size()


def _rows(gradient: Tensor, W: int) -> Tensor:
    """A gradient as one row per rank, padded where it cannot be cut equally."""
    missing = -gradient.numel() % W
    return (functional.pad(gradient.reshape(-1), (0, missing)) if missing else gradient).reshape(W, -1)
