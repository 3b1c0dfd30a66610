"""Finished runs as read from OUT/runs, and what one of them costs."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from benchmarks.compare.data import SHAPE
from benchmarks.compare.studies import Job
from benchmarks.compare.training import Record, RunConfig
from trainer.config import TrainConfig
from trainer.plan.job import count_parameters
from trainer.telemetry.flops import training_flops

TEXT_TOKENS = 10  # of a caption, in the mean
Runs = dict[str, dict[int, Record]]  # by variant and seed


def read_record(job: Job, out: Path) -> Record | None:
    """The record of a run with these settings, None where there is none."""
    path = out / "runs" / f"{job.name}.json"
    if not path.is_file():
        return None
    record = Record(**json.loads(path.read_text()))
    return record if record.of == job.config.as_json() else None


def is_done(job: Job, out: Path) -> bool:
    """Whether the run has come to its end."""
    record = read_record(job, out)
    return record is not None and record.step == job.config.steps


def finished(jobs: Sequence[Job], out: Path) -> Runs:
    """Records of those runs that have come to their end."""
    found: Runs = {}
    for job in jobs:
        record = read_record(job, out)
        if record and record.step == job.config.steps:
            found.setdefault(job.variant, {})[job.config.seed] = record
    return found


@lru_cache(maxsize=256)
def training_flops_of(config: RunConfig) -> float:
    """Model FLOPs of one image's training step."""
    tokens = SHAPE.height * SHAPE.width // config.model.patch_size**2
    return float(training_flops(config.model, config.moe, SHAPE, tokens, TEXT_TOKENS))


@lru_cache(maxsize=256)
def parameters_of(config: RunConfig) -> tuple[int, int]:
    """Parameters in all, and activated per token in the mean."""
    counts = count_parameters(TrainConfig(model=config.model, moe=config.moe), SHAPE)
    return counts.experts + counts.rest, counts.active
