"""Builds the DeepSpeed engine: the only call of `deepspeed.initialize`."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import compiler
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from moe.deepspeed_expert import ExpertParallelMoe, build_expert_group, expert_range
from moe.layer import MoeLayer
from trainer.config import TrainConfig
from trainer.diffusion.compiled import CompiledBlocks, is_wanted
from trainer.diffusion.model import DitBlock, EcDit, ModelShape, initial_value
from trainer.engine.deepspeed_config import zero_stage
from trainer.engine.optim import build_optimizer
from trainer.engine.zero3_host_cost import lighten
from trainer.engine.zero_state import full_shape, write_initial

InitialValue = Callable[[str, tuple[int, ...], int, int], Tensor]


def build_model(
    config: TrainConfig, deepspeed_config: dict[str, Any], shape: ModelShape, initial: InitialValue | None = None
) -> EcDit:
    """The model as this rank holds it. Collective over all ranks.

    Under stage 3 each layer's parameters are partitioned as soon as the layer is built, so no rank ever
    holds more than one layer's local experts in full. Initial values do not depend on the topology.
    """
    initial = initial or partial(initial_value, moe=config.moe)
    # Without expert parallelism the plain layer: nothing of DeepSpeed's private expert protocol is used then.
    group = build_expert_group(config.parallel.ep_size, config.parallel.exchange_chunks)
    build_moe = partial(ExpertParallelMoe, group=group) if group else MoeLayer
    partitioned = zero_stage(deepspeed_config) == 3
    with deepspeed.zero.Init(enabled=partitioned, config_dict_or_path=deepspeed_config, mem_efficient_linear=False):
        model = EcDit(config.model, config.moe, shape, build_moe)
    # Modules leave their parameters uninitialised: values are drawn by name and expert number, so that a rank draws its
    # own experts only, and draws what any other topology does.
    for name, parameter in model.named_parameters():
        first_expert, _ = expert_range(parameter)
        write_initial(parameter, initial(name, full_shape(parameter), config.seed, first_expert))
    model.activation_checkpointing = config.train.activation_checkpointing
    if partitioned:
        # A block's parameters are gathered and released at once. By module it would be ten times for each block and
        # pass, and DeepSpeed lets the host run no more than two gathers ahead of the GPU.
        set_z3_leaf_modules(model, [DitBlock])
        gather_in_one_order(model)
    return model


def gather_in_one_order(model: nn.Module) -> None:
    """Make coalesced gathers of ZeRO-3 go through parameters by their ids, which are the same on all ranks.

    DeepSpeed 0.19.8 hands over a set. Where it holds parameters of two process groups (a block's experts and its rest),
    the groups' collectives would start in an order of each rank's own, which NCCL does not allow.
    """

    def gather_sorted(gather: Callable[..., Any], params: Iterable[Any], **options: Any) -> Any:
        return gather(sorted(params, key=lambda parameter: parameter.ds_id), **options)

    for parameter in model.parameters():
        parameter.all_gather_coalesced = partial(gather_sorted, parameter.all_gather_coalesced)  # type: ignore[attr-defined]


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon optimizer, which no run here uses but every engine asks for, without compiling it.

    Its decorators load PyTorch's compiler: 2.6 of the 7 CPU seconds that a process takes until its first step.
    """
    decorator, compiler.compile = compiler.compile, lambda **_: lambda function: function
    try:
        import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = decorator


def build_engine(
    config: TrainConfig,
    deepspeed_config: dict[str, Any],
    shape: ModelShape,
    device: torch.device,
    initial: InitialValue | None = None,
    *,
    compiling: Callable[[], AbstractContextManager[Any]] = nullcontext,
    stock: bool = False,
) -> Any:
    """Model, optimizer and ZeRO in one DeepSpeed engine; `compiling` surrounds each compilation of blocks.

    `stock` keeps DeepSpeed's own bookkeeping, to compare with.
    """
    _import_muon_uncompiled()
    model = build_model(config, deepspeed_config, shape, initial)
    if is_wanted(config.train.compile, device):
        CompiledBlocks(model, waiting=compiling)
    if zero_stage(deepspeed_config) < 3:
        model = model.to(device)
    optimizer = build_optimizer(model.named_parameters(), config.optim)
    with _zero_optimizer_at_every_stage():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config)
    if zero_stage(deepspeed_config) == 3 and not stock:
        lighten(engine)
    return engine


@contextmanager
def _zero_optimizer_at_every_stage() -> Iterator[None]:
    """Have stage 1 keep its state as stage 2 does, also where bf16 gradients are summed in fp32.

    DeepSpeed 0.19.8 takes another optimizer in that one case, with other names for masters and parts, but only without
    offload: its ZeRO optimizer knows such sums at stage 1 as well.
    """
    original = DeepSpeedEngine._do_optimizer_sanity_check

    def choose(engine: Any, basic: Any) -> Any:
        return ZERO_OPTIMIZATION if engine.zero_optimization_stage() else original(engine, basic)

    DeepSpeedEngine._do_optimizer_sanity_check = choose
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = original
