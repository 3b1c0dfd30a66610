"""One hook before and one after each block that ZeRO-3 gathers as a whole, instead of DeepSpeed's five.

DeepSpeed 0.19.8 sends every input and output of a block through an autograd function of its own, the inputs that need
no gradient too, and PyTorch's hook for the block's backward pass sends them through another one. What has to happen
around the passes of a block is the same as there and in the same order.
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
    coordinator = offload.get_param_coordinator()
    its_own = {handle.id for handle in (*offload.forward_hooks, *offload.backward_hooks)}
    for block, handle in zip(optimizer.leaf_parameters, optimizer._leaf_module_hooks, strict=True):
        reduce = block._backward_hooks[handle.id]
        handle.remove()
        for hooks in (block._forward_pre_hooks, block._forward_hooks):
            for key in its_own & set(hooks):
                del hooks[key]
        _hook(block, offload, coordinator, reduce)


def forget_external_parameters(engine: Any) -> None:
    """Make the modules within blocks plain ones again, and have DeepSpeed pass them over.

    It watches every access to a parameter for modules that use another's, and marks all modules at the begin and end of
    each forward pass. Nothing uses a block's parameters but the block, and a compiled block would check in each
    call that the watching is what it was.
    """
    model = engine.module
    inside = {id(module): module for block in engine.optimizer.leaf_parameters for module in block.modules()}
    for module in inside.values():
        module._parameters = dict(module._parameters)
    outside = [module for module in model.modules() if id(module) not in inside]

    def without_blocks(run: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: Any, **options: Any) -> Any:
            model.modules = outside.__iter__
            try:
                return run(*args, **options)
            finally:
                del model.modules

        return marked

    engine._forward_prologue = without_blocks(engine._forward_prologue)
    engine._forward_epilogue = without_blocks(engine._forward_epilogue)


def _hook(block: nn.Module, offload: Any, coordinator: Any, reduce: Callable[..., None]) -> None:
    def begin_backward() -> None:
        coordinator.enter(block, forward=False)

    def end_backward() -> None:
        reduce(block, None, None)
        coordinator.release_sub_module(block, forward=False)

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        parameter_offload.FWD_MODULE_STACK.append(block)
        coordinator.enter(block, forward=True)
        return through(end_backward, inputs)

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        parameter_offload.FWD_MODULE_STACK.pop()
        coordinator.release_sub_module(block, forward=True)
        if isinstance(output, tuple):
            return through(begin_backward, output)
        return through(begin_backward, (output,))[0]

    offload.forward_hooks += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
