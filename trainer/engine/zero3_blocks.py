"""One hook before and one after each block that ZeRO-3 gathers as a whole, instead of DeepSpeed's five.

DeepSpeed 0.19.8 sends every input and output of a block through an autograd function of its own, the inputs that need
no gradient too, and PyTorch's hook for the block's backward pass sends them through another one. What has to happen
around the passes of a block is the same as there, by the same functions and in the same order.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.runtime.zero import parameter_offload
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
