"""The runs of the studies, one after another or several side by side, within the time that is given."""

import argparse
import os
import signal
import time
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare.compute import where_it_computes
from benchmarks.compare.data import training_batches
from benchmarks.compare.records import is_done
from benchmarks.compare.report import write_report
from benchmarks.compare.studies import SIZES, STUDIES, Job, Size, jobs_of, run_config
from benchmarks.compare.training import Run, RunConfig, train
from benchmarks.interleaved import write_json
from trainer.config import require

TRIED_STEPS = 20
RESERVE = 0.8  # share of the minutes that steps are counted on; compilation and validation take the rest


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is asked for; `until` is a time of day in seconds."""

    out: Path
    studies: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    size: Size
    device: str
    until: float
    side_by_side: int

    @classmethod
    def of(cls, given: argparse.Namespace) -> "Comparison":
        """From the command line; ConfigError on what cannot be, before anything is made."""
        on_cpu = given.device == "cpu"
        require(on_cpu or torch.cuda.is_available(), "--device cuda: no GPU is seen here, use --device cpu")
        for option in ("steps", "jobs", "minutes"):
            value = getattr(given, option)
            require(value is None or value > 0, f"--{option} is {value}: use more than 0, or leave it out")
        studies = tuple(given.studies or (STUDIES if on_cpu else ("pair",)))
        for name in studies:
            require(name in STUDIES, f"--studies {name} is not known: choose from {', '.join(STUDIES)}")
        size = SIZES[given.size or ("small" if on_cpu else "large")]
        seconds = given.minutes * 60 if given.minutes else float("inf")
        steps = given.steps or size.steps
        if given.steps is None and given.minutes and not on_cpu:
            steps = steps_within(seconds / len(given.seeds), size, torch.device(given.device))
        return cls(
            out=given.out, studies=studies, seeds=tuple(given.seeds), steps=steps, size=size, device=given.device,
            until=time.time() + seconds, side_by_side=given.jobs or ((os.cpu_count() or 1) if on_cpu else 1),
        )  # fmt: skip

    def jobs(self, studies: Iterable[str]) -> list[Job]:
        """Runs of some studies, each once."""
        found = [
            job for name in studies for job in jobs_of(STUDIES[name], self.size, steps=self.steps, seeds=self.seeds)
        ]
        return list({job.name: job for job in found}.values())


def steps_within(seconds: float, size: Size, device: torch.device) -> int:
    """Steps that the main pair can take one after the other: a few of each are timed, without compilation."""
    each = 0.0
    for variant in ("dense", "expert_choice"):
        run = Run(run_config(variant, size, steps=10**6, seed=0), device)
        config = run.config
        batches = training_batches(
            0, range(TRIED_STEPS), config.batch_size, config.time_shift, config.num_kinds, device
        )
        losses = []
        for number, noised in enumerate(batches):
            losses.append(run.train_step(noised))
            if number == TRIED_STEPS // 4:
                losses[-1].item()
                start = time.perf_counter()
        losses[-1].item()
        each += (time.perf_counter() - start) / (TRIED_STEPS - 1 - TRIED_STEPS // 4)
    return max(1, int(RESERVE * seconds / each))


def do(config: RunConfig, path: Path, device: str, until: float, threads: int | None) -> None:
    """Train one run or what is left of it; SIGINT and SIGTERM make it save and stop."""
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda got, _: stopped.append(got))
    if time.time() > until:
        return
    if threads:
        torch.set_num_threads(threads)
    train(Run(config, torch.device(device)), path, stop=lambda: bool(stopped) or time.time() > until)


def do_elsewhere(name: str, *task: Any) -> None:
    """`do` in a process of its own."""
    process = get_context("spawn").Process(target=do, args=task)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{name} ended with exit code {process.exitcode}: see above")


def run_all(todo: list[Job], asked: Comparison) -> Generator[Job]:
    """Do the runs; each that ended, whole or not. Where this is closed before, those under way save and stop."""
    tasks = {job: (job.config, asked.out / "runs" / f"{job.name}.pt", asked.device, asked.until) for job in todo}
    if asked.side_by_side == 1:
        for job, task in tasks.items():
            do(*task, None)
            yield job
        return
    threads = max(1, (os.cpu_count() or 1) // asked.side_by_side)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ThreadPoolExecutor(asked.side_by_side) as pool:
        futures = {pool.submit(do_elsewhere, job.name, *task, threads): job for job, task in tasks.items()}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            while active := [future for future in futures if future.running()]:
                for child in active_children():
                    child.terminate()  # from a terminal they got the signal themselves
                wait(active, timeout=1)


def measure_where(asked: Comparison) -> None:
    """OUT/where.json: where the experts of the pair's first whole run compute, measured once."""
    path = asked.out / "where.json"
    for job in asked.jobs(["pair"]):
        if job.variant == "expert_choice" and is_done(job, asked.out) and not path.is_file():
            run = Run(job.config, torch.device(asked.device), compiled=False)
            run.load(asked.out / "runs" / f"{job.name}.pt")
            write_json(path, where_it_computes(run))


def compare(asked: Comparison) -> None:
    """All runs that are not yet done, and the page after each."""
    (asked.out / "runs").mkdir(parents=True, exist_ok=True)
    jobs = asked.jobs(asked.studies)
    todo = [job for job in jobs if not is_done(job, asked.out)]
    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them done", flush=True)
    with closing(run_all(todo, asked)) as ended:
        for job in ended:
            if is_done(job, asked.out):
                write_report(asked.out, {name: asked.jobs([name]) for name in STUDIES})
            else:
                print(f"stopped at {job.name}: the same command goes on from here", flush=True)
    measure_where(asked)
    write_report(asked.out, {name: asked.jobs([name]) for name in STUDIES})
    print(f"report: {asked.out / 'compare.html'}", flush=True)
