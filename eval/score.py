"""Score pictures that are already there, whoever drew them.

    python -m eval.score PICTURES --prompts geneval --samples 4 --suite geneval --out scores
    python -m eval.score PICTURES --suite fid --reference reference.npz --out scores    # any folder, or ADM's npz
    torchrun --nproc-per-node 8 -m eval.score PICTURES ...                              # ranks share the pictures

With --prompts the folder must have GenEval's layout (DIR/00000/samples/0000.png); without, any pictures do.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from eval.pictures.image_files import folder_files, geneval_files, unpack_npz
from eval.pictures.prompt_files import read_prompts
from eval.scoring import SUITES, ScoreConfig, check_all
from eval.standard import add_score_arguments, score_config, score_pictures
from trainer.config import require, run_cli
from trainer.distributed import detect_world, init_distributed


@dataclass(frozen=True, kw_only=True)
class GivenPictures:
    """What to score: pictures, the prompts they were drawn for ("" for none), and with what."""

    pictures: Path
    prompts: str
    config: ScoreConfig


def parse(argv: list[str] | None) -> GivenPictures:
    """Settings from the command line; raises ConfigError on values that cannot work."""
    parser = argparse.ArgumentParser(
        prog="eval.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", type=Path, help="folder of pictures, or an npz with arr_0")
    parser.add_argument("--suite", required=True, help=f"comma list of {', '.join(SUITES)}")
    parser.add_argument("--prompts", default="", help="geneval[:SEED], or a file or folder of prompts")
    parser.add_argument("--samples", type=int, default=1, help="pictures per prompt")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    add_score_arguments(parser)
    given = parser.parse_args(argv)
    suites = tuple(dict.fromkeys(name.strip() for name in given.suite.split(",") if name.strip()))
    require(given.prompts != "demo", "--prompts demo belongs to eval.run: name a benchmark, or a file of prompts")
    config = score_config(given, suites, given.out, given.samples)
    return GivenPictures(pictures=given.pictures, prompts=given.prompts, config=config)


def score_given(given: GivenPictures) -> None:
    """Check everything, then score."""
    prompts = read_prompts(given.prompts) if given.prompts else []
    check_all(given.config, prompts)
    if prompts:
        files = geneval_files(given.pictures, len(prompts), given.config.num_samples)
    elif given.pictures.suffix == ".npz":
        files = unpack_npz(given.pictures, given.config.out / "unpacked")
    else:
        files = folder_files(given.pictures)
    world = detect_world()
    if world.size > 1:
        init_distributed(world)
    summary = f"{len(files)} pictures of {given.prompts or 'no prompts'}"
    score_pictures(given.config, prompts, files, world, name=given.pictures.resolve().name, summary=summary)


def main(argv: list[str] | None = None) -> None:
    """Command line of scoring."""
    run_cli(lambda: score_given(parse(argv)))


if __name__ == "__main__":
    main()
