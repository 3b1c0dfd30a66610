"""Expert groups without processes: each rank a thread, whose exchange moves rows between the threads' tensors."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe.all_to_all import ExpertGroup


def on_ranks(size: int, work: Callable[[ExpertGroup], Any]) -> list[Any]:
    """What `work` returns on each rank of one group of `size`; all must exchange equally often, or it raises."""
    meeting = threading.Barrier(size, timeout=60)
    sent: dict[int, Tensor] = {}
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        def exchange(output: Tensor, tensor: Tensor) -> None:
            """Row block r goes to rank r; what came from rank r becomes row block r."""
            sent[rank] = tensor
            meeting.wait()
            rows = len(tensor) // size
            for source in range(size):
                output[source * rows : (source + 1) * rows] = sent[source][rank * rows : (rank + 1) * rows]
            meeting.wait()  # nobody may send anew before all have read

        try:
            results[rank] = work(ExpertGroup(size=size, rank=rank, exchange=no_grad(exchange)))
        except BaseException as error:
            errors.append(error)
            meeting.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return results


def no_grad(exchange: Callable[[Tensor, Tensor], None]) -> Callable[[Tensor, Tensor], None]:
    """A collective records nothing for autograd, whatever it is called in."""

    def silent(output: Tensor, tensor: Tensor) -> None:
        with torch.no_grad():
            exchange(output, tensor.detach())

    return silent
