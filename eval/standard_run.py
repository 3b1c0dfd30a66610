"""Draw a standard prompt set from a checkpoint on all ranks, then score it: `eval.run CHECKPOINT --prompts geneval`."""

from collections.abc import Sequence
from pathlib import Path

from eval.pages.charts import compute_chart, training_chart
from eval.pages.compute_map import trace_compute
from eval.pages.page import image
from eval.pictures.drawing import draw_set
from eval.pictures.image_files import geneval_files
from eval.pictures.prompts import Prompt
from eval.report import read_metrics
from eval.scoring import ScoreConfig, check_all
from eval.standard import score_pictures
from trainer.config import ConfigError
from trainer.distributed import barrier, detect_world, init_distributed
from trainer.pipeline import Pipeline

SHOWN_MAPS = 4  # prompts whose routing is drawn


def run_sections(pipeline: Pipeline, prompts: Sequence[Prompt], run_dir: Path) -> list[str]:
    """Where the experts went in the first prompts' pictures, and the run's curves; nothing for what is not there."""
    parts: list[str] = []
    maps = trace_compute(pipeline, prompts[:SHOWN_MAPS])
    if maps is not None:
        parts += [
            "<h2>Where the compute goes</h2>",
            f"<p>Experts that took each patch, by block and by time. White is the uniform level of "
            f"{maps.capacity_factor:g}, red more, blue less.</p>",
            image(compute_chart(maps), "experts per patch"),
        ]
    rows = read_metrics(run_dir)
    if rows:
        parts += ["<h2>Training</h2>", image(training_chart(rows), "loss, learning rate, gradient norm, speed")]
    return parts


def draw_and_score(
    checkpoint: Path,
    prompt_set: str,
    prompts: list[Prompt],
    config: ScoreConfig,
    batch_size: int,
    run_dir: Path,
    *,
    log: bool = True,
) -> None:
    """Everything: checks, pictures, features and detections, report. Collective; each part continues after a kill.

    `log` adds the numbers to the run's TensorBoard.
    """
    check_all(config, prompts)
    if not checkpoint.exists():
        raise ConfigError(
            f"checkpoint {checkpoint} does not exist: give a run folder, a step folder in it or an export"
        )
    world = detect_world()
    if world.size > 1:
        init_distributed(world)
    pipeline = Pipeline.load(checkpoint)
    folder, card = draw_set(
        pipeline, prompts, config.out / "pictures",
        num_samples=config.num_samples, batch_size=batch_size, world=world,
    )  # fmt: skip
    sections = run_sections(pipeline, prompts, run_dir) if world.is_main else []
    step, size = pipeline.step, pipeline.config.data.image_size
    del pipeline  # the scoring networks need the memory
    if world.size > 1:
        barrier()
    files = geneval_files(folder, len(prompts), config.num_samples)
    score_pictures(
        config, prompts, files, world, name=f"{run_dir.name} at step {step:,}",
        summary=f"{len(files)} pictures of {size} pixels for {len(prompts)} prompts of {prompt_set}",
        step=step, sampling=card, run_dir=run_dir if log else None, sections=sections,
    )  # fmt: skip
