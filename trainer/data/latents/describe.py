"""What is in a folder of latents, for a person: counts and sizes as text, samples as pictures, damage as a list."""

import hashlib
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import torch

from trainer.data.images.contact_sheet import Figure
from trainer.data.latents.dataset_file import LatentFolder
from trainer.data.latents.enlargement import too_small
from trainer.data.latents.shard_file import DamagedShardError
from trainer.encoders.protocols import ImageCodec
from trainer.errors import ConfigError
from trainer.formats.progress_bar import ProgressBar

_MAX_READ = 64  # shards whose captions are counted
_DECODE_BATCH = 16


def _three(values: Sequence[float]) -> str:
    return f"{min(values):.0f} / {statistics.median(values):.0f} / {max(values):.0f}"


def _samples(folder: LatentFolder, number: int) -> dict[str, Any]:
    """The keys and captions of a shard."""
    path = (folder.path / folder.shards[number].file).with_suffix(".samples.json")
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        return content
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: delete it and run python -m trainer.data.encode again") from error


def _caption_lines(folder: LatentFolder) -> list[str]:
    """Lengths of the captions, one a sample: characters and, if stored encoded, tokens."""
    numbers, num_distinct = folder.spread(_MAX_READ), 0
    characters: list[int] = []
    tokens: list[int] = []
    for number in numbers:
        captions = _samples(folder, number)["captions"]
        num_distinct += len(captions)
        with closing(folder.open(number)) as shard:
            characters += [len(captions[i]) for i in shard.caption_id]
            tokens += np.diff(shard.text_offset)[shard.caption_id].tolist()
    part = "" if len(numbers) == len(folder.shards) else f" (in {len(numbers)} of the shards)"
    lines = [
        f"captions{part}: {num_distinct} distinct within their shard, of {len(characters)}",
        f"  characters, least / median / most: {_three(characters)}",
    ]
    if folder.empty_text:
        lines.append(f"  tokens, least / median / most: {_three(tokens)}, padded to {folder.info['max_tokens']}")
    return lines


def _bucket_table(folder: LatentFolder, factor: int, block: int) -> list[str]:
    """One line per bucket: sizes, samples, and what blocks of `block` samples leave out of an epoch."""
    shards, samples = Counter(entry.bucket for entry in folder.shards), Counter[int]()
    for entry in folder.shards:
        samples[entry.bucket] += entry.num_samples
    lines = [f"{'picture':>12} {'latent':>10} {'samples':>12} {'share':>7} {'shards':>8} {'left out':>9}"]
    for number, (height, width) in enumerate(folder.buckets):
        count = samples[number]
        left = count % block if block and len(folder.buckets) > 1 else 0
        lines.append(
            f"{f'{height * factor}x{width * factor}':>12} {f'{height}x{width}':>10} {count:>12} "
            f"{count / folder.num_samples:>7.1%} {shards[number]:>8} {left:>9}" + ("" if count else "  empty")
        )
    return lines


def _precision(folder: LatentFolder) -> str:
    """How captions are stored, where that is not in fp16."""
    error = folder.info.get("text_error")
    return "" if error is None else f", stored in int8 with an error of at most {error:.2%} of a token's length"


def describe(folder: LatentFolder, factor: int, block: int) -> str:
    """What is printed about a folder of latents."""
    info = folder.info
    size = sum(entry.size for entry in folder.shards)
    text = info["text_encoder"] if folder.empty_text else "online, captions are stored"
    lines = [
        f"{folder.num_samples} samples in {len(folder.shards)} shards, {size / 1e9:.3f} GB, "
        f"{size / folder.num_samples / 1e3:.1f} kB a sample{too_small(folder.num_too_small)}",
        f"codec {info['codec']}, {info['channels']} channels, factor {factor}; text encoder {text}{_precision(folder)}",
        f"fingerprint {folder.fingerprint}",
        "mean    " + " ".join(f"{value:8.4f}" for value in info["mean"]),
        "std     " + " ".join(f"{value:8.4f}" for value in info["std"]),
    ]
    return "\n".join([*lines, *_caption_lines(folder), *_bucket_table(folder, factor, block)])


def verify(folder: LatentFolder) -> list[str]:
    """Read every shard whole; the files that are not what their hash says."""
    damaged = []
    for number, entry in enumerate(ProgressBar(folder.shards, "verify", unit="shard")):
        try:
            folder.open(number).close()
            with (folder.path / entry.file).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                    damaged.append(f"{folder.path / entry.file} has another hash")
        except DamagedShardError as error:
            damaged.append(str(error))
    return damaged


@torch.no_grad()
def draw_samples(folder: LatentFolder, codec: ImageCodec, count: int, seed: int) -> list[Figure]:
    """Random samples decoded from their latents, in the order of shards."""
    first = np.cumsum([0, *(entry.num_samples for entry in folder.shards)])
    chosen = np.random.default_rng(seed).choice(folder.num_samples, min(count, folder.num_samples), replace=False)
    by_bucket: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for sample in np.sort(chosen).tolist():
        shard = int(np.searchsorted(first, sample, side="right")) - 1
        by_bucket[folder.shards[shard].bucket].append((shard, sample - int(first[shard])))
    figures: dict[tuple[int, int], Figure] = {}
    for places in by_bucket.values():
        for start in range(0, len(places), _DECODE_BATCH):
            part = places[start : start + _DECODE_BATCH]
            figures.update(zip(part, _decode(folder, codec, part), strict=True))
    return [figures[place] for place in sorted(figures)]


def _decode(folder: LatentFolder, codec: ImageCodec, places: list[tuple[int, int]]) -> list[Figure]:
    """Samples of one bucket, as (shard, row)."""
    with ExitStack() as stack:
        files = {shard: stack.enter_context(closing(folder.open(shard))) for shard in {shard for shard, _ in places}}
        latents = [files[shard].read(row).latent for shard, row in places]
    lists = {shard: _samples(folder, shard) for shard in files}
    rgb = codec.decode(torch.stack(latents)).clamp(-1, 1)
    pictures = ((rgb + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [
        Figure(
            picture=picture,
            caption=lists[shard]["captions"][int(files[shard].caption_id[row])],
            origin=f"{folder.shards[shard].file}, {lists[shard]['keys'][row]}",
        )
        for (shard, row), picture in zip(places, pictures, strict=True)
    ]
