"""The metrics that `eval.run` can compute, one function each, over pictures that are already drawn.

A suite takes an `Evaluation` and returns a JSON-able result with its own protocol card; to add one, write
its function and name it in SUITES. Shapes: N pictures, H x W pixels.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.demo.background import background_score
from eval.demo.controls import judge_all, permuted_scores, with_overall
from eval.demo.detector import RULES, VERSION, DetectorConfig, detect, detect_at
from eval.demo.features import CONVENTION, WEIGHTS_SHA256, find_weights, inception_features
from eval.metrics.fid import frechet_from_features
from eval.metrics.geneval import Summary, result_row
from eval.pictures.generate import picture_path, write_text
from eval.pictures.prompts import Prompt
from trainer.data.demo.scenes import render, training_scene

GENEVAL_VERSION = "geneval-rules-1"
FID_VERSION = "fid-1"
OTHER_THRESHOLDS = (0.6, 0.65, 0.75, 0.8)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Pictures to be scored, uint8 [N, H, W, 3], and their controls.

    `pictures` and `untrained` are in the order of the prompts, `num_samples` of each; `true` is one true
    picture per prompt. `sampling` is the sampling card; `folder` holds the pictures, `out` the results.
    """

    prompts: list[Prompt]
    num_samples: int
    pictures: Tensor
    untrained: Tensor
    true: Tensor
    sampling: dict[str, Any]
    folder: Path
    out: Path
    progress: bool = False


def _accuracies(summary: Summary) -> dict[str, float]:
    return with_overall({tag: score.value for tag, score in summary.tags.items()})


def run_geneval(evaluation: Evaluation) -> dict[str, Any]:
    """Judge the pictures by GenEval's rules with the embedded detector; writes results.jsonl."""
    start = time.perf_counter()
    prompts, samples = evaluation.prompts, evaluation.num_samples
    found, *found_at_others = detect_at(evaluation.pictures, (DetectorConfig().min_score, *OTHER_THRESHOLDS))
    verdicts, summary = judge_all(prompts, found, RULES, samples)
    found_true = detect(evaluation.true)
    controls = {
        "chance": with_overall(permuted_scores(prompts, found_true, RULES)),
        "shuffled": with_overall(permuted_scores(prompts, found, RULES, samples)),
        "untrained": _accuracies(judge_all(prompts, detect(evaluation.untrained), RULES, samples)[1]),
        "ceiling": _accuracies(judge_all(prompts, found_true, RULES)[1]),
    }
    thresholds = {
        str(threshold): judge_all(prompts, other, RULES, samples)[1].overall.value
        for threshold, other in zip(OTHER_THRESHOLDS, found_at_others, strict=True)
    }
    rows = []
    for i, (verdict, items) in enumerate(zip(verdicts, found, strict=True)):
        number, sample = divmod(i, samples)
        name = picture_path(Path(), number, sample).as_posix()
        rows.append(result_row(name, prompts[number].metadata, verdict, items) + "\n")
    write_text(evaluation.out / "results.jsonl", "".join(rows))
    card = {
        "metric": GENEVAL_VERSION,
        "detector": f"{VERSION} (embedded; not comparable with published GenEval scores)",
        "detector_settings": asdict(DetectorConfig()),
        "interval": "95 %, Wilson per category, MOVER for the mean",
        "pictures": len(verdicts),
        **evaluation.sampling,
    }
    return {
        **asdict(summary),
        "background": asdict(background_score(prompts, evaluation.pictures, samples)),
        "controls": controls,
        "thresholds": thresholds,
        "verdicts": [{"correct": verdict.correct, "reason": verdict.reason} for verdict in verdicts],
        "seconds": time.perf_counter() - start,
        "card": card,
    }


def _training_pictures(count: int, size: int) -> Tensor:
    scenes = [training_scene(0, index) for index in range(count)]
    return torch.from_numpy(np.stack([render(scene, size) for scene in scenes]))


def run_fid(evaluation: Evaluation) -> dict[str, Any]:
    """Frechet distance to as many training scenes, beside that of controls.

    `true`: true pictures of the prompts, what a perfect model would get. `untrained`: the untrained model.
    """
    start = time.perf_counter()
    count, size = len(evaluation.pictures), evaluation.pictures.shape[1]
    sets = {
        "reference": _training_pictures(count, size),
        "generated": evaluation.pictures,
        "true": evaluation.true,
        "untrained": evaluation.untrained,
    }
    cache = evaluation.out / "features"
    features = {
        name: inception_features(pictures, cache_dir=cache, progress=evaluation.progress)
        for name, pictures in sets.items()
    }
    values = {
        name: frechet_from_features(features["reference"], features[name]) for name in sets if name != "reference"
    }
    card = {
        "metric": FID_VERSION,
        "convention": CONVENTION,
        "weights_sha256": WEIGHTS_SHA256,
        "pictures": count,
        "reference": f"training scenes 0 to {count - 1} of seed 0, {size} px, drawn anew",
        **evaluation.sampling,
    }
    return {**values, "seconds": time.perf_counter() - start, "card": card}


def _nothing_to_check() -> None:
    """For suites without files of their own."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """`run` computes the result; `check` raises ConfigError beforehand when something is not installed."""

    run: Callable[[Evaluation], dict[str, Any]]
    check: Callable[[], object] = _nothing_to_check


SUITES = {"geneval": Suite(run=run_geneval), "fid": Suite(run=run_fid, check=find_weights)}
