"""Processes: how many there are and which this is, under any launcher, and small reductions over them.

Under torchrun, `deepspeed` and srun with the five variables set (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT) those are used; under Open MPI's mpirun they are discovered through mpi4py; a plain process is
a world of one. Nothing here allocates before `init_distributed`.
"""

import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainer.config import ConfigError, require

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all: global rank, rank on its node, number of processes.

    `local_size` processes run on each node; 0 where the launcher does not say.
    """

    rank: int
    local_rank: int
    size: int
    local_size: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and reports errors of all."""
        return self.rank == 0


def detect_world() -> World:
    """Read the launcher's variables; connects to nothing."""
    env = os.environ
    if "RANK" in env:
        return World(
            rank=int(env["RANK"]),
            local_rank=int(env.get("LOCAL_RANK", 0)),
            size=int(env["WORLD_SIZE"]),
            local_size=int(env.get("LOCAL_WORLD_SIZE", 0)),
        )
    if "OMPI_COMM_WORLD_RANK" in env:
        return World(
            rank=int(env["OMPI_COMM_WORLD_RANK"]),
            local_rank=int(env["OMPI_COMM_WORLD_LOCAL_RANK"]),
            size=int(env["OMPI_COMM_WORLD_SIZE"]),
            local_size=int(env["OMPI_COMM_WORLD_LOCAL_SIZE"]),
        )
    return World(rank=0, local_rank=0, size=1)


def check_devices(world: World) -> None:
    """ConfigError if a node has GPUs, but not one for each of its processes. Touches no GPU."""
    if not torch.cuda.is_available():
        return
    needed, found = max(world.local_size, world.local_rank + 1), torch.cuda.device_count()
    require(
        needed <= found,
        f"{needed} processes on this node and {found} GPUs: start one process per GPU, or train on the CPU with "
        "CUDA_VISIBLE_DEVICES= and DS_ACCELERATOR=cpu",
    )


def init_distributed(world: World) -> torch.device:
    """Join the process group through DeepSpeed and return this process's device."""
    import deepspeed
    import deepspeed.ops

    # DeepSpeed 0.19.8 calls collectives by names that torch 2.14 renamed: one warning per call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Only inference uses this op, and it would be compiled for minutes at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)
    if "RANK" not in os.environ and world.size == 1:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    # Where it discovers the processes through MPI it would take a port of its own, the same for all jobs of a node.
    deepspeed.init_distributed(verbose=False, distributed_port=int(os.environ.get("MASTER_PORT", "29500")))
    return torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    import deepspeed.comm

    deepspeed.comm.all_reduce(values)
    return values


def all_reduce_mean(values: Tensor) -> Tensor:
    """Mean over all processes, in place; the sum is taken in the tensor's dtype."""
    import deepspeed.comm

    return all_reduce_sum(values).div_(deepspeed.comm.get_world_size())


def barrier() -> None:
    """Wait for all processes."""
    import deepspeed.comm

    deepspeed.comm.barrier()


def from_main(world: World, action: Callable[[], Result]) -> Result:
    """Run `action` on the main process only and give its result to all. Collective.

    If it raises, all ranks raise: ConfigError everywhere as ConfigError, anything else as itself on the main process.
    """
    box: list[Any] = [None, None, None]
    failure: Exception | None = None
    if world.is_main:
        try:
            box[0] = action()
        except Exception as error:
            failure, box[1], box[2] = error, isinstance(error, ConfigError), str(error) or repr(error)
    torch.distributed.broadcast_object_list(box, src=0)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise ConfigError(box[2]) if box[1] else RuntimeError(f"the main process failed: {box[2]}")
    result: Result = box[0]
    return result
