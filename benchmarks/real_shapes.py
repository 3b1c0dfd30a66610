"""What one image costs the data path at the shapes of a real run: CPU time, stage by stage and of whole loaders.

A latent of 32 x 32, captions of up to 120 tokens of width 4,096 (T5-XXL), micro-batches of 64, files in the page cache.
`typical`: lengths from a log-normal distribution of mean 35, an assumption (CC12M, arXiv 2102.08981, has 20 words a
caption, of which T5 makes about 30 pieces), 4 channels; `worst`: every caption has 120, 16 channels.

stages   read      the bytes of latent and caption from the file
         check     CRC-32 of these bytes
         unpack    latents to fp32, normalised and stacked; the draw that drops captions
         pack      tokens end to end in new shared memory
         noise     noise, time and mask of each sample
         send      what is left to be put into shared memory: the noised latents
         copy      one copy of all that was sent, as pinning makes it
         pad       the text padded on the device (here the CPU; a GPU needs microseconds)
loaders  a worker and the process it sends to, which copies once: sent padded (as if padded by the worker), packed, int8
"""

import gc
import resource
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.interleaved import markdown_table, time_interleaved
from trainer.config import DiffusionConfig, TrainConfig, TrainLoopConfig
from trainer.data.latents.format import check_of
from trainer.data.latents.packed_text import PackedText, pack_text, stored_text
from trainer.data.latents.samples import Batch, LatentInfo
from trainer.data.latents.shard_dataset import ShardDataset
from trainer.data.latents.shard_file import ShardEntry
from trainer.data.latents.shard_writer import pack_shard, save_shard
from trainer.data.loader import finish_batch, load_batches, read_batch
from trainer.data.order import SampleLayout
from trainer.data.position import DataState, MicroBatch, micro_batches
from trainer.diffusion.flow import NoisedBatch, draw_noise
from trainer.settings.data import DataConfig

MICRO, COUNT, WIDTH, MOST_TOKENS, SIDE = 64, 256, 4096, 120, 32
CASES = {"typical": 4, "worst": 16}  # channels
DIFFUSION = DiffusionConfig(mask_ratio=0.5)


def lengths_of(case: str) -> list[int]:
    """Tokens of each caption."""
    drawn = np.random.default_rng(0).lognormal(np.log(30), 0.55, COUNT).round().clip(3, MOST_TOKENS).astype(int)
    return [MOST_TOKENS] * COUNT if case == "worst" else drawn.tolist()


def write_data(path: Path, case: str, text_dtype: str) -> ShardDataset:
    """A shard of random samples, opened."""
    torch.manual_seed(0)
    channels = CASES[case]
    latent = torch.randn(COUNT, channels, SIDE, SIDE).half()
    texts = [stored_text(torch.randn(length, WIDTH), text_dtype) for length in lengths_of(case)]
    entry = ShardEntry(
        file=path.name, num_samples=COUNT, **save_shard(path, pack_shard([latent], [], texts, range(COUNT)), "x")
    )
    info = LatentInfo(
        channels=channels, height=SIDE, width=SIDE, text_dim=WIDTH, max_tokens=MOST_TOKENS, codec="", text_encoder="",
        fingerprint="x", mean=[0.0] * channels, std=[1.0] * channels,
    )  # fmt: skip
    empty = stored_text(torch.zeros(1, WIDTH), text_dtype)
    return ShardDataset(info, [(path, entry)], "x", SampleLayout.of_shards([COUNT]), empty_text=empty)


def _positions(dataset: ShardDataset) -> list[MicroBatch]:
    found = micro_batches(
        dataset.layout, DataState(seed=0, epoch=0, consumed=0, samples_seen=0), micro_batch_size=MICRO,
        num_micro_batches=1, rank=0, world_size=1, group_size=8,
    )  # fmt: skip
    return list(islice(found, COUNT // MICRO))


def _each(items: list[Any], change: Callable[[Any], object]) -> Callable[[], None]:
    def run() -> None:
        for item in items:
            change(item)

    return run


def _tensors(batch: NoisedBatch) -> list[Tensor]:
    """The large ones."""
    return [batch.x_BCHW, batch.target_BCHW, batch.text.token_TR]


def stage_work(dataset: ShardDataset) -> dict[str, Callable[[], None]]:
    """Each stage once for all samples; `unpack` still with the two before it."""
    shard, positions = dataset._shard(0), _positions(dataset)
    reading = partial(read_batch, dataset, caption_dropout=0.0, seed=0)
    raw = [reading(micro) for micro in positions]
    batches = [finish_batch(dataset, item) for item in raw]
    noising = partial(draw_noise, config=DIFFUSION, seed=0, patch_size=2)
    noised = [noising(batch) for batch in batches]

    def read_bytes(row: int) -> tuple[bytearray, bytearray]:
        start, end = shard.text_offset[row : row + 2].tolist()
        return shard._bytes(shard.places["latent"], row, 1), shard._bytes(shard.text, start, end - start)

    content = [read_bytes(row) for row in range(COUNT)]
    pinned = torch.zeros(max(value.nbytes for batch in noised for value in _tensors(batch)), dtype=torch.uint8)

    def copy(value: Tensor) -> Tensor:
        return pinned[: value.nbytes].copy_(value.flatten().view(torch.uint8))

    return {
        "read": _each(list(range(COUNT)), read_bytes),
        "check": _each(content, lambda parts: [check_of(part) for part in parts]),
        "unpack": _each(positions, reading),
        "pack": _each(raw, lambda item: pack_text(item.texts, MOST_TOKENS, shared=True)),
        "noise": _each(batches, noising),
        "send": _each(noised, lambda batch: [value.clone().share_memory_() for value in _tensors(batch)[:2]]),
        "copy": _each(noised, lambda batch: [copy(value) for value in _tensors(batch)]),
        "pad": _each(noised, lambda batch: batch.text_BLD),
    }


def stage_table(dataset: ShardDataset, rounds: int) -> dict[str, float]:
    """Microseconds of CPU an image per stage, medians over rounds."""
    times = time_interleaved(stage_work(dataset), rounds=rounds, warmups=1)
    found = {name: 1e6 * float(np.median(clock.cpu)) / COUNT for name, clock in times.items()}
    found["unpack"] -= found["read"] + found["check"]
    return found


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A noised batch whose text the worker has padded: what is sent if the device does not pad."""

    noised: NoisedBatch
    text_BLD: Tensor


def _noised(batch: Batch) -> NoisedBatch:
    return draw_noise(batch, DIFFUSION, seed=0, patch_size=2)


def _padded(batch: Batch) -> Sent:
    noised = _noised(batch)
    text = PackedText(token_TR=torch.zeros(1, 1), offset_B1=noised.text.offset_B1, length=MOST_TOKENS)
    return Sent(noised=replace(noised, text=text), text_BLD=noised.text_BLD)


def loader_cpu(dataset: ShardDataset, *, padded: bool) -> float:
    """Microseconds of CPU an image of a worker and this process, which copies what it gets; the start left out."""
    data = DataConfig(num_workers=1, caption_dropout=0.0)
    config = TrainConfig(train=TrainLoopConfig(micro_batch_size=MICRO), data=data)
    start = DataState(seed=0, epoch=0, consumed=0, samples_seen=0)
    then: Callable[[Batch], Sent | NoisedBatch] = _padded if padded else _noised
    totals = []
    for epochs in (1, 3):  # the difference is two epochs without the worker's start
        before = _all_cpu()
        loader = load_batches(dataset, config, rank=0, world_size=1, state=start, then=then)
        for item in islice(loader, epochs * COUNT // MICRO):
            noised = item.noised if isinstance(item, Sent) else item
            for value in [*_tensors(noised), *([item.text_BLD] if isinstance(item, Sent) else [])]:
                value.clone()
        del loader, item, noised, value
        gc.collect()  # the worker ends, and its time becomes this process's
        totals.append(_all_cpu() - before)
    return 1e6 * (totals[1] - totals[0]) / (2 * COUNT)


def _all_cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def real_shapes(folder: Path, rounds: int) -> tuple[str, dict[str, Any]]:
    """Both tables of both cases, as text and as numbers."""
    parts: list[str] = []
    found: dict[str, Any] = {}
    for case in CASES:
        wide, narrow = (write_data(folder / f"{case}-{name}", case, name) for name in ("fp16", "int8"))
        stages = {name: stage_table(data, rounds) for name, data in (("fp16", wide), ("int8", narrow))}
        rows = [[name, *(f"{value:.0f}" for value in stages[name].values())] for name in stages]
        parts.append(markdown_table([f"{case}, CPU us an image", *stages["fp16"]], rows))
        ways = {"sent padded": (wide, True), "packed": (wide, False), "packed, int8": (narrow, False)}
        cpu: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, (data, padded) in ways.items():
                cpu[name].append(loader_cpu(data, padded=padded))
        rows = []
        for name, (data, padded) in ways.items():
            micro, size = float(np.median(cpu[name])), sent_bytes(data, padded=padded)
            rows.append([name, f"{size / 1e3:.0f}", f"{micro:.0f}", f"{1e6 / micro:.0f}"])
            found[f"{case}, {name}"] = {"bytes": size, "cpu_us": micro}
        parts.append(markdown_table([case, "kB sent an image", "CPU us an image", "images/s a core"], rows))
        found[f"{case}, stages"] = stages
    return "\n\n".join(parts), found


def sent_bytes(dataset: ShardDataset, *, padded: bool) -> float:
    """Bytes a worker sends for an image."""
    batches = [
        _noised(finish_batch(dataset, read_batch(dataset, micro, caption_dropout=0.0, seed=0)))
        for micro in _positions(dataset)
    ]
    latents = 2 * batches[0].x_BCHW.nbytes / MICRO
    text = (
        batches[0].text_BLD.nbytes / MICRO if padded else sum(batch.text.token_TR.nbytes for batch in batches) / COUNT
    )
    return latents + text
