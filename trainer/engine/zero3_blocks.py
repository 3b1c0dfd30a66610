"""One hook before and one after each block that ZeRO-3 gathers as a whole, and one before the model for all the rest.

DeepSpeed 0.19.8 has five for each module. It sends every input and output through an autograd function of its own,
inputs that need no gradient too, and PyTorch's hook for a block's backward pass sends them through another one. What
has to happen around the passes of a block is the same as there and in the same order.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.runtime.zero import register_external_parameter
from deepspeed.utils.z3_leaf_module import z3_leaf_parameter
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

NO_MODULES: tuple[nn.Module, ...] = ()


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


def simplify_hooks(engine: Any) -> None:
    """Replace DeepSpeed's hooks of all modules of an engine of stage 3, and make the modules plain ones again.

    DeepSpeed watches every access to a parameter for modules that use another's, and marks all modules at the begin and
    end of each forward pass. Here it is known who uses what: a block its own parameters, the model all others. A
    compiled block would check in each call that the watching is what it was.
    """
    optimizer, model = engine.optimizer, engine.module
    offload = optimizer.parameter_offload
    coordinator = offload.get_param_coordinator()
    reductions = [
        (block, handle, block._backward_hooks[handle.id])
        for block, handle in zip(optimizer.leaf_parameters, optimizer._leaf_module_hooks, strict=True)
    ]
    its_own = {handle.id for handle in (*offload.forward_hooks, *offload.backward_hooks)}
    for module in model.modules():
        module._parameters = dict(module._parameters)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in its_own & set(hooks):
                del hooks[key]
    engine._forward_prologue = _without_modules(model, engine._forward_prologue)
    engine._forward_epilogue = _without_modules(model, engine._forward_epilogue)
    offload.forward_hooks.append(_hook_ends(model, coordinator))
    for block, handle, reduce in reductions:
        handle.remove()
        offload.forward_hooks += _hook_block(block, coordinator, reduce)


def _without_modules(model: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    def unmarked(*args: Any, **options: Any) -> Any:
        model.modules = NO_MODULES.__iter__  # type: ignore[assignment,method-assign]
        try:
            return run(*args, **options)
        finally:
            del model.modules

    return unmarked


def _hook_ends(model: nn.Module, coordinator: Any) -> RemovableHandle:
    """Have the model gather all that is not in blocks, in one exchange, at the first forward pass of a step.

    These are a dozen small modules before and after the blocks. Nobody releases them before the update, so there is
    nothing to gather in backward passes.
    """
    ends: list[Any] = [param for param in model.parameters() if not z3_leaf_parameter(param)]
    for param in ends:
        register_external_parameter(model, param)

    def before(*_: Any) -> None:
        coordinator.enter(model, forward=True)
        for param in ends:
            param.ds_active_sub_modules.clear()  # `GatheredParameters` would refuse what is in use

    return model.register_forward_pre_hook(before)


def _hook_block(block: nn.Module, coordinator: Any, reduce: Callable[..., None]) -> list[RemovableHandle]:
    def begin_backward(_: Tensor) -> None:
        coordinator.enter(block, forward=False)

    def end_backward() -> None:
        reduce(block, None, None)
        coordinator.release_sub_module(block, forward=False)

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        coordinator.enter(block, forward=True)
        return through(end_backward, inputs)

    def after(_: nn.Module, __: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        coordinator.release_sub_module(block, forward=True)
        x_BSD = output[0]  # beside it is only what the router decided
        if x_BSD.requires_grad:
            x_BSD.register_hook(begin_backward)

    return [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
