"""Score pictures that are already there, whoever drew them.

    python -m eval.score PICTURES --prompts geneval --samples 4 --suite geneval --out scores
    python -m eval.score PICTURES --suite fid --reference reference.npz --out scores    # any folder, or ADM's npz
    torchrun --nproc-per-node 8 -m eval.score PICTURES ...                              # ranks share the pictures

With --prompts the folder must have GenEval's layout (DIR/00000/samples/0000.png); without, any pictures do.
"""

import argparse
from pathlib import Path

from eval.scoring.options import SUITES, add_score_options, split_names
from trainer.config import command, command_parser, require


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = command_parser("eval.score", __doc__)
    parser.add_argument("pictures", type=Path, help="folder of pictures, or an npz with arr_0")
    parser.add_argument("--suite", required=True, help=f"comma list of {', '.join(SUITES)}")
    parser.add_argument("--prompts", default="", help="geneval[:SEED], or a file or folder of prompts")
    parser.add_argument("--samples", type=int, default=1, help="pictures per prompt (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    add_score_options(parser)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    """Command line of scoring."""
    given = build_parser().parse_args(argv)
    from eval.pictures.image_files import folder_files, geneval_files, left_out, unpack_npz
    from eval.pictures.prompt_files import read_prompts
    from eval.scoring.job import ScoringJob, check_all, score_config
    from eval.scoring.score_and_report import ScoredSubject, score_and_report
    from trainer.distributed import detect_world, init_distributed

    require(given.prompts != "demo", "--prompts demo belongs to eval.run: name a benchmark, or a file of prompts")
    config = score_config(given, split_names(given.suite), given.out, given.samples)
    prompts = read_prompts(given.prompts) if given.prompts else []
    check_all(config, prompts)
    unused: tuple[str, ...] = ()
    if prompts:
        files = geneval_files(given.pictures, len(prompts), config.num_samples)
    elif given.pictures.suffix == ".npz":
        files = unpack_npz(given.pictures, config.out / "unpacked")
    else:
        files, unused = folder_files(given.pictures), left_out(given.pictures)
    world = detect_world()
    if world.size > 1:
        init_distributed(world)
    job = ScoringJob(config=config, prompts=prompts, files=files, world=world)
    summary = f"{len(files)} pictures of {given.prompts or 'no prompts'}"
    score_and_report(job, ScoredSubject(name=given.pictures.resolve().name, summary=summary, unused=unused))


if __name__ == "__main__":
    main()
