"""Processes: how many there are and which this is, reductions over them, and how they agree that something failed.

Under torchrun, `deepspeed` and srun with the five variables set (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT) those are used; under Open MPI's mpirun they are discovered through mpi4py; a plain process is
a world of one. Nothing here allocates before `init_distributed`.

A rank that leaves collective work alone lets the others wait for ever. So what may fail on some ranks only goes through
`try_on_all`, which tells every rank; the ways in which it is used differ in what is raised then:

| way                               | what follows a failure                                                         |
|-----------------------------------|--------------------------------------------------------------------------------|
| `on_all`, `from_main`             | nobody goes on: failed ranks raise their own error, the others one quoting it  |
| `trainer.checkpoint.agree.agree`  | ranks may go on without that checkpoint, but must decide it alike: one error   |
| `trainer.loop.leaving.HeldErrors` | a failed rank first finishes the step with the others, then as `on_all`        |
| `trainer.loop.step.StepReport`    | tells only whether a rank holds an error: every step sends it, as numbers with |
|                                   | the loss, where pickled objects would take too long                            |
"""

import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from trainer.errors import ConfigError, require, sentence_of

T = TypeVar("T")


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


_VARIABLES = (  # rank, rank on the node, processes, processes on the node: of torchrun and its like, of Open MPI
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)


def detect_world() -> World:
    """Read the launcher's variables; connects to nothing. Only the first rank shows the bars of model libraries."""
    world = _read_world()
    if not world.is_main:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers heeds it, too
    return world


def _read_world() -> World:
    for rank, local_rank, size, local_size in _VARIABLES:
        if rank in os.environ:
            return World(
                rank=int(os.environ[rank]),
                local_rank=int(os.environ.get(local_rank, 0)),
                size=int(os.environ[size]),
                local_size=int(os.environ.get(local_size, 0)),
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
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    # Where it discovers the processes through MPI it would take a port of its own, the same for all jobs of a node.
    deepspeed.init_distributed(verbose=False, distributed_port=int(os.environ.get("MASTER_PORT", "29500")))
    return torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def process_group(world: World) -> Iterator[torch.device]:
    """Within the block this process, whose device it gives, is joined to the others by `init_distributed`.

    The group ends with the outermost block, but not after an error, because to end it may be to wait for ranks that are
    gone. Objects may still hold it, so programs end by `trainer.cluster.leave.run_and_leave`.
    """
    joined_before = torch.distributed.is_initialized()
    yield init_distributed(world)
    if not joined_before:
        import deepspeed.comm

        deepspeed.comm.destroy_process_group()  # DeepSpeed's own references, too


def group_of_several(world: World) -> AbstractContextManager[object]:
    """`process_group` where there are several processes; one alone needs none, and does not wait for DeepSpeed."""
    return process_group(world) if world.size > 1 else nullcontext()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def all_reduce_mean(values: Tensor) -> Tensor:
    """Mean over all processes, in place; the sum is taken in the tensor's dtype."""
    torch.distributed.all_reduce(values)
    return values.div_(torch.distributed.get_world_size())


def barrier() -> None:
    """Wait for all processes."""
    torch.distributed.barrier()


class PeerError(RuntimeError):
    """Another rank failed; this one was sound."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An error of one rank as all ranks are told of it: the error itself may not survive being sent.

    `kind` is `settings` for a ConfigError, `system` for an OSError (disk, network), `program` for all others.
    """

    rank: int
    kind: Literal["settings", "system", "program"]
    sentence: str
    quoted: str

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """Of an error on this rank."""
        users, systems = isinstance(error, ConfigError), isinstance(error, OSError)
        return cls(
            rank=torch.distributed.get_rank(),
            kind="settings" if users else "system" if systems else "program",
            sentence=sentence_of(error),
            quoted=repr(error),
        )


def gather(value: T, group: Any = None) -> list[T]:
    """What each rank gives, in the order of ranks, on all of them. Collective; pickled, so for small things."""
    parts: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(parts, value, group=group)
    return parts


def try_on_all(action: Callable[[], T], group: Any = None) -> tuple[list[T], list[Failure], Exception | None]:
    """Run `action` on every rank of a group of all ranks. Collective; raises nothing of `action`'s.

    Returns what each rank returned (None where it failed) and the failures, both the same on all ranks, and the error
    of this rank.
    """
    result, own = None, None
    try:
        result = action()
    except Exception as error:  # told to all ranks; the caller raises
        own = error
    parts: list[Any] = gather((result, None if own is None else Failure.of(own)), group)
    return [result for result, _ in parts], [failure for _, failure in parts if failure], own


def on_all(action: Callable[[], T], group: Any = None) -> list[T]:
    """Run `action` on every rank and return what each rank returned. Collective.

    If it fails anywhere, all ranks raise: those that failed their own error, the others a PeerError that quotes it, or
    the ConfigError if it is the user's to mend, so that all of them leave in the same way.
    """
    results, failures, own = try_on_all(action, group)
    if own is not None:
        raise own
    if failures and all(failure.kind == "settings" for failure in failures):
        raise ConfigError(failures[0].sentence)
    if failures:
        raise PeerError("; ".join(f"rank {failure.rank}: {failure.quoted}" for failure in failures))
    return results


def from_main(world: World, action: Callable[[], T]) -> T:
    """Run `action` on the main process only and give its result to all; errors as in `on_all`. Collective."""
    box: list[Any] = [None]

    def run() -> None:
        box[0] = action() if world.is_main else None

    on_all(run)
    torch.distributed.broadcast_object_list(box, src=0)
    result: T = box[0]
    return result
