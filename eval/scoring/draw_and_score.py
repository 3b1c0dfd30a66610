"""One evaluation of a checkpoint: draw a prompt set on all ranks, score the pictures, write the report.

The built-in scenes are one prompt set among others: a closed one, whose detector, true pictures and reference are
embedded.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.demo.detector import detect
from eval.files import training_records
from eval.pages.compute_map import object_patches, trace_compute
from eval.pages.run_sections import compute_section, training_section
from eval.pictures.generate import draw_set
from eval.pictures.image_files import geneval_files
from eval.pictures.prompts import Prompt
from eval.scoring.job import ScoreConfig, ScoringJob, check_all
from eval.scoring.options import EMBEDDED
from eval.scoring.score_and_report import ScoredSubject, score_and_report
from trainer.config import require
from trainer.data.demo.emoji import ATTRIBUTION
from trainer.distributed import World, barrier, detect_world, group_of_several
from trainer.pipeline import Pipeline

TRACED, TRACED_PER_TAG = 4, 4  # prompts whose routing is drawn, and of a closed set those of each tag


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What to evaluate."""

    checkpoint: Path
    """A run folder, a step folder in RUN/checkpoints, or an export."""
    run_dir: Path
    """The run that it belongs to, for the report's name, curves and TensorBoard."""
    prompts: list[Prompt]
    prompt_set: str
    """Their name for the report."""
    score: ScoreConfig
    """Suites, their settings, pictures per prompt and the folder of results."""
    batch_size: int
    """Pictures drawn at once; 1 or more."""
    encoders: Path | None = None
    """Folder of codec and text encoder, where they do not lie as the checkpoint says."""


def run_folder(checkpoint: Path) -> Path:
    """The run that a checkpoint argument belongs to: itself, or the run above RUN/checkpoints/step_X."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint


def check_checkpoint(path: Path) -> None:
    """ConfigError unless there is something of that name."""
    require(path.exists(), f"checkpoint {path} does not exist: give a run folder, a step folder in it or an export")


def draw_and_score(config: EvalConfig) -> None:
    """Everything: checks, pictures, features and detections, report. Collective; each part continues after a kill."""
    check_all(config.score, config.prompts)
    check_checkpoint(config.checkpoint)
    training_records(config.run_dir)  # refuses a damaged file now, not after the pictures
    world = detect_world()
    with group_of_several(world):
        _draw_and_score(config, world)


def _draw_and_score(config: EvalConfig, world: World) -> None:
    score, prompts = config.score, config.prompts
    untrained_files: list[Path] = []
    if score.true_pictures is not None:
        untrained = Pipeline.load(config.checkpoint, weights="untrained", encoders=config.encoders).compile()
        untrained_files = _draw(untrained, config, world)[1]
        del untrained
    pipeline = Pipeline.load(config.checkpoint, encoders=config.encoders).compile()
    folder, files, card = _draw(pipeline, config, world)
    subject = ScoredSubject(
        name=config.run_dir.name,
        summary=f"{len(files)} pictures of {pipeline.config.data.image_size} pixels for {len(prompts)} prompts "
        f"of {config.prompt_set}",
        step=pipeline.step,
        sampling=card,
        model=describe_model(pipeline),
        config=asdict(pipeline.config),
        notes=(ATTRIBUTION,) if Path(EMBEDDED) in (score.reference, score.true_pictures) else (),
        run_sections=tuple(run_sections(pipeline, prompts, score, config.run_dir)) if world.is_main else (),
        run_dir=config.run_dir,
    )
    del pipeline  # the scoring networks need the memory
    job = ScoringJob(
        config=score, prompts=prompts, files=files, folder=folder, untrained_files=untrained_files, world=world
    )
    score_and_report(job, subject)


def _draw(pipeline: Pipeline, config: EvalConfig, world: World) -> tuple[Path, list[Path], dict[str, Any]]:
    """Draw this rank's share; returns the folder, all ranks' pictures in it and the sampling card. Collective."""
    parent, samples = config.score.out / "pictures", config.score.num_samples
    folder, card = draw_set(
        pipeline, config.prompts, parent, num_samples=samples, batch_size=config.batch_size, world=world
    )
    if world.size > 1:
        barrier()
    return folder, geneval_files(folder, len(config.prompts), samples), card


def describe_model(pipeline: Pipeline) -> dict[str, Any]:
    """The model for the head of the page."""
    config = pipeline.config
    count = sum(parameter.numel() for parameter in pipeline.model.parameters())
    model: dict[str, Any] = {"parameters": f"{count / 1e6:.2f}M", "blocks": config.model.num_layers}
    if config.moe.every:
        model |= {"experts": config.moe.num_experts, "capacity factor": f"{config.moe.capacity_factor:g}"}
    return model | {"image size": config.data.image_size, "global seed": config.seed}


def spread(prompts: Sequence[Prompt], per_tag: int) -> list[Prompt]:
    """The first prompts of each tag, the tags taking turns."""
    by_tag: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_tag.setdefault(prompt.tag, []).append(prompt)
    return [group[i] for i in range(per_tag) for group in by_tag.values() if i < len(group)]


def run_sections(pipeline: Pipeline, prompts: Sequence[Prompt], config: ScoreConfig, run_dir: Path) -> list[str]:
    """Where the experts went in the first prompts' pictures, and the run's curves; nothing for what is not there."""
    closed = config.true_pictures is not None
    maps = trace_compute(pipeline, spread(prompts, TRACED_PER_TAG) if closed else prompts[:TRACED])
    parts: list[str] = []
    if maps is not None:
        mask = None
        if config.detector == EMBEDDED:
            side, grid = maps.pictures_NHWC.shape[1], maps.experts_NTLhw.shape[-2:]
            mask = object_patches(detect(maps.pictures_NHWC), side, (grid[0], grid[1]))
        parts += compute_section(maps, mask)
    return parts + training_section(run_dir, pipeline.config.sample.prompts)
