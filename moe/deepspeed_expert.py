"""The one file that knows DeepSpeed's private expert protocol.

DeepSpeed has no public way to register an expert-parallel layer with a router of its own. Version 0.19.8
recognises one by `isinstance(module, AutoEPMoELayer)` and by attributes of the module and its parameters:

| what                                          | read by                                                   |
|-----------------------------------------------|-----------------------------------------------------------|
| base class `AutoEPMoELayer`                   | `engine.has_moe_layers`; the only kind ZeRO-3 accepts      |
| `p.allreduce = False`, `p.group_name`         | gradient averaging of stages 1-2, initial broadcast        |
| `p.ds_zero_placement_family`, `..._group_name`| stage 3: divisor of the gradient, norm over expert groups  |
| `p.ds_zero_partition_process_group`           | `zero.Init`: partitions the parameter over its data group  |
| `moe`, `name` of an optimizer's group          | stages 1-2: over which ranks its gradients are reduced     |

A missing attribute is not an error upstream but a wrong gradient, hence the check at import. What DeepSpeed's own
checkpoints read besides is left out: its checkpoints are not used, and saving one raises without it. Expert
groups are consecutive ranks; ranks that hold the same experts are `ep_size` apart.
"""

from functools import partial
from typing import Any

import deepspeed
import deepspeed.comm
import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import Tensor, nn

from moe.all_to_all import ExpertGroup
from moe.config import MoeConfig
from moe.layer import MoeLayer

_PREFIX = "ep_size_"  # of DeepSpeed's names of expert groups
_REQUIRED: tuple[tuple[Any, str], ...] = (
    (groups, "_create_expert_and_data_parallel"),
    (groups, "_get_expert_parallel_group"),
    (groups, "_get_expert_data_parallel_group"),
    (AutoEPMoELayer, "set_deepspeed_parallelism"),
)
_missing = [f"{owner.__name__}.{name}" for owner, name in _REQUIRED if not hasattr(owner, name)]
if _missing:
    raise ImportError(
        f"deepspeed {deepspeed.__version__} lacks {', '.join(_missing)}, which expert parallelism relies on: "
        "install deepspeed==0.19.8, or set parallel.ep_size=1, which uses public interfaces only"
    )


def build_expert_group(ep_size: int, chunks: int = 1) -> ExpertGroup | None:
    """This rank's process group of expert parallelism, None for `ep_size` 1; collective, makes them once per size.

    The exchanges are PyTorch's functional collectives, since the compiler follows these into its graph with begin and
    end apart. Until its end PyTorch keeps an exchange's input alive; on a GPU it runs on a stream of its own.
    """
    if ep_size == 1:
        return None
    groups._create_expert_and_data_parallel(expert_parallel_size_=ep_size)
    process_group = groups._get_expert_parallel_group(f"{_PREFIX}{ep_size}")
    name, collectives = process_group.group_name, torch.ops._c10d_functional

    def begin(tensor: Tensor) -> Tensor:
        sizes = [tensor.shape[0] // ep_size] * ep_size
        output: Tensor = collectives.all_to_all_single(tensor, sizes, sizes, name)
        return output

    rank = deepspeed.comm.get_rank(group=process_group)
    return ExpertGroup(size=ep_size, rank=rank, begin=begin, end=collectives.wait_tensor, chunks=chunks)


class _ExpertParallelMark(AutoEPMoELayer):  # type: ignore[misc]
    """The type that DeepSpeed looks for, without AutoEP's own layer (token choice) behind it."""

    def __init__(self) -> None:
        nn.Module.__init__(self)  # AutoEP's constructor would build its experts

    def set_deepspeed_parallelism(self, *args: object, **kwargs: object) -> None:
        """Called by the engine to bind groups; ours are bound at construction."""


class ExpertParallelMoe(MoeLayer, _ExpertParallelMark):
    """`MoeLayer` that DeepSpeed treats as an expert-parallel layer under ZeRO 1, 2 and 3."""

    def __init__(self, config: MoeConfig, *, dim: int, hidden_dim: int, group: ExpertGroup) -> None:
        tag = partial(_tag, name=f"{_PREFIX}{group.size}")
        super().__init__(config, dim=dim, hidden_dim=hidden_dim, group=group, tag=tag)


def _tag(parameter: nn.Parameter, *, name: str) -> None:
    """Attach what DeepSpeed reads from an expert parameter (see the table above); `name` is that of its group."""
    attributes = {
        "allreduce": False,
        "group_name": name,
        "ds_zero_placement_family": "autoep_expert",
        "ds_zero_partition_group_name": name,
        "ds_zero_partition_process_group": groups._get_expert_data_parallel_group(name),
    }
    for attribute, value in attributes.items():
        setattr(parameter, attribute, value)


def is_expert_parameter(parameter: nn.Parameter) -> bool:
    """Whether a parameter is local to its rank of an expert group."""
    return getattr(parameter, "ds_zero_placement_family", "") == "autoep_expert"


def expert_range(parameter: nn.Parameter) -> tuple[int, int]:
    """(first expert, number of experts in all) of an expert-parallel parameter on this rank, (0, 0) of any other."""
    if not is_expert_parameter(parameter):
        return 0, 0
    ep_size = int(parameter.group_name.removeprefix(_PREFIX))  # type: ignore[attr-defined]
    num_local = getattr(parameter, "ds_shape", parameter.shape)[0]  # the shape before ZeRO-3 partitioned it
    return (deepspeed.comm.get_rank() % ep_size) * num_local, num_local * ep_size


def optimizer_group_keys(parameter: nn.Parameter) -> dict[str, Any]:
    """What ZeRO 1 and 2 look for in an optimizer's group of parameters like this one."""
    return {"moe": True, "name": parameter.group_name} if is_expert_parameter(parameter) else {}  # type: ignore[attr-defined]
