"""Transformer blocks as compiled graphs: one for the dense kind and one for the MoE kind, whatever their number.

Run operation by operation, a block is some 100 kernels around its two dozen matrix products, and the host needs longer
to start them than a GPU to run them. Compiled, what lies between two products is one pass over memory.

What is compiled is the block's `forward` alone, and as one graph or not at all (`fullgraph`): ZeRO-3 gathers a block's
weights in hooks around it, which stay Python; an all-to-all of expert parallelism is part of the graph. A graph holds
for one shape, so a shape costs one compilation (of each kind, on each rank), and there are at most `MAX_GRAPHS`.

| not compiled                                              | because                                                  |
|-----------------------------------------------------------|----------------------------------------------------------|
| MoE blocks while the capacity factor falls (`capacity_factor_start`) | each step has another number of rows          |
| MoE blocks whose router asks how many rows it needs       | the host would have to wait in the middle of a graph     |
| shapes beyond `MAX_GRAPHS`                                | compiling would take longer than it saves                |
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moe.all_to_all import COMPILER_OPTIONS
from moe.layer import MoeLayer
from moe.routers.base import fixed_capacity
from moe.routing import ChoiceMemory
from trainer.diffusion.model import DitBlock, EcDit

logger = logging.getLogger("ec_dit")

MAX_GRAPHS = 32
# Of inductor on a GPU. As it stands it writes the gradient of a rotated query to memory in fp32, as it has many
# operations and several readers: 6 of 155 bytes per token and unit of width (benchmarks/count_kernels.py).
GPU_OPTIONS: dict[str, Any] = {"realize_reads_threshold": 8, "realize_opcount_threshold": 100}
# Decide which tokens an expert takes. Recomputed affinities may differ in the last bit, so these are never recomputed.
_CHOOSING = (torch.ops.aten.topk.default, torch.ops.aten.sort.default, torch.ops.aten.sort.stable)


def is_wanted(setting: bool | None, device: torch.device) -> bool:
    """Whether `train.compile` asks for compiled blocks on this device; left open it does so on a GPU."""
    return device.type == "cuda" if setting is None else setting


class CompiledBlocks:
    """Replaces `forward` of a model's blocks. `waiting` surrounds each compilation, which may take a minute."""

    def __init__(
        self, model: EcDit, *, backend: str | Callable[..., Any] = "inductor",
        waiting: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:  # fmt: skip
        self.model, self.waiting = model, waiting
        self.seen: set[tuple[Any, ...]] = set()
        self.refused: set[tuple[Any, ...]] = set()
        model.is_compiled = True
        # A block's two passes are compiled together, so that no backward pass stops for it; graphs of all blocks of a
        # kind are kept behind one function.
        # Here and not where it stands, as that would load the compiler: exact fractions cannot be traced by torch 2.11.
        torch.compiler.assume_constant_result(fixed_capacity)
        dynamo: Any = import_module("torch._dynamo.config")
        functorch: Any = import_module("torch._functorch.config")
        functorch.force_non_lazy_backward_lowering = True
        dynamo.recompile_limit = max(2 * MAX_GRAPHS, dynamo.recompile_limit)
        # Tells every process that to choose what is recomputed is a new feature.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        exchanging = any(isinstance(layer, MoeLayer) and layer.group is not None for layer in model.modules())
        on_gpu = next(model.parameters()).is_cuda
        options = (GPU_OPTIONS if on_gpu else {}) | (COMPILER_OPTIONS if exchanging else {})
        for block in model.blocks:
            assert isinstance(block, DitBlock)
            eager = block.forward
            whole, again = (
                torch.compile(
                    function,
                    backend=backend,
                    fullgraph=True,
                    dynamic=False,
                    options=options if backend == "inductor" and options else None,
                )
                for function in (eager, _recomputed(eager))
            )
            block.forward = partial(self._run, block, eager, whole, again)  # type: ignore[method-assign]

    def _run(
        self, block: DitBlock, eager: Callable[..., Any], whole: Callable[..., Any], again: Callable[..., Any],
        *arguments: Tensor, cached: tuple[Tensor, Tensor] | None = None,
    ) -> Any:  # fmt: skip
        recompute = self.model.activation_checkpointing and torch.is_grad_enabled()
        shapes = tuple(tuple(argument.shape) for argument in arguments)
        key = block.has_moe, block.training, torch.is_grad_enabled(), cached is not None, recompute, shapes
        if not has_fixed_shapes(block) or (key not in self.seen and not self._admit(key)):
            if recompute:
                memory = ChoiceMemory() if block.has_moe else None
                return checkpoint(eager, *arguments, memory, use_reentrant=False)
            return eager(*arguments, cached=cached)
        with nullcontext() if key in self.seen else self.waiting():
            self.seen.add(key)
            return again(*arguments) if recompute else whole(*arguments, cached=cached)

    def _admit(self, key: tuple[Any, ...]) -> bool:
        """Whether there is room for one more graph; says so, and the first time that there is none."""
        has_moe, training, _, _, _, shapes = key
        (B, S, _), L = shapes[0], shapes[2][1]
        kind, how = "MoE" if has_moe else "dense", "training" if training else "sampling"
        what = f"{kind} blocks for {how} with {B} x {S} image and {L} text tokens"
        if len(self.seen) < MAX_GRAPHS:
            logger.info("compiling %s, once for this shape (graph %d)", what, len(self.seen) + 1)
            return True
        if key not in self.refused:
            logger.info("%s run uncompiled: there are %d graphs, and no more are made", what, MAX_GRAPHS)
        self.refused.add(key)
        return False


def has_fixed_shapes(block: nn.Module) -> bool:
    """Whether what the block computes now has shapes that its input's decide."""
    layer = getattr(block, "mlp", None)
    if not isinstance(layer, MoeLayer):
        return True
    if not block.training:
        return not layer.strategy.traits.waits_when_sampling
    return layer.strategy.traits.has_equal_splits and layer.capacity_factor == layer.config.capacity_factor


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The block with all but its input, and what its router chose, computed again in the backward pass."""
    contexts = partial(create_selective_checkpoint_contexts, _keep_choices)

    def run(*arguments: Tensor) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts)

    return run


def _keep_choices(_: Any, operator: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _CHOOSING else CheckpointPolicy.PREFER_RECOMPUTE
