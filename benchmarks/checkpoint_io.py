"""Saving and loading a checkpoint against the disk itself, and what both cost a run.

    torchrun --nproc-per-node 2 -m benchmarks.checkpoint_io --folder /scratch/x     # on the disk in question
    python -m benchmarks.checkpoint_io --resume                                     # start to first resumed step

The first compares, in every round and in rotated order: a plain parallel write of the same number of bytes in the
same number of files with fsync, and a save with checksums, manifest and publishing; a plain parallel read, and
verifying, loading, and both as a resume does. The pages of what is read are dropped before. The ratio is
plain seconds / seconds: 1 is the speed of the disk.
"""

import argparse

from trainer.cluster.leave import run_and_leave
from trainer.config import command_parser


def command_line() -> argparse.ArgumentParser:
    """Options; see the module docstring."""
    parser = command_parser("benchmarks.checkpoint_io", __doc__)
    parser.add_argument("--dim", type=int, default=512, help="width of the model; bytes grow with its square")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="a folder on the disk to measure; default: the system's temporary one")
    parser.add_argument("--resume", action="store_true", help="time the start of a resumed run instead")
    parser.add_argument("--recipe", default="debug", help="recipe of --resume")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of --resume")
    return parser


if __name__ == "__main__":
    command_line().parse_known_args()  # --help and mistakes are answered before torch is imported

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.interleaved import markdown_table, ratio, time_interleaved
from trainer.checkpoint.folder import fault
from trainer.checkpoint.load import load_checkpoint
from trainer.checkpoint.reader import rank_file
from trainer.checkpoint.save import Saver, write_checkpoint
from trainer.checkpoint.snapshot import take_snapshot
from trainer.checkpoint.state import Topology, TrainState
from trainer.config import ModelConfig, ParallelConfig, TrainConfig, TrainLoopConfig
from trainer.data.dataset import open_dataset
from trainer.data.loader import build_loader
from trainer.data.position import DataState
from trainer.diffusion.flow import noise_batch, training_loss
from trainer.diffusion.model import ModelShape
from trainer.distributed import World, barrier, detect_world, process_group
from trainer.engine.deepspeed_config import load_deepspeed_config
from trainer.engine.ema import Ema
from trainer.engine.engine import build_engine

BLOCK = 1 << 26
STATE = TrainState(step=1, data=DataState(seed=0, epoch=0, consumed=0, samples_seen=0))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A trained-one-step engine and where it saves."""

    engine: Any
    ema: Ema
    config: TrainConfig
    world: World
    folder: Path

    @property
    def topology(self) -> Topology:
        return Topology(world_size=self.world.size, ep_size=self.config.parallel.ep_size, zero_stage=3)

    def save(self) -> Path:
        """A save for which training waits."""
        info = open_dataset(self.config).info
        snapshot = take_snapshot(self.engine, self.ema, STATE, self.config, self.topology, info)
        return write_checkpoint(snapshot, self.config, self.world)


def build(dim: int, folder: Path, world: World) -> Bench:
    """One optimizer step of a model of width `dim`, so that there are moments to save. Collective."""
    config = TrainConfig(
        run_dir=str(folder / "run"),
        train=TrainLoopConfig(micro_batch_size=1),
        parallel=ParallelConfig(ep_size=world.size),
        model=ModelConfig(dim=dim),
    )
    info = open_dataset(config).info
    shape = ModelShape.of(info)
    device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    engine = build_engine(config, load_deepspeed_config(config, world.size), shape, device)
    state = DataState(seed=0, epoch=0, consumed=0, samples_seen=0)
    batch = next(build_loader(open_dataset(config), config, rank=world.rank, world_size=world.size, state=state))
    noised = noise_batch(batch, config.diffusion, seed=0, patch_size=config.model.patch_size).to(device)
    prediction, _ = engine(noised.x_BCHW, noised.t_B, noised.text_BLD, noised.text_mask_BL, noised.keep_BS)
    engine.backward(training_loss(prediction, noised, config.model.patch_size))
    engine.step()
    return Bench(engine=engine, ema=Ema(engine, config.ema), config=config, world=world, folder=folder)


def plain_write(path: Path, size: int, block: memoryview) -> None:
    """`size` bytes in large blocks, flushed; the old file goes when the new one is there, as with a checkpoint.

    By hand, for it is what saves are measured against: nothing but the writes.
    """
    new = path.with_suffix(".new")
    with new.open("wb", buffering=0) as file:
        for start in range(0, size, len(block)):
            file.write(block[: min(len(block), size - start)])
        os.fsync(file.fileno())
    os.replace(new, path)


def plain_read(path: Path, block: memoryview) -> None:
    """All of a file in large blocks."""
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def forget(path: Path) -> None:
    """Drop a file's pages from memory, so that reading it reads the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def alternatives(bench: Bench, stalls: list[float]) -> tuple[dict[str, Callable[[], None]], int]:
    """What is timed, by name, and this rank's bytes. All ranks do the same at the same time.

    `stalls` gets the seconds for which training waits at each save in the background.
    """
    rank, size = bench.world.rank, bench.world.size
    checkpoint = bench.save()
    mine, plain = checkpoint / rank_file(rank), bench.folder / f"plain_{rank}"
    count = mine.stat().st_size
    block = memoryview(bytearray(os.urandom(1 << 20) * (BLOCK >> 20)))

    def verify() -> None:
        problem = fault(checkpoint, part=rank, num_parts=size)
        assert not problem, problem

    def load() -> None:
        load_checkpoint(checkpoint, bench.engine, bench.ema, bench.world)

    saver = Saver(
        replace(bench.config, train=replace(bench.config.train, async_save=True)),
        bench.topology, open_dataset(bench.config).info, bench.world,
    )  # fmt: skip

    def background() -> None:
        start = time.perf_counter()
        saver.save(bench.engine, bench.ema, STATE, required=False)
        stalls.append(time.perf_counter() - start)
        saver.finish()

    def cold(path: Path, *actions: Callable[[], None]) -> None:
        forget(path)
        barrier()
        for action in actions:
            action()

    plain_write(plain, count, block)
    work: dict[str, Callable[[], Any]] = {
        "plain write": lambda: plain_write(plain, count, block),
        "save": bench.save,
        "background": background,
        "plain read": lambda: cold(plain, lambda: plain_read(plain, block)),
        "verify": lambda: cold(mine, verify),
        "load": lambda: cold(mine, load),
        "verify and load": lambda: cold(mine, verify, load),
    }

    def together(action: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            barrier()
            action()
            barrier()

        return run

    return {name: together(action) for name, action in work.items()}, count


def compare(dim: int, rounds: int, parent: str | None) -> None:
    """The table of this disk. Collective."""
    world = detect_world()
    import deepspeed.utils

    deepspeed.utils.logger.setLevel("ERROR")
    with process_group(world):
        _compare(dim, rounds, parent, world)


def _compare(dim: int, rounds: int, parent: str | None, world: World) -> None:
    box = [tempfile.mkdtemp(dir=parent) if world.is_main else ""]
    torch.distributed.broadcast_object_list(box)
    folder = Path(box[0])
    bench = build(dim, folder, world)
    stalls: list[float] = []
    work, count = alternatives(bench, stalls)
    times = time_interleaved(work, rounds=rounds, warmups=2)
    barrier()
    if not world.is_main:
        return
    rows = []
    for name, base in (("save", "plain write"), ("verify", "plain read"), ("load", "plain read"),
                       ("verify and load", "plain read")):  # fmt: skip
        found = ratio(times[base].wall, times[name].wall)
        rows.append([name, base, f"{found.median:.2f}", f"{found.low:.2f} - {found.high:.2f}"])
    found = ratio(stalls[-rounds:], times["save"].wall)
    print(f"{world.size} processes, {count * world.size / 1e6:.0f} MB, median of {rounds} rounds")
    print(markdown_table(["action", "against", "ratio of speeds", "quartiles"], rows))
    print(f"a save in the background holds training for {found.median:.2f} of the time of a save")
    shutil.rmtree(folder)


STEP = re.compile(r"step (\d+)/")


def time_to_first_step(recipe: str, overrides: list[str]) -> None:
    """Seconds from starting `trainer.train` on a run folder with a checkpoint to its first step; share of saving."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", "-m", "trainer.train", recipe, f"run_dir={folder}/run", *overrides]
        start = time.perf_counter()
        log = subprocess.run([*command, "train.stop_at_step=10"], capture_output=True, text=True, check=True).stdout
        run = time.perf_counter() - start
        saving = sum(float(found) for found in re.findall(r"saved .* in ([\d.]+) s", log))
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            next(line for line in process.stdout if STEP.search(line))
            seconds = time.perf_counter() - start
            process.stdout.read()
    print(f"start to first resumed step: {seconds:.1f} s; saving: {saving:.1f} s of a run of {run:.1f} s with 10 steps")


def main(argv: list[str] | None = None) -> None:
    """Print one of the two measurements."""
    arguments = command_line().parse_args(argv)
    if arguments.resume:
        time_to_first_step(arguments.recipe, arguments.overrides)
    else:
        compare(arguments.dim, arguments.rounds, arguments.folder)


if __name__ == "__main__":
    run_and_leave(main)
