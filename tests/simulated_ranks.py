"""Expert groups without processes: each rank a thread, whose exchange moves rows between the threads' tensors.

What is under way holds no rows until its end, and rows are read as late as that: who looks at them before, or writes
over them, computes something else.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe.all_to_all import ExpertGroup


def on_ranks(size: int, work: Callable[[ExpertGroup], Any], chunks: int = 1) -> list[Any]:
    """What `work` returns on each rank of one group of `size`; all must exchange equally often, or it raises."""
    network = _Network(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        door = _Door(network, rank)
        try:
            results[rank] = work(ExpertGroup(size=size, rank=rank, begin=door.begin, end=door.end, chunks=chunks))
            assert not door.under_way, "an exchange was begun and not ended"
        except BaseException as error:
            errors.append(error)
            network.give_up()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    assert len({rank for rank, _ in network.sent}) in (0, size) and len(network.sent) % size == 0
    return results


class _Network:
    """The tensors that each rank has sent so far, by rank and number."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sent: dict[tuple[int, int], Tensor] = {}
        self._changed, self._broken = threading.Condition(), False

    def send(self, rank: int, number: int, tensor: Tensor) -> None:
        with self._changed:
            self.sent[rank, number] = tensor
            self._changed.notify_all()

    def sent_by_all(self, number: int) -> list[Tensor]:
        keys = [(rank, number) for rank in range(self.size)]
        with self._changed:
            arrived = self._changed.wait_for(lambda: self._broken or all(key in self.sent for key in keys), timeout=60)
            if self._broken or not arrived:
                raise threading.BrokenBarrierError
            return [self.sent[key] for key in keys]

    def give_up(self) -> None:
        with self._changed:
            self._broken = True
            self._changed.notify_all()


class _Door:
    """One rank's way into the network."""

    def __init__(self, network: _Network, rank: int) -> None:
        self.network, self.rank, self.count = network, rank, 0
        self.under_way: dict[int, tuple[int, Tensor]] = {}

    def begin(self, tensor: Tensor) -> Tensor:
        """Row block r is for rank r. The result holds nothing yet: NaN, or the smallest number."""
        tensor = tensor.detach()
        nothing = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min
        output = torch.full_like(tensor, nothing)
        self.network.send(self.rank, self.count, tensor)
        self.under_way[output.data_ptr()] = self.count, output  # kept, so that no other gets its address
        self.count += 1
        return output

    def end(self, tensor: Tensor) -> Tensor:
        """Row block r becomes what rank r sent, as collectives do it: behind autograd's back."""
        number, output = self.under_way.pop(tensor.data_ptr())
        rows = len(output) // self.network.size
        with torch.no_grad():
            for source, sent in enumerate(self.network.sent_by_all(number)):
                output[source * rows : (source + 1) * rows] = sent[self.rank * rows : (self.rank + 1) * rows]
        return tensor
