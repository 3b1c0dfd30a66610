"""Score a checkpoint or an export: draw pictures, measure, write report.json and report.html.

python -m eval.run runs/demo                                # all suites, into runs/demo/eval
python -m eval.run exports/demo --out exports/demo_eval        # an export is never written to
python -m eval.run RUN --prompts geneval --suite clip,geneval  # a standard benchmark, into RUN/eval/geneval
python -m eval.run RUN --prompts coco30k.jsonl --suite fid,clip --reference coco30k_256
torchrun --nproc-per-node 8 -m eval.run RUN --suite geneval # pictures drawn by all ranks, scored by the first
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from eval.demo.detector import detect
from eval.demo.suite import SUITES, Evaluation
from eval.pages.board import log_scores
from eval.pages.compute_map import ComputeMaps, object_patches, trace_compute
from eval.pages.numbers import log_numbers, write_csv
from eval.pictures.drawing import draw_set
from eval.pictures.generate import read_pictures, write_text
from eval.pictures.prompt_files import read_prompts
from eval.pictures.prompts import Prompt, demo_prompts, render_prompts
from eval.pictures.protocol import package_versions, sampling_card
from eval.report import ReportInput, render_report
from eval.scoring import SUITES as SCORE_SUITES
from eval.scoring import ScoreConfig
from eval.standard import add_score_arguments, score_config
from eval.standard_run import draw_and_score
from trainer.checkpoint.export_reader import is_export
from trainer.config import ConfigError, require, run_cli
from trainer.data.demo.emoji import ATTRIBUTION
from trainer.distributed import World, barrier, detect_world, init_distributed
from trainer.pipeline import Pipeline

MAPS_PER_TAG = 4
WEIGHTS: tuple[Literal["ema", "untrained"], ...] = ("ema", "untrained")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What to evaluate. `seed` draws the prompts; pictures are seeded by prompt id and sample number.

    `score` has the settings of a standard benchmark, whose prompts `prompts` names; None: the built-in scenes.
    """

    checkpoint: Path
    out: Path
    suites: tuple[str, ...] = tuple(SUITES)
    per_category: int = 40
    num_samples: int = 1
    batch_size: int = 40
    seed: int = 0
    prompts: str = "demo"
    score: ScoreConfig | None = None

    def __post_init__(self) -> None:
        for suite in self.suites if self.score is None else ():
            require(suite in SUITES, f"--suite {suite} is unknown: choose from {', '.join(SUITES)}")
        for name in ("per_category", "num_samples", "batch_size"):
            flag = {"num_samples": "--samples"}.get(name, f"--{name.replace('_', '-')}")
            require(getattr(self, name) >= 1, f"{flag} is {getattr(self, name)}: use 1 or more")
        require(self.seed >= 0, f"--seed is {self.seed}: use 0 or more")


def run_folder(checkpoint: Path) -> Path:
    """The run that a checkpoint argument belongs to: itself, or the run above RUN/checkpoints/step_X."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint


def parse(argv: Sequence[str] | None) -> EvalConfig:
    """Settings from the command line; raises ConfigError on values that cannot work."""
    parser = argparse.ArgumentParser(
        prog="eval.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="run folder, a step folder in RUN/checkpoints, or an export")
    parser.add_argument("--prompts", default="demo", help="demo, geneval[:SEED], or a file or folder of prompts")
    parser.add_argument(
        "--suite",
        help=f"comma list of {', '.join(SUITES)} for demo (default all), else of {', '.join(SCORE_SUITES)}",
    )
    parser.add_argument("--per-category", type=int, default=EvalConfig.per_category, help="prompts per category")
    parser.add_argument("--samples", type=int, help="pictures per prompt (default 1, for geneval 4)")
    parser.add_argument("--batch-size", type=int, default=EvalConfig.batch_size, help="pictures drawn at once")
    parser.add_argument("--seed", type=int, default=EvalConfig.seed, help="seed of the prompts")
    parser.add_argument("--out", type=Path, help="folder of the results (default RUN/eval)")
    add_score_arguments(parser)
    given = parser.parse_args(argv)
    require(
        given.out is not None or not is_export(given.checkpoint),
        f"--out is missing: {given.checkpoint} is an export, which stays as it is; name a folder for the results",
    )
    standard = given.prompts != "demo"
    require(not standard or given.suite is not None, f"--suite is missing: choose from {', '.join(SCORE_SUITES)}")
    suite = ",".join(SUITES) if given.suite is None else given.suite
    suites = tuple(dict.fromkeys(name.strip() for name in suite.split(",") if name.strip()))
    out = given.out or run_folder(given.checkpoint.resolve()) / "eval"
    if standard and given.out is None:
        out = out / Path(given.prompts.replace(":", "_")).stem
    samples = given.samples if given.samples is not None else 4 if given.prompts.startswith("geneval") else 1
    return EvalConfig(
        checkpoint=given.checkpoint,
        out=out,
        suites=suites,
        per_category=given.per_category,
        num_samples=samples,
        batch_size=given.batch_size,
        seed=given.seed,
        prompts=given.prompts,
        score=score_config(given, suites, out, samples) if standard else None,
    )


def _draw(config: EvalConfig, prompts: list[Prompt], world: World) -> tuple[Pipeline, dict[str, Path]]:
    """Draw the trained and the untrained model's pictures; returns the trained one and the folders."""
    folders: dict[str, Path] = {}
    pipelines: dict[str, Pipeline] = {}
    for weights in WEIGHTS:
        pipeline = Pipeline.load(config.checkpoint, weights=weights)
        folder, _ = draw_set(
            pipeline, prompts, config.out / "pictures",
            num_samples=config.num_samples, batch_size=config.batch_size, world=world,
        )  # fmt: skip
        folders[weights], pipelines[weights] = folder, pipeline
    return pipelines["ema"], folders


def _load(config: EvalConfig, prompts: list[Prompt], pipeline: Pipeline, folders: dict[str, Path]) -> Evaluation:
    pictures, untrained = (read_pictures(folders[name], len(prompts), config.num_samples) for name in WEIGHTS)
    return Evaluation(
        prompts=prompts,
        num_samples=config.num_samples,
        pictures=pictures,
        untrained=untrained,
        true=render_prompts(prompts, pictures.shape[1]),
        sampling=sampling_card(pipeline.config, pipeline.step, pipeline.origin, prompts, config.num_samples),
        folder=folders["ema"],
        out=config.out,
        progress=sys.stderr.isatty(),
    )


def _spread(prompts: list[Prompt], per_tag: int) -> list[Prompt]:
    """The first prompts of each tag, the tags taking turns."""
    by_tag: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_tag.setdefault(prompt.tag, []).append(prompt)
    return [group[i] for i in range(per_tag) for group in by_tag.values() if i < len(group)]


def _describe_model(pipeline: Pipeline) -> dict[str, Any]:
    config = pipeline.config
    count = sum(parameter.numel() for parameter in pipeline.model.parameters())
    model: dict[str, Any] = {"parameters": f"{count / 1e6:.2f}M", "blocks": config.model.num_layers}
    if config.moe.every:
        model |= {"experts": config.moe.num_experts, "capacity factor": f"{config.moe.capacity_factor:g}"}
    return model | {"image size": config.data.image_size, "global seed": config.seed}


def score(config: EvalConfig, evaluation: Evaluation, pipeline: Pipeline) -> dict[str, Any]:
    """Run the suites and the compute trace on one process; write and return report.json."""
    start = time.perf_counter()
    results = {name: SUITES[name].run(evaluation) for name in config.suites}
    maps = trace_compute(pipeline, _spread(evaluation.prompts, MAPS_PER_TAG))
    report = {
        "run": run_folder(config.checkpoint.resolve()).name,
        "step": pipeline.step,
        "model": _describe_model(pipeline),
        "pictures_per_prompt": config.num_samples,
        "results": results,
        "versions": package_versions(),
        "config": asdict(pipeline.config),
        "seconds": time.perf_counter() - start,
        "notes": [ATTRIBUTION],
    }
    _write_report(config, evaluation, report, maps)
    return report


def _write_report(config: EvalConfig, evaluation: Evaluation, report: dict[str, Any], maps: ComputeMaps | None) -> None:
    mask = None
    if maps is not None:
        side, grid = maps.pictures_NHWC.shape[1], tuple(maps.experts_NTLhw.shape[-2:])
        mask = object_patches(detect(maps.pictures_NHWC), side, (grid[0], grid[1]))
    content = ReportInput(
        report=report,
        texts=[prompt.text for prompt in evaluation.prompts],
        tags=[prompt.tag for prompt in evaluation.prompts],
        pictures=evaluation.pictures,
        run_dir=run_folder(config.checkpoint.resolve()),
        maps=maps,
        object_mask_Nhw=mask,
    )
    write_text(config.out / "report.json", json.dumps(report, indent=2, default=str) + "\n")
    write_csv(config.out / "report.csv", report)
    write_text(config.out / "report.html", render_report(content))
    log_numbers(content.run_dir, report)


def print_summary(report: dict[str, Any], out: Path) -> None:
    """The numbers, for the terminal."""
    for name, result in report["results"].items():
        if name == "geneval":
            overall = result["overall"]
            tags = "  ".join(f"{tag} {score['value']:.1%}" for tag, score in result["tags"].items())
            print(f"geneval {overall['value']:.1%} ({overall['low']:.1%} to {overall['high']:.1%})  {tags}")
        elif name == "fid":
            print("fid " + "  ".join(f"{key} {result[key]:.2f}" for key in ("generated", "true", "untrained")))
    print(f"report: {out / 'report.html'}")


def evaluate(config: EvalConfig) -> None:
    """Everything: draw on all ranks, score and report on the first."""
    if config.score is not None:
        run_dir = run_folder(config.checkpoint.resolve())
        prompts = read_prompts(config.prompts)
        draw_and_score(config.checkpoint, config.prompts, prompts, config.score, config.batch_size, run_dir)
        return
    for suite in config.suites:
        SUITES[suite].check()
    if not config.checkpoint.exists():
        raise ConfigError(
            f"checkpoint {config.checkpoint} does not exist: give a run folder, a step folder in it or an export"
        )
    world = detect_world()
    if world.size > 1:
        init_distributed(world)
    prompts = demo_prompts(config.seed, config.per_category)
    pipeline, folders = _draw(config, prompts, world)
    if world.size > 1:
        barrier()
    if world.is_main:
        report = score(config, _load(config, prompts, pipeline, folders), pipeline)
        log_scores(report, run_folder(config.checkpoint.resolve()))
        print_summary(report, config.out)


def main(argv: list[str] | None = None) -> None:
    """Command line of the evaluation."""
    run_cli(lambda: evaluate(parse(argv)))


if __name__ == "__main__":
    main()
