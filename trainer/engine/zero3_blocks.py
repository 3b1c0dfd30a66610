"""One hook before and one after each block that ZeRO-3 gathers as a whole, instead of DeepSpeed's five.

DeepSpeed 0.19.8 sends every input and output of a block through an autograd function of its own, the inputs that need
no gradient too, and PyTorch's hook for the block's backward pass sends them through another one. What has to happen
around the passes of a block is the same as there, by the same functions and in the same order.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import parameter_offload
from deepspeed.utils.z3_leaf_module import z3_leaf_parameter
from torch import Tensor, nn


class _Through(torch.autograd.Function):
    """Tensors as they are; once the gradients of all of them are there, `then` is called before they go on."""

    @staticmethod
    def forward(ctx: Any, then: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.then = then
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        ctx.then()
        return None, *gradients


def through(then: Callable[[], None], values: tuple[Any, ...]) -> tuple[Any, ...]:
    """`values`, those that need a gradient watched."""
    watched = [isinstance(value, Tensor) and value.requires_grad for value in values]
    if not any(watched):
        return values
    tensors = [value for value, is_watched in zip(values, watched, strict=True) if is_watched]
    found: Iterator[Tensor] = iter(_Through.apply(then, *tensors))
    return tuple(next(found) if is_watched else value for value, is_watched in zip(values, watched, strict=True))


def simplify_hooks(optimizer: Any) -> None:
    """Replace DeepSpeed's hooks of all blocks (leaf modules) of a stage 3 optimizer."""
    offload = optimizer.parameter_offload
    its_own = {handle.id for handle in (*offload.forward_hooks, *offload.backward_hooks)}
    for block, handle in zip(optimizer.leaf_parameters, optimizer._leaf_module_hooks, strict=True):
        reduce = block._backward_hooks[handle.id]
        handle.remove()
        for hooks in (block._forward_pre_hooks, block._forward_hooks):
            for key in its_own & set(hooks):
                del hooks[key]
        _hook(block, offload, reduce)


def add_together(optimizer: Any) -> None:
    """Have a block's gradients go into the bucket of what is to be reduced at once, not one by one."""
    last = {params[-1].ds_id for params in optimizer.leaf_parameters.values()}
    waiting: list[Any] = []

    def reduce_ready(param: Any) -> None:
        waiting.append(param)
        if param.ds_id in last or not z3_leaf_parameter(param):
            _add(optimizer, waiting)
            waiting.clear()

    optimizer.reduce_ready_partitions_and_remove_grads = reduce_ready


@torch.no_grad()
def _add(optimizer: Any, params: list[Any]) -> None:
    """Add gradients to the bucket in their order; it is reduced before one that is too much or of another group."""
    dtype, size = optimizer.communication_data_type, optimizer.reduce_bucket_size
    bucket, num = optimizer.ipg_buckets[dtype], 0
    run: list[Any] = []
    for param in params:
        group, more = param.ds_process_group, bucket.elements + num
        if more and (group is not bucket.process_group or more + param.ds_numel > size):
            _copy(optimizer, bucket, run, num)
            optimizer._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(dtype)
            run, num = [], 0
        bucket.process_group = group
        run.append(param)
        num += param.ds_numel
    _copy(optimizer, bucket, run, num)


def _copy(optimizer: Any, bucket: Any, params: list[Any], num: int) -> None:
    """Move these gradients, `num` elements, to the end of what is in the bucket, as long as it has room."""
    if not params:
        return
    accelerator, stream = get_accelerator(), optimizer.reduce_and_partition_stream
    if not accelerator.resolves_data_dependency():
        stream.wait_stream(accelerator.current_stream())
    grads = [param.grad for param in params]
    if bucket.elements + num <= optimizer.reduce_bucket_size:  # else it is one that is larger than a bucket
        with accelerator.stream(stream):
            flats = bucket.buffer.narrow(0, bucket.elements, num).split([grad.numel() for grad in grads])
            places = [flat.view(grad.shape) for flat, grad in zip(flats, grads, strict=True)]
            torch._foreach_copy_(places, grads)
            for grad, place in zip(grads, places, strict=True):
                if not accelerator.is_synchronized_device():
                    grad.record_stream(accelerator.current_stream())
                grad.data = place
    bucket.params += params
    bucket.elements += num


def _hook(block: nn.Module, offload: Any, reduce: Callable[..., None]) -> None:
    def begin_backward() -> None:
        offload.pre_sub_module_backward_function(block)

    def end_backward() -> None:
        reduce(block, None, None)
        offload.post_sub_module_backward_function(block)

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        offload.pre_sub_module_forward_function(block)
        return through(end_backward, inputs)

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        parameter_offload.FWD_MODULE_STACK.pop()
        offload.post_sub_module_forward_function(block)
        if isinstance(output, tuple):
            return through(begin_backward, output)
        return through(begin_backward, (output,))[0]

    offload.forward_hooks += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
