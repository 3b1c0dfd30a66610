"""Saving and loading a checkpoint against the disk itself, and what both cost a run.

    torchrun --nproc-per-node 2 -m benchmarks.checkpoint_io --folder /scratch/x     # on the disk in question
    python -m benchmarks.checkpoint_io --resume                                     # start to first resumed step

The first compares, in every round and in rotated order: a plain parallel write of the same number of bytes in the
same number of files with fsync, and a save with checksums, manifest and publishing; a plain parallel read, and
verifying, loading, and both as a resume does. The pages of what is read are dropped before. The ratio is
plain seconds / seconds: 1 is the speed of the disk.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=512, help="width of the model; bytes grow with its square")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="a folder on the disk to measure; default: the system's temporary one")
    parser.add_argument("--resume", action="store_true", help="time the start of a resumed run instead")
    parser.add_argument("--recipe", default="debug", help="recipe of --resume")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of --resume")
    arguments = parser.parse_args(argv)
    if arguments.resume:
        time_to_first_step(arguments.recipe, arguments.overrides)
    else:
        from benchmarks.checkpoint_speed import compare  # torch takes seconds, and --help needs none of it

        compare(arguments.dim, arguments.rounds, arguments.folder)


if __name__ == "__main__":
    main()
