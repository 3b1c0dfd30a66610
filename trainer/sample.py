"""Draw pictures from a checkpoint or an export.

python -m trainer.sample runs/demo --prompt "a cat on a blue background" --num 4 --out cat.png
"""

from pathlib import Path

from moe.ranges import Range
from trainer.config import command, command_parser, require
from trainer.files import check_writable
from trainer.settings.model import check_prompt

_RANGES = {"num": Range(1, 10_000), "seed": Range(0, 2**63 - 1), "scale": Range(1, 100)}


@command
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = command_parser("trainer.sample", __doc__)
    parser.add_argument("checkpoint", type=Path, help="run folder, step folder or export")
    parser.add_argument("--prompt", action="append", required=True, help="caption; give it several times for several")
    parser.add_argument("--num", type=int, default=4, help="pictures per prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("samples.png"))
    parser.add_argument("--scale", type=int, default=4, help="enlargement by whole pixels")
    arguments = parser.parse_args(argv)
    for name, allowed in _RANGES.items():
        value = getattr(arguments, name)
        require(value in allowed, f"--{name} is {value}: use {allowed}")
    for prompt in arguments.prompt:
        check_prompt(prompt, "--prompt")
    require(arguments.out.suffix == ".png", f"--out {arguments.out}: the grid is written as .png")
    folder = arguments.out.parent
    require(folder.is_dir(), f"--out {arguments.out}: there is no folder {folder}, so make it or name another")
    check_writable(folder, f"--out {arguments.out}")
    require(not arguments.out.is_dir(), f"--out {arguments.out} is a folder: name a file")
    from PIL import Image  # here, as are the others, so that --help is quick

    from trainer.diffusion.sampling import picture_grid
    from trainer.pipeline import Pipeline

    pipeline = Pipeline.load(arguments.checkpoint)
    captions = [prompt for prompt in arguments.prompt for _ in range(arguments.num)]
    seeds = [arguments.seed + i for _ in arguments.prompt for i in range(arguments.num)]
    grid = picture_grid(pipeline.generate(captions, seeds), columns=arguments.num, scale=arguments.scale)
    Image.fromarray(grid.numpy()).save(arguments.out)
    print(f"{len(captions)} pictures of step {pipeline.step} in {arguments.out}")


if __name__ == "__main__":
    main()
