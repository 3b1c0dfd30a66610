"""From pictures to a report: every rank computes its share, the first scores and writes.

Written are report.json, report.csv and report.html in the folder of results. All of it may be killed at any time: the
same command goes on and ends with the same report.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.pages.numbers import headline_lines, log_numbers, write_csv
from eval.pages.sections import number_section, render_report
from eval.pictures.image_files import left_out
from eval.pictures.protocol import package_versions
from eval.scoring.job import Result, ScoringJob, find_suite, prepare_all, score_all
from trainer.distributed import barrier
from trainer.files import write_text
from trainer.telemetry.trackers import send_scores

REPORTS = ("report.html", "report.json")


@dataclass(frozen=True, kw_only=True)
class ScoredSubject:
    """What is scored, for the report: a name, a sentence, and what there is to say of the run behind the pictures.

    `sampling` is the sampling card, `model` describes the model by name and value, `config` is the run's, and
    `run_sections` are ready parts of the page, `unused` sentences on files that were not scored. With `run_dir` the
    numbers go to that run's TensorBoard.
    """

    name: str
    summary: str
    step: int = 0
    sampling: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    run_sections: tuple[str, ...] = ()
    run_dir: Path | None = None


def score_and_report(job: ScoringJob, subject: ScoredSubject) -> dict[str, Any]:
    """Compute on every rank, then score and report on the first. Collective; the report, {} on the others."""
    start = time.perf_counter()
    prepare_all(job)
    if job.world.size > 1:
        barrier()
    if not job.world.is_main:
        return {}
    reference = job.config.reference
    unused = (*subject.unused, *(left_out(reference) if reference is not None and reference.is_dir() else ()))
    results = score_all(job)
    report: dict[str, Any] = {
        "run": subject.name,
        "summary": subject.summary,
        "step": subject.step,
        "model": dict(subject.model),
        "pictures": len(job.files),
        "pictures_per_prompt": job.config.num_samples,
        "headlines": {name: summary_lines(name, result) for name, result in results.items()},
        "results": results,
        "sampling": dict(subject.sampling),
        "versions": package_versions(),
        "config": dict(subject.config),
        "seconds": time.perf_counter() - start,
        "notes": [*subject.notes, *unused],
    }
    write_report(job, report, subject.run_sections)
    if subject.run_dir is not None:
        numbers = log_numbers(subject.run_dir, report)
        send_scores(subject.run_dir, subject.step, numbers, [job.config.out / name for name in REPORTS])
    print_summary(report, job.config.out, unused)
    return report


def write_report(job: ScoringJob, report: Mapping[str, Any], run_sections: tuple[str, ...]) -> None:
    """report.json, report.csv, report.html."""
    out = job.config.out
    suites = {name: (find_suite(name), result) for name, result in report["results"].items()}
    sections = {
        name: suite.section(result)
        if suite.section is not None
        else number_section(suite.title, suite.names, suite.spreads, result)
        for name, (suite, result) in suites.items()
    }
    stats = [suite.stat(result) for suite, result in suites.values() if suite.stat is not None]
    write_text(out / "report.json", json.dumps(report, indent=2, default=str) + "\n")
    write_csv(out / "report.csv", report)
    page = render_report(report, sections, stats=stats, prompts=job.prompts, files=job.files, run_sections=run_sections)
    write_text(out / "report.html", page)


def summary_lines(name: str, result: Result) -> list[str]:
    """The main numbers of a suite, and which of them have none and why."""
    suite = find_suite(name)
    closed = "controls" in result
    lines = suite.summary(result) if suite.summary and closed else headline_lines(name, suite.headlines, result)
    return lines + [f"{name}: {metric} not computed, {why}" for metric, why in result["skipped"].items()]


def print_summary(report: Mapping[str, Any], out: Path, unused: tuple[str, ...] = ()) -> None:
    """The main numbers, sentences on what was not used, and where the report is."""
    for line in (*(line for lines in report["headlines"].values() for line in lines), *unused):
        print(line)
    print(f"report: {out / 'report.html'}")
