"""Score a checkpoint or an export: draw pictures, measure, write report.json and report.html.

python -m eval.run runs/demo                                # the built-in scenes, into runs/demo/eval
python -m eval.run exports/demo --prompts demo --out exports/demo_eval     # an export is never written to
python -m eval.run RUN --prompts geneval --suite clip,geneval  # a standard benchmark, into RUN/eval/geneval
python -m eval.run RUN --prompts coco30k.jsonl --suite fid,clip --reference coco30k_256
python -m eval.run RUN --prompts captions:5000 --suite fid --reference PICTURES    # captions that the model has learned
torchrun --nproc-per-node 8 -m eval.run RUN --suite geneval # drawn and measured by all ranks, scored by the first

The built-in scenes have their own detector, true pictures and reference, all of which other prompt sets can have too:
--true-pictures with a picture of each prompt adds the controls chance, shuffled, untrained and ceiling.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eval.scoring.options import EMBEDDED, SUITES, add_score_options, split_names
from trainer.cluster.leave import run_and_leave
from trainer.config import command_parser, interruptible, require

if TYPE_CHECKING:
    from eval.scoring.draw_and_score import EvalConfig

DEMO_SUITES = ("geneval", "fid")


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = command_parser("eval.run", __doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="run folder, a step folder in RUN/checkpoints, or an export")
    add(
        "--prompts", help="demo (default if learned from), geneval[:SEED], captions[:N], or a file or folder of prompts"
    )
    add("--suite", help=f"comma list of {', '.join(DEMO_SUITES)} for demo (default all), else of {', '.join(SUITES)}")
    add("--per-category", type=int, default=40, help="prompts per category of demo (default %(default)s)")
    add("--samples", type=int, help="pictures per prompt (default 1, for geneval 4)")
    add("--batch-size", type=int, default=40, help="pictures drawn at once (default %(default)s)")
    add("--seed", type=int, default=0, help="seed of the prompts of demo (default %(default)s)")
    add("--encoders", type=Path, metavar="DIR", help="folder of codec and text encoder, if moved")
    add("--out", type=Path, help="folder of the results (default RUN/eval, or RUN/eval/SET)")
    add_score_options(parser)
    return parser


def parse(argv: Sequence[str] | None) -> "EvalConfig":
    """Settings from the command line; raises ConfigError on values that cannot work."""
    given = build_parser().parse_args(argv)
    from eval.demo.prompts import demo_prompts
    from eval.pictures.prompt_files import read_prompts
    from eval.pictures.run_prompts import CAPTIONS, default_set, run_captions
    from eval.scoring.draw_and_score import EvalConfig, check_checkpoint, run_folder
    from eval.scoring.job import score_config
    from trainer.checkpoint.export_reader import is_export

    require(
        given.out is not None or not is_export(given.checkpoint),
        f"--out is missing: {given.checkpoint} is an export, which stays as it is; name a folder for the results",
    )
    run_dir = run_folder(given.checkpoint.resolve())
    if given.prompts is None:
        check_checkpoint(given.checkpoint)
        given.prompts = default_set(run_dir)
    demo, captions = given.prompts == "demo", given.prompts.partition(":")[0] == CAPTIONS
    require(demo or given.suite is not None, f"--suite is missing: choose from {', '.join(SUITES)}")
    suites = split_names(",".join(DEMO_SUITES) if given.suite is None else given.suite)
    out = given.out or run_dir / "eval"
    if demo:
        for suite in suites:
            require(suite in DEMO_SUITES, f"--suite {suite} is unknown: choose from {', '.join(DEMO_SUITES)}")
        given.reference = given.reference or Path(EMBEDDED)
        given.true_pictures = given.true_pictures or Path(EMBEDDED)
        given.detector = EMBEDDED if given.detector is None else given.detector
    elif given.out is None:
        out = out / Path(given.prompts.replace(":", "_")).stem
    samples = given.samples if given.samples is not None else 4 if given.prompts.startswith("geneval") else 1
    score = score_config(given, suites, out, samples)
    for name, least in (("per_category", 1), ("batch_size", 1), ("seed", 0)):
        value = getattr(given, name)
        require(value >= least, f"--{name.replace('_', '-')} is {value}: use {least} or more")
    if demo:
        prompts = demo_prompts(given.seed, given.per_category)
    else:
        prompts = run_captions(run_dir, given.prompts) if captions else read_prompts(given.prompts)
    return EvalConfig(
        checkpoint=given.checkpoint,
        run_dir=run_dir,
        prompts=prompts,
        prompt_set=given.prompts,
        score=score,
        batch_size=given.batch_size,
        encoders=given.encoders,
    )


@interruptible("pictures, features and detections so far are kept, and the same command goes on from there")
def main(argv: list[str] | None = None) -> None:
    """Command line of the evaluation."""
    config = parse(argv)
    from eval.scoring.draw_and_score import draw_and_score
    from trainer.engine.host_memory import keep_freed_memory

    keep_freed_memory()
    draw_and_score(config)


if __name__ == "__main__":
    run_and_leave(main)
