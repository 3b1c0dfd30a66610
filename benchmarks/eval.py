"""What the evaluation costs against what it could cost.

    python -m benchmarks.eval                                       # all tables, some minutes on two cores
    python -m benchmarks.eval --only frechet --rounds 3 --json eval.json

features    pictures of 256 pixels on disk: `store` is eval.scoring.feature_store: hashing, decoding, resizing, writing;
            `bare` the Inception network alone on what is already in memory
detection   the same for eval.suites.geneval_steps and YOLOv3-tiny (if its weights are here)
frechet     distance of 2048 features from moments: `ours`, scipy's sqrtm, torchmetrics (general eigenvalues)
memory      peak of a process that streams 30,000 and 10^6 pictures' features into moments, and that indexes 10^6
"""

import argparse
from pathlib import Path

from trainer.config import command_parser


def command_line() -> argparse.ArgumentParser:
    """Options; see the module docstring."""
    parser = command_parser("benchmarks.eval", __doc__)
    parser.add_argument("--only", choices=["features", "detection", "frechet", "memory"], help="one of the tables")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser


if __name__ == "__main__":
    command_line().parse_known_args()  # --help and mistakes are answered before torch is imported

import os

# Read by the OpenMP runtime that torch loads: waiting threads sleep, so CPU time counts work only.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import itertools
import json
import resource
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.interleaved import markdown_table, ratio, time_interleaved, write_json
from eval.metrics.frechet import FrechetReference, Moments, moments_of
from eval.networks.detectors import build_detector, describe_detector
from eval.networks.inception import InceptionEncoder
from eval.pictures.image_files import read_picture
from eval.scoring.feature_store import FeatureStore, add_picture_features
from eval.suites.geneval_steps import detect_files, open_detections
from eval.weights import find_file
from trainer.config import command, require

BATCH, WIDTH = 16, 2048
Work = dict[str, Callable[[], object]]


def write_pictures(folder: Path, count: int) -> list[Path]:
    """Smooth PNG files of 256 pixels."""
    draw = np.random.default_rng(0)
    files = []
    for i in range(count):
        small = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        files.append(folder / f"{i:05d}.png")
        small.resize((256, 256), Image.Resampling.BICUBIC).save(files[-1])
    return files


def feature_work(folder: Path, files: list[Path]) -> Work:
    """`store`: from files to stored features. `bare`: the network alone, on inputs in memory."""
    encoder = InceptionEncoder("torch-fidelity")
    ready = torch.stack([encoder.prepare(read_picture(file)) for file in files]).split(BATCH)
    numbers = itertools.count()

    def stored() -> None:
        store = FeatureStore(folder / f"store{next(numbers)}", encoder.key, encoder.dim)
        add_picture_features(store, encoder, files, batch_size=BATCH)

    return {"bare": lambda: [encoder.encode(batch) for batch in ready], "store": stored}


def detection_work(folder: Path, files: list[Path]) -> Work:
    """`cached`: from files to cached detections. `bare`: the detector alone, on pictures in memory."""
    detector = build_detector("yolov3-tiny")
    ready = [read_picture(file) for file in files]
    numbers = itertools.count()

    def cached() -> None:
        cache = open_detections(folder / f"cache{next(numbers)}", describe_detector("yolov3-tiny")[1])
        detect_files(cache, detector, files)

    return {"bare": lambda: [detector.detect(picture) for picture in ready], "cached": cached}


def random_moments(count: int, seed: int) -> Moments:
    """Moments of correlated features."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.05, 1.5, WIDTH)
    # Mixed, or the product of the covariances would be nearly diagonal, which makes general eigenvalues cheap.
    mix = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    return moments_of([torch.randn(count, WIDTH, generator=generator) * scale @ mix])


def our_distance(a: Moments, b: Moments) -> float:
    """As the FID suite computes it."""
    return FrechetReference.from_moments(a).distance(b)


def scipy_distance(a: Moments, b: Moments) -> float:
    """Frechet distance as pytorch-fid and clean-fid compute it, with the installed scipy."""
    from scipy import linalg

    root = linalg.sqrtm(a.covariance_DD.numpy() @ b.covariance_DD.numpy())
    traces = float(a.covariance_DD.trace() + b.covariance_DD.trace())
    return float((a.mean_D - b.mean_D).square().sum()) + traces - 2 * float(np.trace(root).real)


def torchmetrics_distance(a: Moments, b: Moments) -> float:
    """Frechet distance as torchmetrics computes it."""
    from torchmetrics.image.fid import _compute_fid

    return float(_compute_fid(a.mean_D, a.covariance_DD, b.mean_D, b.covariance_DD))


def frechet_work(count: int) -> tuple[Work, dict[str, float]]:
    """The same distance computed in three ways, and the dictionary in which they leave its values."""
    a, b = random_moments(count, 0), random_moments(count, 1)
    ways = {"ours": our_distance, "scipy": scipy_distance, "torchmetrics": torchmetrics_distance}
    values: dict[str, float] = {}

    def run(name: str) -> Callable[[], object]:
        return lambda: values.__setitem__(name, ways[name](a, b))

    return {name: run(name) for name in ways}, values


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_moments(count: int) -> float:
    """Megabytes that a stream of `count` rows adds to the process."""
    before = _peak_mb()

    def parts() -> Iterator[Tensor]:
        for start in range(0, count, 8192):
            yield torch.randn(min(8192, count - start), WIDTH)

    moments_of(parts())
    return _peak_mb() - before


def measure_index(count: int) -> float:
    """Megabytes that the names of `count` stored rows add to the process."""
    with tempfile.TemporaryDirectory() as name:
        store = FeatureStore(Path(name), {"network": "none"}, 1)
        for start in range(0, count, 50_000):
            store.add([f"{i:064x}" for i in range(start, start + 50_000)], torch.zeros(50_000, 1))
        before = _peak_mb()
        store.refresh()
        return _peak_mb() - before


def memory_table() -> tuple[str, dict[str, float]]:
    """Peaks of memory, each measured in a process of its own."""
    found = {}
    jobs: tuple[tuple[str, Callable[[int], float], int], ...] = (
        ("moments of 30,000 pictures, MB", measure_moments, 30_000),
        ("moments of 1,000,000 pictures, MB", measure_moments, 1_000_000),  # the longest part: minutes of products
        ("names of 1,000,000 pictures, MB", measure_index, 1_000_000),
    )
    for title, measure, count in jobs:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found[title] = pool.submit(measure, count).result()
    return markdown_table(["peak of memory added", ""], [[k, f"{v:.0f}"] for k, v in found.items()]), found


def table(work: Work, base: str, items: int, rounds: int, warmups: int = 1) -> tuple[str, dict[str, Any]]:
    """Milliseconds per item and ratios of CPU and wall time to `base`, medians over rounds."""
    quiet = {name: _discard(action) for name, action in work.items()}
    times = time_interleaved(quiet, rounds=rounds, warmups=warmups)
    rows, found = [], {}
    for name, clock in times.items():
        cpu, wall = ratio(clock.cpu, times[base].cpu), ratio(clock.wall, times[base].wall)
        each = 1e3 * float(np.median(clock.cpu)) / items
        rows.append([name, f"{each:.1f}", *(f"{r.median:.3f} ({r.low:.3f} to {r.high:.3f})" for r in (cpu, wall))])
        found[name] = {"cpu_ms": each, "cpu": asdict(cpu), "wall": asdict(wall)}
    return markdown_table(["", "CPU ms each", f"CPU / {base}", f"wall / {base}"], rows), found


def _discard(action: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        action()

    return run


def frechet_table(rounds: int) -> tuple[str, dict[str, Any]]:
    """Times of the three ways for covariances of full rank (5,000 pictures) and below it (1,000)."""
    texts, found = [], {}
    for count in (5000, 1000):
        work, values = frechet_work(count)
        text, found[str(count)] = table(work, "ours", 1, rounds, warmups=0)  # each takes most of a minute
        shown = ", ".join(f"{name} {value:.6f}" for name, value in values.items())
        texts.append(f"moments of {count} pictures: {shown}\n\n{text}")
    return "\n\n".join(texts), found


@command
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = command_line().parse_args(argv)
    for name in ("pictures", "rounds"):
        require(getattr(args, name) >= 1, f"--{name} is {getattr(args, name)}: use 1 or more")
    torch.set_num_threads(args.threads)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_pictures(folder, args.pictures)
        if args.only in (None, "memory"):
            text, found["memory"] = memory_table()
            print(text + "\n")
        if args.only in (None, "features"):
            text, found["features"] = table(feature_work(folder, files), "bare", len(files), args.rounds)
            print(text + "\n")
        if args.only in (None, "detection") and find_file("yolov3-tiny") is not None:
            text, found["detection"] = table(detection_work(folder, files), "bare", len(files), args.rounds)
            print(text + "\n")
        if args.only in (None, "frechet"):
            text, found["frechet"] = frechet_table(args.rounds)
            print(text)
    print(json.dumps({"threads": args.threads, "torch": torch.__version__}))
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
