"""The GenEval suite of `eval.run` and `eval.score`: detections and colours on every rank, scores on the first."""

from dataclasses import asdict
from typing import Any

from eval.metrics.geneval import Rules
from eval.networks.clip import DEFAULT_CLIP, find_clip, load_clip
from eval.networks.colors import ClipColors, ColorJudge, NearestColors, describe_colors
from eval.networks.detectors import build_detector, check_detector, describe_detector
from eval.pictures.generate import write_text
from eval.pictures.geneval_prompts import OFFICIAL_SHA256
from eval.pictures.prompts import Prompt, prompts_sha256
from eval.scoring import ScoreConfig, ScoringJob
from eval.suites.geneval_steps import (
    asked_colors,
    detect_files,
    judge_colors,
    open_colors,
    open_detections,
    result_lines,
    score_files,
    summary_content,
)
from trainer.config import require

VERSION = "geneval-1"
OFFICIAL_SAMPLES = 4


def _wants_colors(prompts: list[Prompt]) -> bool:
    return any(asked_colors(prompt.metadata) for prompt in prompts)


def check(config: ScoreConfig, prompts: list[Prompt]) -> None:
    """Detector, colour model and clauses must be here."""
    check_detector(config.detector)
    lacking = [prompt.id for prompt in prompts if "include" not in prompt.metadata or "tag" not in prompt.metadata]
    require(
        bool(prompts) and not lacking,
        f"--suite geneval needs prompts with tag and include, {len(lacking)} have none: use --prompts geneval or its "
        "evaluation_metadata.jsonl",
    )
    if config.colors == "clip" and _wants_colors(prompts):
        find_clip(config.clip)


def _color_judge(config: ScoreConfig) -> ColorJudge:
    return ClipColors(load_clip(config.clip)) if config.colors == "clip" else NearestColors()


def prepare(job: ScoringJob) -> None:
    """Detections, then the colours that are asked for, of this rank's pictures."""
    detector = build_detector(job.config.detector)
    cache = open_detections(job.config.out, detector.card)
    share = {"rank": job.rank, "world_size": job.world_size}
    detect_files(cache, detector, job.files, progress=job.progress, **share)
    if _wants_colors(job.prompts):
        judge = _color_judge(job.config)
        colors = open_colors(job.config.out, judge.card, cache)
        judge_colors(colors, judge, cache, job.prompts, job.files, progress=job.progress, **share)


def departures(config: ScoreConfig, prompts: list[Prompt], comparable: str) -> list[str]:
    """In what a score differs from the official protocol; empty for a comparable one."""
    found = []
    if comparable != "official":
        found.append(f"detector {config.detector}")
    if config.colors != "clip" or config.clip != DEFAULT_CLIP:
        found.append(f"colours by {config.clip if config.colors == 'clip' else config.colors}")
    if config.rules != Rules():
        found.append("other thresholds")
    if prompts_sha256(prompts) != OFFICIAL_SHA256:
        found.append("other prompts")
    if config.num_samples != OFFICIAL_SAMPLES:
        found.append(f"{config.num_samples} pictures per prompt")
    return found


def score(job: ScoringJob) -> dict[str, Any]:
    """Summary, verdicts and card; writes results.jsonl in the official form."""
    config, prompts = job.config, job.prompts
    comparable, detector_card = describe_detector(config.detector)
    cache = open_detections(config.out, detector_card)
    color_card = describe_colors(config.colors, config.clip) if _wants_colors(prompts) else None
    colors = open_colors(config.out, color_card, cache) if color_card else None
    scored = score_files(cache, colors, prompts, job.files, config.rules)
    write_text(config.out / "results.jsonl", result_lines(scored, prompts, job.files, config.rules))
    differs = departures(config, prompts, comparable)
    shown = [
        {
            "correct": verdict.correct,
            "reason": verdict.reason,
            "boxes": [
                [item.name, round(item.score, 3), *(round(value, 1) for value in item.box)]
                for item in found
                if item.score > config.rules.score
            ][:12],
        }
        for verdict, found in zip(scored.verdicts, scored.detections, strict=True)
    ]
    card = {
        "metric": VERSION,
        "comparable": "approximate" if differs else "official",
        "departures": differs or "none",
        **detector_card,
        "colors": color_card["colors"] if color_card else "not asked for",
        "rules": asdict(config.rules),
        "interval": "95 %, Wilson per tag, MOVER for the mean",
        "pictures": len(job.files),
        "prompts_sha256": prompts_sha256(prompts),
    }
    return {**summary_content(scored, config.num_samples), "verdicts": shown, "skipped": {}, "card": card}
