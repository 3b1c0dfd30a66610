"""Reading and writing latents, against what they could cost; and a billion samples.

    python -m benchmarks.data_loading                                      # all tables, some minutes
    python -m benchmarks.data_loading --only reader --samples 8000 --rounds 9 --json data.json
    python -m benchmarks.data_loading --real-shapes                        # only the last section

reader   samples of 8 KiB latent and 20 tokens of width 1280 (50 KiB) from the same values, latents as fp32
         `shards`            ShardDataset in the order of an epoch, checks included; every ratio is to this
         `unchecked`         the same without CRC-32 (format 1)
         `batches`           build_loader: normalised and padded micro-batches of 32
         `webdataset`        webdataset's streaming of tars with .npy members, buffer shuffle of 1000
         `raw read`          the bytes of the shards in order, nothing made of them: the floor
encode   a tar of JPEGs, 128 pixels: `encode` is trainer.data.encode with its decoding, hashing and writing,
         `bare` the same codec (a narrow AutoencoderKL) and text encoder on what is already in memory
scale    10^9 samples in 10^5 shards: set-up, look-up and memory of the order of an epoch
real shapes: see benchmarks/real_shapes.py
"""

import argparse
from pathlib import Path

from trainer.config import command_parser


def command_line() -> argparse.ArgumentParser:
    """Options; see the module docstring."""
    parser = command_parser("benchmarks.data_loading", __doc__)
    parser.add_argument("--only", choices=["reader", "encode", "scale"], help="one of the tables")
    parser.add_argument("--real-shapes", action="store_true", help="what a micro-batch costs stage by stage, alone")
    parser.add_argument("--samples", type=int, default=4000, help="samples of the reader's table")
    parser.add_argument("--pictures", type=int, default=192, help="pictures of the encoders' table")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser


if __name__ == "__main__":
    command_line().parse_known_args()  # --help and mistakes are answered before torch is imported

import os

# Read by the OpenMP runtime that torch loads: waiting threads sleep, so CPU time counts work only.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import io
import json
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import islice
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.interleaved import markdown_table, ratio, time_interleaved, write_json
from benchmarks.real_shapes import real_shapes
from trainer.config import TrainConfig, TrainLoopConfig, command, require
from trainer.data.index import build_index
from trainer.data.latents.dataset_file import read_dataset_file
from trainer.data.latents.encode_folder import build_encoder, encode_tar, shard_names
from trainer.data.latents.format import signed_json
from trainer.data.latents.samples import LatentInfo
from trainer.data.latents.shard_dataset import ShardDataset
from trainer.data.latents.shard_file import ShardEntry
from trainer.data.latents.shard_writer import pack_shard, picture_batches, save_shard
from trainer.data.loader import build_loader
from trainer.data.order import SampleLayout, build_layout
from trainer.data.position import DataState
from trainer.settings.data import DataConfig

CHANNELS, SIDE, TOKENS, WIDTH, PER_SHARD = 4, 32, 20, 1280, 1000
PIXELS = 128
Work = dict[str, Callable[[], None]]


def write_samples(folder: Path, count: int) -> tuple[list[tuple[Path, ShardEntry]], list[str]]:
    """The same random samples as latent shards and as webdataset tars."""
    import webdataset

    shards, tars = [], []
    rng = np.random.default_rng(0)
    for number, first in enumerate(range(0, count, PER_SHARD)):
        size = min(PER_SHARD, count - first)
        latents = rng.standard_normal((size, CHANNELS, SIDE, SIDE)).astype(np.float16)
        texts = rng.standard_normal((size, TOKENS, WIDTH)).astype(np.float16)
        tensors = pack_shard([torch.from_numpy(latents)], [], list(torch.from_numpy(texts)), range(size))
        path = folder / f"{number:05d}.safetensors"
        shards.append((path, ShardEntry(file=path.name, num_samples=size, **save_shard(path, tensors, "benchmark"))))
        tars.append(str(folder / f"{number:05d}.tar"))
        with webdataset.TarWriter(tars[-1]) as tar:
            for i in range(size):
                tar.write({"__key__": f"{first + i:09d}", "latent.npy": latents[i], "text.npy": texts[i]})
    return shards, tars


def open_samples(shards: list[tuple[Path, ShardEntry]], *, checked: bool = True) -> ShardDataset:
    """The data set of those shards."""
    if not checked:
        shards = [(path, replace(entry, index_sha256="")) for path, entry in shards]
    info = LatentInfo(
        channels=CHANNELS, height=SIDE, width=SIDE, text_dim=WIDTH, max_tokens=TOKENS, codec="", text_encoder="",
        fingerprint="benchmark", mean=[0.0] * CHANNELS, std=[1.0] * CHANNELS,
    )  # fmt: skip
    layout = SampleLayout.of_shards([entry.num_samples for _, entry in shards])
    return ShardDataset(info, shards, "benchmark", layout, empty_text=torch.zeros(1, WIDTH))


def reader_work(folder: Path, count: int) -> Work:
    """Each alternative goes once through all samples, files in the page cache."""
    import webdataset

    shards, tars = write_samples(folder, count)
    dataset, unchecked = open_samples(shards), open_samples(shards, checked=False)
    config = TrainConfig(train=TrainLoopConfig(micro_batch_size=32), data=DataConfig(caption_dropout=0.0))

    def read_all(source: ShardDataset, check: bool) -> None:
        order = source.layout.order(0, 0, 8)
        for position in range(len(source)):
            number, row = divmod(order[position], PER_SHARD)
            shard = source._shard(number)
            if not check:
                shard.latent_check = shard.text_check = None
            shard.read(row)

    def batches() -> None:
        state = DataState(seed=0, epoch=0, consumed=0, samples_seen=0)
        for _ in islice(build_loader(dataset, config, rank=0, world_size=1, state=state), count // 32):
            pass

    def stream() -> None:
        source = (
            webdataset.WebDataset(tars, shardshuffle=False).shuffle(1000).decode().to_tuple("latent.npy", "text.npy")
        )
        found = 0
        for latent, text in source:
            torch.from_numpy(latent).float(), torch.from_numpy(text)
            found += 1
        assert found == count

    def raw() -> None:
        for path, _ in shards:
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass

    return {
        "shards": lambda: read_all(dataset, True),
        "unchecked": lambda: read_all(unchecked, False),
        "batches": batches,
        "webdataset": stream,
        "raw read": raw,
    }


def write_jpegs(folder: Path, count: int) -> None:
    """One tar of smooth pictures, as img2dataset writes it."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i in range(count):
            small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            small.resize((PIXELS + 32, PIXELS), Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=95)
            for suffix, content in (("jpg", buffer.getvalue()), ("txt", f"a smooth picture, number {i}".encode())):
                member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (folder / "00000_stats.json").write_text(json.dumps({"successes": count}))


def encode_work(folder: Path, count: int) -> Work:
    """The whole of encoding a tar, and its two encoders alone."""
    import diffusers

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    autoencoder: Any = diffusers.AutoencoderKL
    model = autoencoder(**blocks, block_out_channels=(32, 64, 64, 64), norm_num_groups=8)
    model.save_pretrained(folder / "vae")
    write_jpegs(folder / "images", count)
    data = DataConfig(
        images=str(folder / "images"), latents=str(folder / "latents"), image_size=PIXELS,
        codec=f"diffusers:{folder / 'vae'}",
    )  # fmt: skip
    encoder = build_encoder(data, num_threads=len(os.sched_getaffinity(0)))
    encoder.latents.mkdir()
    index = build_index(encoder.images)
    assert index is not None and encoder.text_encoder is not None
    text_encoder = encoder.text_encoder
    ((name, entry),) = shard_names(index).items()
    rows = index.rows_of(entry)
    ready = [
        batch.permute(0, 3, 1, 2).float() / 127.5 - 1
        for batch in picture_batches(encoder.images, rows, PIXELS, PIXELS, 1)
    ]
    captions = sorted({row.caption for row in rows})

    def bare() -> None:
        text_encoder.encode(captions)
        for rgb_BCHW in ready:
            encoder.codec.posterior(rgb_BCHW)

    return {"encode": lambda: _discard(encode_tar(encoder, index, name, entry)), "bare": bare}


def _discard(_: Any) -> None:
    pass


def table(work: Work, base: str, items: int, rounds: int) -> tuple[str, dict[str, Any]]:
    """Microseconds per item and ratios of CPU and wall time to `base`, medians over rounds."""
    times = time_interleaved(work, rounds=rounds, warmups=1)
    rows, found = [], {}
    for name, clock in times.items():
        cpu, wall = ratio(clock.cpu, times[base].cpu), ratio(clock.wall, times[base].wall)
        micro = 1e6 * float(np.median(clock.cpu)) / items
        rows.append([name, f"{micro:.1f}", *(f"{r.median:.2f} ({r.low:.2f} to {r.high:.2f})" for r in (cpu, wall))])
        found[name] = {"cpu_us": micro, "cpu": asdict(cpu), "wall": asdict(wall)}
    return markdown_table(["", "CPU us each", f"CPU / {base}", f"wall / {base}"], rows), found


def write_description(folder: Path) -> None:
    """dataset.json of 10^9 samples in 10^5 shards, which are not there."""
    entry = {"num_samples": 10_000, "size": 1 << 28, "sha256": "0" * 64, "index_sha256": "0" * 64}
    info = dict.fromkeys(("channels", "height", "width", "text_dim", "max_tokens"), 1)
    shards = [{"file": f"part-{i // 100:05d}__{i:05d}.safetensors", **entry, "bucket": i % 9} for i in range(100_000)]
    content = {"format_version": 2, "info": info, "settings": {}, "empty_text": None, "shards": shards}
    (folder / "dataset.json").write_bytes(signed_json(content))


def measure_scale(folder: Path) -> dict[str, float]:
    """CPU seconds to read the description and build an order, microseconds a look-up, megabytes at the peak."""
    before = _resident_mb()
    start = time.process_time()
    shards = read_dataset_file(folder).shards
    found = {"read dataset.json, CPU s": time.process_time() - start}
    for buckets in (1, 9):
        start = time.process_time()
        sizes, numbers = [entry.num_samples for entry in shards], [entry.bucket % buckets for entry in shards]
        layout, _ = build_layout(sizes, numbers, [0] * len(shards), [1.0], 4096, drop_small=False)
        order = layout.order(0, 0, 8)
        order[layout.size // 2]
        found[f"order of an epoch, {buckets} bucket(s), CPU s"] = time.process_time() - start
        start = time.process_time()
        for position in range(layout.size // 2, layout.size // 2 + 200_000):
            order[position]
        found[f"look-up, {buckets} bucket(s), CPU us"] = (time.process_time() - start) / 0.2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**found, "memory added, MB": _resident_mb() - before, "peak of the process, MB": peak}


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def scale_table(folder: Path) -> tuple[str, dict[str, float]]:
    """`measure_scale` in a process of its own, whose peak of memory is nobody else's."""
    write_description(folder)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(measure_scale, folder).result()
    return markdown_table(["10^9 samples, 10^5 shards", ""], [[k, f"{v:.2f}"] for k, v in found.items()]), found


@command
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = command_line().parse_args(argv)
    require(args.samples >= 32, f"--samples is {args.samples}: use 32 or more")
    for name in ("pictures", "rounds"):
        require(getattr(args, name) >= 1, f"--{name} is {getattr(args, name)}: use 1 or more")
    torch.set_num_threads(args.threads)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.real_shapes:
            text, found["real shapes"] = real_shapes(folder, args.rounds)
            print(text)
            args.only = "real shapes"
        if args.only in (None, "scale"):
            text, found["scale"] = scale_table(folder)
            print(text + "\n")
        if args.only in (None, "reader"):
            text, found["reader"] = table(reader_work(folder, args.samples), "shards", args.samples, args.rounds)
            print(text + "\n")
        if args.only in (None, "encode"):
            text, found["encode"] = table(encode_work(folder, args.pictures), "bare", args.pictures, args.rounds)
            print(text)
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
