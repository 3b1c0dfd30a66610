"""Score pictures that are already there, whoever drew them.

    python -m eval.score PICTURES --prompts geneval --samples 4 --suite geneval --out scores
    python -m eval.score PICTURES --suite fid --reference reference.npz --out scores    # any folder, or ADM's npz
    torchrun --nproc-per-node 8 -m eval.score PICTURES ...                              # ranks share the pictures

With --prompts the folder must have GenEval's layout (DIR/00000/samples/0000.png); without, any pictures do.
"""

import argparse
from pathlib import Path

from eval.scoring.options import SUITES, add_score_options, split_names
from trainer.cluster.leave import run_and_leave
from trainer.config import command_parser, interruptible


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


@interruptible("pictures, features and detections so far are kept, and the same command goes on from there")
def main(argv: list[str] | None = None) -> None:
    """Command line of scoring."""
    given = build_parser().parse_args(argv)
    from eval.scoring.job import score_config
    from eval.scoring.score_folder import score_pictures
    from trainer.engine.host_memory import keep_freed_memory

    keep_freed_memory()
    score_pictures(
        given.pictures, score_config(given, split_names(given.suite), given.out, given.samples), given.prompts
    )


if __name__ == "__main__":
    run_and_leave(main)
