"""What a training step is given: a micro-batch on the host, noised, with the indices of its samples."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from trainer.config import TrainConfig
from trainer.data.latents.samples import Batch, LatentDataset
from trainer.data.loader import load_batches
from trainer.data.position import DataState
from trainer.diffusion.flow import NoisedBatch, draw_noise, mask_at


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Indices of the samples [B], and what the model needs of them."""

    index_B: Tensor
    noised: NoisedBatch

    def pin_memory(self) -> "Prepared":
        """The same in memory that a GPU can read by itself."""
        return replace(self, noised=self.noised.pin_memory())


def prepare(batch: Batch, config: TrainConfig) -> Prepared:
    """Noise a micro-batch; how many tokens are masked is left open."""
    noised = draw_noise(batch, config.diffusion, seed=config.seed, patch_size=config.model.patch_size)
    return Prepared(index_B=batch.index_B, noised=noised)


def build_prepared(
    dataset: LatentDataset, config: TrainConfig, *, rank: int, world_size: int, state: DataState
) -> Iterator[Prepared]:
    """This rank's micro-batches for ever, noised by the data workers.

    Every sample has a generator of its own: drawing takes time, in which a GPU would have nothing to do.
    """
    then = partial(prepare, config=config)
    return load_batches(dataset, config, rank=rank, world_size=world_size, state=state, then=then)


def next_step(batches: Iterator[Prepared], config: TrainConfig, step: int) -> list[Prepared]:
    """The micro-batches of optimizer step number `step` (from 0), masked as in that step; talks to no other rank."""
    taken = [next(batches) for _ in range(config.train.gradient_accumulation_steps)]
    return [replace(item, noised=mask_at(item.noised, config.diffusion, step)) for item in taken]
