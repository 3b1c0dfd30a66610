"""GenEval's score (arXiv 2310.11513): a detector finds objects, the rules compare them with the prompt.

Overall is the unweighted mean of the six tags' accuracies; results.jsonl is in the official form. Nothing is scored
unless every prompt has all its pictures. A closed set gets controls: `chance` are its true pictures judged by other
prompts of their tag, `shuffled` these pictures judged so, `untrained` those of the untrained model, `ceiling` the true
pictures judged by their own prompts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from eval.metrics.controls import judge_all, permuted_scores, with_overall
from eval.metrics.geneval import Detection, PictureVerdict, Rules, Summary, result_row, select_objects
from eval.networks.clip import DEFAULT_CLIP, find_clip, load_clip
from eval.networks.colors import ClipColors, ColorJudge, NearestColors, describe_colors
from eval.networks.detectors import build_detector, check_detector, describe_detector
from eval.pages.geneval_section import geneval_section, geneval_stat
from eval.pictures.geneval_prompts import OFFICIAL_SHA256
from eval.pictures.prompts import Prompt, prompts_sha256
from eval.scoring.detection_cache import LineCache
from eval.scoring.job import Result, ScoreConfig, ScoringJob, Suite
from eval.scoring.options import EMBEDDED
from eval.suites.embedded_objects import EmbeddedObjects
from eval.suites.geneval_steps import (
    asked_colors,
    detect_files,
    judge_colors,
    open_colors,
    open_detections,
    read_detections,
)
from trainer.config import require
from trainer.files import write_text

VERSION = "geneval-1"
OFFICIAL_SAMPLES = 4
SHOWN_BOXES = 12  # of a picture, on the page


class NetworkObjects:
    """Objects by a detector of COCO's classes and their colours by a judge, both kept on disk.

    `comparable` is `official` if scores may be compared with published ones, else `approximate`; `rules` are the
    thresholds for these detections; `card` has detector, weights and their hash, and the judge of colours.
    """

    def __init__(self, config: ScoreConfig, prompts: Sequence[Prompt]) -> None:
        self.config, self.rules = config, config.rules
        self.comparable, self.detector_card = describe_detector(config.detector)
        self.classes = sorted({name for prompt in prompts for name in asked_colors(prompt.metadata)})
        color_card = describe_colors(config.colors, config.clip) if self.classes else None
        self.card: dict[str, Any] = {
            **self.detector_card, "colors": color_card["colors"] if color_card else "not asked for",
        }  # fmt: skip
        self.detections = open_detections(config.out, self.detector_card)
        self.colors: LineCache | None = open_colors(config.out, color_card, self.detections) if color_card else None
        # For controls a picture is judged by other prompts too, which ask for the colours of other classes.
        self.every = self.classes if config.true_pictures is not None else []

    def prepare(self, job: ScoringJob) -> None:
        """Detections, then the colours that are asked for, of this rank's pictures."""
        sets = [job.files, *job.control_files.values()]
        detector = build_detector(self.config.detector)
        for files in sets:
            detect_files(self.detections, detector, files, job.world)
        if self.colors is not None:
            by_clip = self.config.colors == "clip"
            judge: ColorJudge = ClipColors(load_clip(self.config.clip)) if by_clip else NearestColors()
            for files in sets:
                judge_colors(self.colors, judge, self.detections, job.prompts, files, job.world, every=self.every)

    def detect(self, job: ScoringJob, files: Sequence[Path]) -> list[list[Detection]]:
        """What is kept of these pictures."""
        return read_detections(self.detections, self.colors, job.prompts, files, every=self.every)

    def extras(self, job: ScoringJob) -> Result:
        """Nothing."""
        del job
        return {}


ObjectSource = NetworkObjects | EmbeddedObjects


def open_source(config: ScoreConfig, prompts: Sequence[Prompt]) -> ObjectSource:
    """Where the detections of pictures come from: what --detector names."""
    return EmbeddedObjects() if config.detector == EMBEDDED else NetworkObjects(config, prompts)


def check(config: ScoreConfig, prompts: list[Prompt]) -> None:
    """Detector, colour model and clauses must be here."""
    if config.detector == EMBEDDED:
        require(config.rules == Rules(), "--detector embedded has its own threshold: leave out --min-score")
    else:
        check_detector(config.detector)
    lacking = [prompt.id for prompt in prompts if "include" not in prompt.metadata or "tag" not in prompt.metadata]
    require(
        bool(prompts) and not lacking,
        f"--suite geneval needs prompts with tag and include, {len(lacking)} have none: use --prompts geneval or its "
        "evaluation_metadata.jsonl",
    )
    wants_colors = any(asked_colors(prompt.metadata) for prompt in prompts)
    if config.detector != EMBEDDED and config.colors == "clip" and wants_colors:
        find_clip(config.clip)


def prepare(job: ScoringJob) -> None:
    """Detections and colours of this rank's pictures."""
    open_source(job.config, job.prompts).prepare(job)


# Published scores were computed so on GPUs; alone it leaves a score comparable.
PRECISION = "colours in fp32, where the official judge runs under autocast (probabilities differ by up to 0.03)"


def departures(config: ScoreConfig, prompts: list[Prompt], comparable: str) -> list[str]:
    """In what a score differs from the official protocol; nothing but PRECISION for a comparable one."""
    judge, by_network = config.clip if config.colors == "clip" else config.colors, config.detector != EMBEDDED
    differs = {
        f"detector {config.detector}": comparable != "official",
        f"colours by {judge}": judge != DEFAULT_CLIP,
        PRECISION: judge == DEFAULT_CLIP and by_network and any(asked_colors(prompt.metadata) for prompt in prompts),
        "other thresholds": config.rules != Rules(),
        "other prompts": prompts_sha256(prompts) != OFFICIAL_SHA256,
        f"{config.num_samples} pictures per prompt": config.num_samples != OFFICIAL_SAMPLES,
    }
    return [words for words, is_so in differs.items() if is_so]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Verdict and detections of each picture, and the summary."""

    verdicts: list[PictureVerdict]
    detections: list[list[Detection]]
    summary: Summary


def score_detections(prompts: Sequence[Prompt], found: list[list[Detection]], rules: Rules) -> Scored:
    """Judge every picture by its prompt; as many pictures of each prompt, in their order."""
    verdicts, summary = judge_all(prompts, found, rules, len(found) // len(prompts))
    return Scored(verdicts=verdicts, detections=found, summary=summary)


def best_of(scored: Scored, samples: int) -> dict[str, float]:
    """Share of prompts with a correct picture among the first 1, 2, ... `samples` ones."""
    flags = torch.tensor([verdict.correct for verdict in scored.verdicts]).view(-1, samples)
    return {str(n): float(flags[:, :n].any(1).double().mean()) for n in range(1, samples + 1)}


def result_lines(scored: Scored, prompts: Sequence[Prompt], files: Sequence[Path], rules: Rules) -> str:
    """results.jsonl in the official form; `details` lists what passed the threshold, as the official file does."""
    samples = len(files) // len(prompts)
    rows = []
    for i, (file, verdict, found) in enumerate(zip(files, scored.verdicts, scored.detections, strict=True)):
        metadata = prompts[i // samples].metadata
        kept = [item for group in select_objects(found, metadata["tag"], rules).values() for item in group]
        rows.append(result_row(file.as_posix(), metadata, verdict, kept) + "\n")
    return "".join(rows)


def control_scores(
    source: ObjectSource, job: ScoringJob, found: Sequence[Sequence[Detection]]
) -> dict[str, dict[str, float]]:
    """Accuracy per tag and overall of a closed set's controls."""
    prompts, rules, samples = job.prompts, source.rules, job.config.num_samples
    true = source.detect(job, job.true_files)
    controls = {
        "chance": permuted_scores(prompts, true, rules),
        "shuffled": permuted_scores(prompts, found, rules, samples),
    }
    sets = {"untrained": (source.detect(job, job.untrained_files), samples)} if job.untrained_files else {}
    for name, (items, count) in {**sets, "ceiling": (true, 1)}.items():
        tags = judge_all(prompts, items, rules, count)[1].tags
        controls[name] = {tag: score.value for tag, score in tags.items()}
    return {name: with_overall(tags) for name, tags in controls.items()}


def _shown(scored: Scored, rules: Rules) -> list[dict[str, Any]]:
    """Verdict and boxes of each picture, for the page."""
    return [
        {
            "correct": verdict.correct,
            "reason": verdict.reason,
            "boxes": [
                [item.name, round(item.score, 3), *(round(value, 1) for value in item.box)]
                for item in found
                if item.score > rules.score
            ][:SHOWN_BOXES],
        }
        for verdict, found in zip(scored.verdicts, scored.detections, strict=True)
    ]


def score(job: ScoringJob) -> Result:
    """Summary, controls, verdicts and card; writes results.jsonl."""
    config, prompts = job.config, job.prompts
    source = open_source(config, prompts)
    rules = source.rules
    scored = score_detections(prompts, source.detect(job, job.files), rules)
    names = [file.relative_to(job.folder) if job.folder else file for file in job.files]
    write_text(config.out / "results.jsonl", result_lines(scored, prompts, names, rules))
    differs = departures(config, prompts, source.comparable)
    card = {
        "metric": VERSION,
        "comparable": "official" if set(differs) <= {PRECISION} else "approximate",
        "departures": differs or "none",
        **source.card,
        "rules": asdict(rules),
        "interval": "95 %, Wilson per tag, MOVER for the mean",
        "pictures": len(job.files),
        "prompts_sha256": prompts_sha256(prompts),
    }
    return {
        **asdict(scored.summary),
        "best_of": best_of(scored, config.num_samples),
        **({"controls": control_scores(source, job, scored.detections)} if job.true_files else {}),
        **source.extras(job),
        "verdicts": _shown(scored, rules),
        "skipped": {},
        "card": card,
    }


def _summary(result: Result) -> list[str]:
    overall = result["overall"]
    tags = "  ".join(f"{tag} {score['value']:.1%}" for tag, score in result["tags"].items())
    return [f"geneval {overall['value']:.1%} ({overall['low']:.1%} to {overall['high']:.1%})  {tags}"]


SUITE = Suite(
    check=check,
    prepare=prepare,
    score=score,
    title="GenEval",
    headlines=("overall/value",),
    section=geneval_section,
    stat=geneval_stat,
    summary=_summary,
)
