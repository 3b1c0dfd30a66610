"""The fp32 master weights as ZeRO left them: one flat shard per parameter on each rank.

One view for stages 1, 2 and 3, on which initialisation, EMA, its export and the tests' gather stand.
A shard says where in its parameter it belongs, so that files of all ranks can be put together by anyone.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import deepspeed.comm
import torch
from torch import Tensor, nn

from moe.deepspeed_expert import is_expert_parameter


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A contiguous piece of one parameter, flattened.

    `values` is a live view of this rank's master weights. It holds elements `start` to
    `start + len(values)` of a local parameter of shape `shape`; for an expert parameter that is experts
    `first_expert` to `first_expert + shape[0]` of `num_experts`, else `num_experts` is 0.
    """

    values: Tensor
    start: int
    shape: tuple[int, ...]
    first_expert: int
    num_experts: int


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Local shape of a parameter before ZeRO-3 partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def expert_range(parameter: nn.Parameter) -> tuple[int, int]:
    """(first expert, number of experts in all) of an expert-parallel parameter, (0, 0) of any other."""
    if not is_expert_parameter(parameter):
        return 0, 0
    ep_size = int(parameter.group_name.removeprefix("ep_size_"))  # type: ignore[attr-defined]
    num_local = full_shape(parameter)[0]
    return (deepspeed.comm.get_rank() % ep_size) * num_local, num_local * ep_size


def write_initial(parameter: nn.Parameter, value: Tensor) -> None:
    """Set a parameter from its full local value, before the engine exists; no communication.

    Each rank has computed the same value and keeps its own slice of it.
    """
    with torch.no_grad():
        if not hasattr(parameter, "ds_tensor"):
            parameter.copy_(value)
            return
        shard = parameter.ds_tensor
        rank = deepspeed.comm.get_rank(group=parameter.ds_process_group)  # type: ignore[attr-defined]
        piece = value.flatten()[rank * shard.numel() : (rank + 1) * shard.numel()]
        shard.zero_()
        shard.view(-1)[: piece.numel()].copy_(piece)


def master_shards(engine: Any) -> Iterator[tuple[str, Shard]]:
    """(name, shard) of every parameter of which this rank holds a piece of the fp32 master weights."""
    for name, parameter in engine.module.named_parameters():
        first_expert, num_experts = expert_range(parameter)
        piece = _stage3_piece(parameter) if hasattr(parameter, "ds_tensor") else _stage12_piece(parameter)
        if piece is None:
            continue
        start, values = piece
        shape = full_shape(parameter)
        yield name, Shard(values=values, start=start, shape=shape, first_expert=first_expert, num_experts=num_experts)


def _stage3_piece(parameter: nn.Parameter) -> tuple[int, Tensor] | None:
    """Elements of a ZeRO-3 parameter on this rank, without the padding that equalises the ranks."""
    values = deepspeed.utils.safe_get_local_fp32_param(parameter).view(-1)
    rank = deepspeed.comm.get_rank(group=parameter.ds_process_group)  # type: ignore[attr-defined]
    start = rank * values.numel()
    length = min(values.numel(), parameter.ds_numel - start)  # type: ignore[attr-defined]
    return (start, values[:length]) if length > 0 else None


def _stage12_piece(parameter: nn.Parameter) -> tuple[int, Tensor] | None:
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    return mapping.lp_fragment_address.start, mapping.hp_fragment.view(-1)


def assemble(pieces: Iterable[tuple[str, Shard]]) -> dict[str, Tensor]:
    """Put the pieces of all ranks together: {name: full fp32 tensor, all experts}.

    Raises ValueError naming parameters that the pieces do not cover exactly once.
    """
    full: dict[str, Tensor] = {}
    missing: dict[str, int] = {}
    for name, shard in pieces:
        if name not in full:
            shape = [shard.num_experts, *shard.shape[1:]] if shard.num_experts else shard.shape
            full[name] = torch.empty(shape, dtype=torch.float32)
            missing[name] = full[name].numel()
        per_expert = full[name][0].numel() if shard.num_experts else 0
        offset = shard.first_expert * per_expert + shard.start
        full[name].view(-1)[offset : offset + shard.values.numel()] = shard.values
        missing[name] -= shard.values.numel()
    gaps = [name for name, count in missing.items() if count != 0]
    if gaps or not full:
        raise ValueError(f"the shards do not cover {', '.join(gaps[:3]) or 'any parameter'}")
    return full


def gather_master(engine: Any) -> dict[str, Tensor]:
    """The full fp32 weights on every rank, through host memory: for tests and small models. Collective."""
    mine = [(name, replace(shard, values=shard.values.cpu().clone())) for name, shard in master_shards(engine)]
    parts: list[Any] = [None] * deepspeed.comm.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    places: dict[tuple[str, int, int], tuple[str, Shard]] = {}
    for name, shard in (piece for part in parts for piece in part):
        places[name, shard.first_expert, shard.start] = (name, shard)  # unpartitioned pieces are on all ranks
    return assemble(places.values())


def publish_master(engine: Any) -> None:
    """Copy changed master weights to the model's working weights on all ranks. Collective."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    for i in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(i)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
