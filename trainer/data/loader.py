"""Samples -> this rank's micro-batches for ever: normalised latents, packed text, dropped captions.

Shapes: B samples, C x H x W latent.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from trainer.config import TrainConfig, require
from trainer.data.latents.packed_text import pack_text
from trainer.data.latents.samples import Batch, LatentDataset
from trainer.data.position import DataState, MicroBatch, micro_batches
from trainer.encoders.protocols import TextEncoder
from trainer.randomness import keyed_generator

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RawBatch:
    """A micro-batch before its text is packed (and, online, encoded)."""

    latent_BCHW: Tensor
    texts: list[Tensor | str]
    index_B: Tensor


def build_loader(
    dataset: LatentDataset, config: TrainConfig, *, rank: int, world_size: int, state: DataState
) -> Iterator[Batch]:
    """This rank's micro-batches for ever: `load_batches` without a further step."""
    return load_batches(dataset, config, rank=rank, world_size=world_size, state=state, then=_unchanged)


def _unchanged(batch: Batch) -> Batch:
    return batch


def load_batches(
    dataset: LatentDataset,
    config: TrainConfig,
    *,
    rank: int,
    world_size: int,
    state: DataState,
    then: Callable[[Batch], T],
) -> Iterator[T]:
    """This rank's micro-batches for ever, each given to `then`; begins at `state` and reads nothing before it.

    With `data.num_workers` all of it, `then` too, happens in worker processes, and where there is a GPU a thread pins
    what they send. Only where captions are encoded while training do workers read, and this process does the rest.

    ConfigError if the data set is smaller than one global batch, or a global batch would lie in two buckets.
    """
    global_batch_size = config.global_batch_size(world_size)
    require(
        len(dataset) >= global_batch_size,
        f"the data set has {len(dataset)} samples, less than one global batch of {global_batch_size}: "
        "lower train.micro_batch_size or train.gradient_accumulation_steps, or encode more data",
    )
    block = dataset.layout.block
    require(
        block % global_batch_size == 0,
        f"data.bucket_block={block} is not a multiple of the global batch of {global_batch_size}: change one of them",
    )
    positions = micro_batches(
        dataset.layout,
        state,
        micro_batch_size=config.train.micro_batch_size,
        num_micro_batches=config.train.gradient_accumulation_steps,
        rank=rank,
        world_size=world_size,
        group_size=config.data.shuffle_group,
    )
    read = partial(read_batch, dataset, caption_dropout=config.data.caption_dropout, seed=config.seed)
    if dataset.online_encoder is not None:  # in this process, where the GPU is; workers read meanwhile
        return (then(finish_batch(dataset, raw)) for raw in _run(read, positions, config.data.num_workers))
    return _run(partial(_whole, dataset, read, then), positions, config.data.num_workers)


def _whole(
    dataset: LatentDataset, read: Callable[[MicroBatch], RawBatch], then: Callable[[Batch], T], micro: MicroBatch
) -> T:
    return then(finish_batch(dataset, read(micro)))


def _run(make: Callable[[MicroBatch], T], positions: Iterator[MicroBatch], num_workers: int) -> Iterator[T]:
    """Apply `make` to each micro-batch in order, in worker processes if there are any."""
    if num_workers == 0:
        return map(make, positions)
    loader = DataLoader(
        _Reader(make),
        sampler=positions,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),  # calls a batch's own `pin_memory`; one without passes as it is
        generator=torch.Generator(),  # or the loader would draw from the global generator
    )
    return iter(loader)


class _Reader(Dataset[object]):
    """A map-style data set whose keys are micro-batches, so that a DataLoader's workers make whole ones."""

    def __init__(self, make: Callable[[MicroBatch], object]) -> None:
        self.make = make

    def __getitem__(self, item: MicroBatch) -> object:
        return self.make(item)


def read_batch(dataset: LatentDataset, micro: MicroBatch, *, caption_dropout: float, seed: int) -> RawBatch:
    """Read and normalise one micro-batch; draw its latents and drop captions by (seed, global sample index)."""
    info = dataset.info
    # In the order of the files: each is opened once and read from front to back.
    samples = {number: dataset.read(number) for number in sorted(set(micro.samples))}
    latents, texts = [], []
    for number, index in zip(micro.samples, micro.indices, strict=True):
        sample = samples[number]
        latent = sample.latent
        if sample.latent_std is not None:  # draw from the distribution
            noise = torch.randn(latent.shape, generator=keyed_generator(seed, index, "posterior"))
            latent = latent + sample.latent_std * noise
        dropped = float(torch.rand((), generator=keyed_generator(seed, index, "caption"))) < caption_dropout
        latents.append(latent)
        texts.append(dataset.empty_text if dropped else sample.text)
    latent_BCHW = (torch.stack(latents) - info.mean_C.view(1, -1, 1, 1)) / info.std_C.view(1, -1, 1, 1)
    return RawBatch(latent_BCHW=latent_BCHW, texts=texts, index_B=torch.tensor(micro.indices))


def encode_captions(encoder: TextEncoder, raw: RawBatch) -> RawBatch:
    """Encode the captions of a micro-batch, each distinct one once."""
    captions = sorted({str(text) for text in raw.texts})
    features = dict(zip(captions, encoder.encode(captions), strict=True))
    return replace(raw, texts=[features[str(text)] for text in raw.texts])


def finish_batch(dataset: LatentDataset, raw: RawBatch) -> Batch:
    """Encode captions that are stored as text, and put all end to end as they are stored; they are padded later."""
    if dataset.online_encoder is not None:
        raw = encode_captions(dataset.online_encoder, raw)
    texts = [text for text in raw.texts if isinstance(text, Tensor)]
    assert len(texts) == len(raw.texts), "captions have to be encoded first"
    packed = pack_text(texts, dataset.info.max_tokens, shared=get_worker_info() is not None)
    return Batch(latent_BCHW=raw.latent_BCHW, text=packed, index_B=raw.index_B)
