"""The fp32 state that ZeRO left on this rank, as pieces of named tensors: master weights and optimizer moments.

One view for all stages, with the optimizer on the GPU or offloaded to the host, on which initialisation, EMA and
checkpoints stand. DeepSpeed 0.19.8 keeps the master weights in flat tensors, on which torch's
optimizer steps:

- Stages 1 and 2 lay the parameters of a group end to end and cut that into equal parts, one for each rank. A rank
  holds one flat tensor per group; a parameter may be cut anywhere, or not be in the rank's part at all. Where it is,
  its `_hp_mapping` says.
- Stage 3 cuts each parameter into equal parts, the last one padded. A rank holds one flat tensor per sub-group of
  parameters, its parts of them end to end. Where a part begins, the optimizer's `grad_position` says.

The optimizer's moments have the shape of these flat tensors, so the same places find them. Parts are cut over the ranks
that hold the same parameter: all of them, or for experts the ranks with the same experts. A piece says where in its
whole parameter it belongs, so that anyone can put the pieces of all ranks together.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import deepspeed.comm
import torch
from torch import Tensor, nn

from moe.deepspeed_expert import expert_range

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class TensorPiece:
    """A contiguous piece of one parameter or of a moment of it, flattened.

    `values` is a live view of this rank's state: writing into it changes the state. It holds elements `start` to
    `start + len(values)` of a local parameter of shape `shape`; for an expert parameter that is experts `first_expert`
    to `first_expert + shape[0]` of `num_experts`, else `num_experts` is 0.
    """

    values: Tensor
    start: int
    shape: tuple[int, ...]
    first_expert: int
    num_experts: int

    @property
    def logical_shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter, all experts included."""
        return (self.num_experts, *self.shape[1:]) if self.num_experts else self.shape

    @property
    def offset(self) -> int:
        """Where the piece begins in the flattened whole parameter: experts are its leading axis."""
        return self.first_expert * prod(self.shape[1:]) + self.start


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Local shape of a parameter before ZeRO-3 partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def write_initial(parameter: nn.Parameter, value: Tensor) -> None:
    """Set a parameter from its full local value, before the engine exists; no communication.

    Each rank has computed the same value and keeps its own slice of it.
    """
    with torch.no_grad():
        if not hasattr(parameter, "ds_tensor"):
            parameter.copy_(value)
            return
        kept = parameter.ds_tensor
        rank = deepspeed.comm.get_rank(group=parameter.ds_process_group)  # type: ignore[attr-defined]
        part = value.flatten()[rank * kept.numel() : (rank + 1) * kept.numel()]
        kept.zero_()  # the last rank's slice is longer than what is left for it: the padding, too, must be defined
        kept.view(-1)[: part.numel()].copy_(part)


def flat_masters(engine: Any) -> list[Tensor]:
    """The flat fp32 tensors that the optimizer steps on: one per parameter group, or sub-group of stage 3."""
    optimizer = engine.optimizer
    stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    return list(optimizer.fp32_partitioned_groups_flat if stage3 else optimizer.single_partition_of_fp32_groups)


def _place(optimizer: Any, parameter: nn.Parameter) -> tuple[int, int, int, int]:
    """(number, position, start, length) of this rank's elements of a parameter, without ZeRO's padding.

    From `position` on in flat tensor `number` are the elements from `start` on of the flattened local parameter; their
    number, `length`, is 0 or less if this rank has none.
    """
    if hasattr(parameter, "ds_tensor"):
        # Stage 3. Not by safe_get_local_fp32_param, which copies an offloaded piece to the GPU.
        number, position, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = deepspeed.comm.get_rank(group=parameter.ds_process_group) * size  # type: ignore[attr-defined]
        return number, position, start, min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]
    # Stages 1 and 2: "lp" is the working parameter, "hp" its fp32 master; a fragment lies at its own place in each.
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return 0, 0, 0, 0
    master, working = mapping.hp_fragment_address, mapping.lp_fragment_address
    return mapping.param_group_index, master.start, working.start, working.numel


def _places(engine: Any) -> Iterator[tuple[str, Tensor, int, TensorPiece]]:
    """(name, flat tensor, position in it, piece of the masters) of each parameter of which this rank has a piece."""
    flats = flat_masters(engine)
    for name, parameter in engine.module.named_parameters():
        number, position, start, length = _place(engine.optimizer, parameter)
        if length <= 0:
            continue
        flat, (first_expert, num_experts) = flats[number], expert_range(parameter)
        yield (
            name,
            flat,
            position,
            TensorPiece(
                values=flat.detach()[position : position + length],
                start=start,
                shape=full_shape(parameter),
                first_expert=first_expert,
                num_experts=num_experts,
            ),
        )


def master_pieces(engine: Any) -> Iterator[tuple[str, TensorPiece]]:
    """(name, piece) of every parameter of which this rank holds a piece of the fp32 master weights."""
    for name, _, _, piece in _places(engine):
        yield name, piece


def copy_masters(engine: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Copies of the flat tensors, padding included, and views of them as `master_pieces` are of their originals."""
    copies = {id(flat): flat.detach().clone() for flat in flat_masters(engine)}
    views = {
        name: copies[id(flat)][position : position + len(piece.values)]
        for name, flat, position, piece in _places(engine)
    }
    return list(copies.values()), views


def moment_pieces(engine: Any) -> Iterator[tuple[str, str, TensorPiece]]:
    """(kind, name, piece) of the optimizer's moments; nothing for SGD and before the first step."""
    states = engine.optimizer.optimizer.state  # of torch's optimizer, which steps on the flat tensors
    for name, flat, position, piece in _places(engine):
        for kind in MOMENTS:
            if kind in states.get(flat, {}):
                moment = states[flat][kind][position : position + len(piece.values)]
                yield kind, name, replace(piece, values=moment)


def moment_kinds(engine: Any) -> list[str]:
    """The moments that the optimizer has; none for SGD and before the first step."""
    states = engine.optimizer.optimizer.state
    return [kind for kind in MOMENTS if any(kind in states.get(flat, {}) for flat in flat_masters(engine))]


def optimizer_step(engine: Any) -> float:
    """The optimizer's own step counter, 0 if it keeps none; the same for all its flat tensors."""
    states = engine.optimizer.optimizer.state
    steps = {float(states[flat]["step"]) for flat in flat_masters(engine) if "step" in states.get(flat, {})}
    assert len(steps) <= 1, f"the optimizer's step counters differ: {steps}"
    return steps.pop() if steps else 0.0


def prepare_moments(engine: Any, kinds: Iterable[str], step: float) -> None:
    """Give the optimizer the moments of these kinds, to be filled, and its step counter.

    torch's AdamW creates its state at the first step, with these entries; each flat tensor gets a counter of its
    own, as there. Without kinds the state is dropped, as before the first step.
    """
    kinds = list(kinds)
    states = engine.optimizer.optimizer.state
    for flat in flat_masters(engine):
        state = states[flat]
        if not kinds:
            state.clear()
            continue
        for kind in kinds:
            if kind not in state:
                state[kind] = torch.zeros_like(flat.detach())
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device=flat.device)  # fused: beside its tensor


def publish_master(engine: Any) -> None:
    """Copy changed master weights to the model's working weights on all ranks. Collective."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()  # stages 1 and 2: each rank casts its part, then the parts are gathered
        return
    # Stage 3 keeps the working weights cut as the masters are: each rank casts its parts. What is gathered would be the
    # old weights, and a forward pass without a backward one leaves some gathered, small ones always are.
    optimizer.empty_partition_cache()
    for i in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(i)
