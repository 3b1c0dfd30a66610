"""Standard benchmarks: score pictures of any prompt set, drawn by `eval.run` or given as a folder to `eval.score`.

Every rank computes its share of features and detections, the first one scores and writes report.json, report.csv and
report.html. All of it may be killed at any time: the same command goes on and ends with the same report.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.metrics.geneval import Rules
from eval.networks.clip import CMMD_CLIP, DEFAULT_CLIP
from eval.networks.resize import CONVENTIONS
from eval.pages.numbers import flat_numbers, log_numbers, write_csv
from eval.pages.score_page import render_scores
from eval.pictures.generate import write_text
from eval.pictures.prompts import Prompt
from eval.pictures.protocol import package_versions
from eval.scoring import ScoreConfig, ScoringJob, prepare_all, score_all
from trainer.distributed import World, barrier

_HEADLINES = ("fid/fid", "fid/kid/mean", "cmmd/cmmd", "dino/fd_dinov2", "clip/score/cosine", "geneval/overall/value")


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of scoring that `eval.run` and `eval.score` share."""
    parser.add_argument("--reference", type=Path, help="real pictures: a folder, or an npz of statistics or pictures")
    parser.add_argument("--convention", default=CONVENTIONS[0], help=f"resize of FID: {', '.join(CONVENTIONS)}")
    parser.add_argument("--clip", default=DEFAULT_CLIP, help="CLIP of score and colours: ARCH:TAG or ARCH:FILE")
    parser.add_argument("--cmmd-clip", default=CMMD_CLIP, help="CLIP of CMMD: ARCH:TAG or ARCH:FILE")
    parser.add_argument(
        "--detector", default="mask2former", help="mask2former, mask2former-hf:DIR, maskrcnn, yolov3-tiny"
    )
    parser.add_argument("--colors", default="clip", help="judge of colours: clip, or nearest (no weights, for checks)")
    parser.add_argument("--min-score", type=float, default=Rules().score, help="GenEval's least detection score")
    parser.add_argument("--min-counting-score", type=float, default=Rules().counting_score, help="the same for counts")
    parser.add_argument("--neighbours", type=int, default=5, help="k of precision, recall, density, coverage")


def score_config(given: argparse.Namespace, suites: tuple[str, ...], out: Path, num_samples: int) -> ScoreConfig:
    """Settings of scoring from the command line."""
    return ScoreConfig(
        suites=suites,
        out=out,
        num_samples=num_samples,
        reference=given.reference,
        convention=given.convention,
        clip=given.clip,
        cmmd_clip=given.cmmd_clip,
        detector=given.detector,
        colors=given.colors,
        num_neighbours=given.neighbours,
        rules=Rules(score=given.min_score, counting_score=given.min_counting_score),
    )


def score_pictures(
    config: ScoreConfig,
    prompts: list[Prompt],
    files: list[Path],
    world: World,
    *,
    name: str,
    summary: str,
    step: int = 0,
    sampling: Mapping[str, Any] | None = None,
    run_dir: Path | None = None,
    sections: Sequence[str] = (),
) -> None:
    """Compute on every rank, then score and report on the first. Collective."""
    start = time.perf_counter()
    job = ScoringJob(
        config=config, prompts=prompts, files=files, rank=world.rank, world_size=world.size,
        progress=world.is_main and sys.stderr.isatty(),
    )  # fmt: skip
    prepare_all(job)
    if world.size > 1:
        barrier()
    if not world.is_main:
        return
    report: dict[str, Any] = {
        "run": name,
        "summary": summary,
        "step": step,
        "pictures": len(files),
        "pictures_per_prompt": config.num_samples,
        "results": score_all(job),
        "sampling": dict(sampling or {}),
        "versions": package_versions(),
        "seconds": time.perf_counter() - start,
    }
    write_text(config.out / "report.json", json.dumps(report, indent=2, default=str) + "\n")
    write_csv(config.out / "report.csv", report)
    write_text(config.out / "report.html", render_scores(report, prompts, files, sections))
    if run_dir is not None:
        log_numbers(run_dir, report)
    numbers = flat_numbers(report["results"])
    for key in _HEADLINES:
        if key in numbers:
            print(f"{key.removesuffix('/value')} {numbers[key]:.5g}")
    for suite, result in report["results"].items():
        for metric, why in result["skipped"].items():
            print(f"{suite}: {metric} not computed, {why}")
    print(f"report: {config.out / 'report.html'}")
