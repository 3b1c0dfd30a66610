"""The data of the next step, read and noised in a thread while this step computes.

Noise, timesteps and masks are drawn on the CPU, for every sample from a generator of its own. On a GPU that would be
time in which the device has nothing to do: 45 of 200 ms in a step of 64 pictures with 120 text tokens of width 4096.
"""

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.data.dataset import Batch
from trainer.diffusion import NoisedBatch, noise_batch


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One micro-batch on the host, ready for the model: its samples' indices [B] and what the model needs of them."""

    index_B: Tensor
    noised: NoisedBatch


def prepare(batches: list[Batch], config: TrainConfig, step: int) -> list[Prepared]:
    """Noise the micro-batches of optimizer step number `step` (from 0); pinned where there is a GPU."""
    prepared = []
    for batch in batches:
        noised = noise_batch(batch, config.diffusion, seed=config.seed, patch_size=config.model.patch_size, step=step)
        prepared.append(Prepared(index_B=batch.index_B, noised=noised.pinned()))
    return prepared


class Prefetch:
    """Hands out the micro-batches of one step after another; talks to no other rank.

    `start(step)` begins with the next ones, for a step that may not come: where a skipped step changes the number that
    they are for, and with it the mask ratio, they are noised again.
    """

    def __init__(self, batches: Iterator[Batch], config: TrainConfig, device: torch.device) -> None:
        self.batches, self.config, self.device = batches, config, device
        self._started: tuple[int, Future[tuple[list[Batch], list[Prepared]]]] | None = None

    def start(self, step: int) -> None:
        """Read in the background what `take` will give next, presumably for optimizer step number `step`."""
        future: Future[tuple[list[Batch], list[Prepared]]] = Future()

        def run() -> None:
            try:
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)  # is the thread's own; pinning would open the first GPU
                future.set_result(self._read(step))
            except BaseException as error:  # raised again by `take`
                future.set_exception(error)

        self._started = step, future
        # A daemon: a run that ends by an error does not wait for a file system that may hang.
        Thread(target=run, name="prefetch", daemon=True).start()

    def take(self, step: int) -> list[Prepared]:
        """The next micro-batches, for optimizer step number `step`; raises what reading them raised."""
        if self._started is None:
            return self._read(step)[1]
        (presumed, future), self._started = self._started, None
        batches, prepared = future.result()
        ratio = self.config.diffusion.mask_ratio_at
        return prepared if ratio(presumed) == ratio(step) else prepare(batches, self.config, step)

    def _read(self, step: int) -> tuple[list[Batch], list[Prepared]]:
        batches = [next(self.batches) for _ in range(self.config.train.gradient_accumulation_steps)]
        return batches, prepare(batches, self.config, step)
