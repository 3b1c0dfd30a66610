"""Draw pictures from a run, a checkpoint or an export.

python -m trainer.sample runs/demo --prompt "a cat on a blue background" --num 4             # four files in samples/
python -m trainer.sample runs/demo --prompts prompts.txt --out pictures --format webp       # one prompt a line
python -m trainer.sample runs/demo --prompt "a cat" --num 4 --grid --out cat.png            # one file, a row a prompt
python -m trainer.sample exports/mine --prompt "a fox" --steps 50 --guidance 5 --seed 7 --height 512 --width 384

Picture k (from 0) of each prompt starts from the noise of seed + k: the same command draws the same pictures again,
--num 8 begins with those of --num 4, and prompts can be compared from equal noise. What is not given is as the run has
it (`diffusion.*`). Each file says how it was drawn; `python -m trainer.sample --read FILE` prints that.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from moe.ranges import Range
from trainer.config import ConfigError, command_parser, interruptible, require
from trainer.files import check_writable
from trainer.settings.model import check_prompt

if TYPE_CHECKING:
    from trainer.diffusion.draw_options import DrawOptions
    from trainer.formats.picture_file import PictureFiles

_RANGES = {
    "num": Range(1, 10_000), "seed": Range(0, 2**63 - 1), "scale": Range(1, 100), "steps": Range(1, 10_000),
    "guidance": Range(0, 1000), "batch_size": Range(1, 10_000), "height": Range(1, 100_000), "width": Range(1, 100_000),
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = command_parser("trainer.sample", __doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", help="run folder, step folder or export")
    add("--prompt", action="append", default=[], help="caption; give it several times for several")
    add("--prompts", type=Path, metavar="FILE", help="text file with a caption on each line")
    add("--negative-prompt", default="", help="what guidance leads away from (default: a picture of no caption)")
    add("--num", type=int, default=1, help="pictures per prompt (default %(default)s)")
    add("--seed", type=int, default=0, help="picture k of a prompt has the noise of seed + k (default %(default)s)")
    add("--steps", type=int, help="solver steps (default: the run's diffusion.sampling_steps)")
    add("--guidance", type=float, help="guidance scale; 1 is off, more follows the caption closer (default: the run's)")
    add("--solver", choices=["euler", "heun"], help="heun takes two evaluations a step (default: the run's)")
    add("--height", type=int, help="pixels; with --width one of the sizes of data.buckets (default: the first)")
    add("--width", type=int, help="pixels")
    add("--batch-size", type=int, default=8, help="pictures drawn at once (default %(default)s)")
    add("--out", type=Path, help="folder (default samples), or a file for one picture or --grid (default samples.png)")
    add("--format", choices=["png", "jpg", "webp"], help="of the files (default: as --out ends, else png)")
    add("--grid", action="store_true", help="one file with all pictures, a row for each prompt")
    add("--scale", type=int, help="enlarge by whole pixels (default: pictures below 128 pixels to 128 or more)")
    add("--encoders", type=Path, metavar="DIR", help="folder of codec and text encoder, if moved")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--dtype", choices=["bf16", "fp32"], help="of the weights (default: the run's train.precision)")
    add("--read", type=Path, metavar="FILE", help="print how a picture was drawn, draw nothing")
    return parser


def read_lines(path: Path) -> list[str]:
    """The captions of a text file, blank lines left out; ConfigError if there are none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"--prompts {path} cannot be read ({reason}): name a text file") from error
    found = [line.strip() for line in lines if line.strip()]
    require(bool(found), f"--prompts {path} has no captions: write one on each line")
    return found


def captions_of(given: argparse.Namespace) -> list[str]:
    """All prompts; ConfigError for values that cannot work, before anything is loaded."""
    require(given.checkpoint is not None, "the model is missing: name a run folder, a step folder or an export")
    for name, allowed in _RANGES.items():
        value = getattr(given, name)
        require(value is None or value in allowed, f"--{name.replace('_', '-')} is {value}: use {allowed}")
    prompts = [*given.prompt, *(read_lines(given.prompts) if given.prompts else [])]
    require(bool(prompts), "--prompt is missing: say what to draw, or name a file of captions by --prompts")
    for prompt in prompts:
        check_prompt(prompt, "--prompt")
    if given.negative_prompt:
        check_prompt(given.negative_prompt, "--negative-prompt")
    return prompts


def files_of(given: argparse.Namespace, prompts: list[str]) -> "PictureFiles":
    """Where the pictures go; ConfigError if they cannot."""
    from trainer.formats.picture_file import SUFFIXES, PictureFiles

    out = given.out or Path("samples.png" if given.grid else "samples")
    kind = given.format or SUFFIXES.get(out.suffix.lower(), "png")
    is_file = out.suffix.lower() in SUFFIXES and not out.is_dir()
    if is_file and given.format:
        fits = SUFFIXES[out.suffix.lower()] == given.format
        require(fits, f"--out {out} does not end in .{given.format}: leave out --format, or change the name")
    count = len(prompts) * given.num
    require(
        given.grid or not is_file or count == 1,
        f"--out {out} is one file, but there are {count} pictures: name a folder, or add --grid",
    )
    require(is_file or not given.grid, f"--out {out}: a grid is one file, so name a .png, .jpg or .webp")
    folder = out.parent if is_file else out
    require(not is_file or folder.is_dir(), f"--out {out}: there is no folder {folder}, so make it or name another")
    check_writable(folder, f"--out {out}")
    return PictureFiles(out=out, kind=kind, is_file=is_file)


@interruptible("pictures that were drawn are kept, and the same command draws all of them again")
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    given = build_parser().parse_args(argv)
    if given.read is not None:
        from trainer.formats.picture_file import read_settings

        print(json.dumps(read_settings(given.read), indent=2))
        return
    prompts = captions_of(given)
    files = files_of(given, prompts)
    from trainer.diffusion.draw_options import DrawOptions  # here, as is torch, so that --help is quick

    options = DrawOptions(
        steps=given.steps, guidance=given.guidance, solver=given.solver, negative_prompt=given.negative_prompt,
        height=given.height, width=given.width,
    )  # fmt: skip
    draw_files(given, prompts, files, options)


def draw_files(given: argparse.Namespace, prompts: list[str], files: "PictureFiles", options: "DrawOptions") -> None:
    """Load the model, draw, write each picture when it is drawn, or all in one."""
    import torch
    from PIL import Image

    from trainer.diffusion.sampling import picture_grid
    from trainer.formats.picture_file import enlarged, enlargement, write_picture_file
    from trainer.formats.progress_bar import ProgressBar
    from trainer.pipeline import Pipeline

    pipeline = Pipeline.load(given.checkpoint, encoders=given.encoders, device=given.device, dtype=given.dtype)
    card = {"model": given.checkpoint.resolve().name, **pipeline.drawing_card(options, given.batch_size)}
    scale = given.scale or enlargement(card["height"], card["width"])
    jobs = [(n, prompt, given.seed + k) for n, prompt in enumerate(prompts) for k in range(given.num)]
    batches = pipeline.batches([job[1] for job in jobs], [job[2] for job in jobs], options, given.batch_size)
    drawn = (picture for batch in batches for picture in batch)
    pictures = ProgressBar(drawn, "pictures", len(jobs), unit="image")
    if given.grid:
        grid = Image.fromarray(picture_grid(torch.stack(list(pictures)), columns=given.num, scale=scale).numpy())
        write_picture_file(files.out, grid, files.kind, {"prompts": prompts, "seed": given.seed, **card})
    else:
        for picture, (number, prompt, seed) in zip(pictures, jobs, strict=True):
            image = enlarged(Image.fromarray(picture.numpy()), scale)
            settings = {"prompt": prompt, "seed": seed, **card}
            write_picture_file(files.path(number, prompt, seed), image, files.kind, settings)
    print(f"{len(jobs)} pictures of step {pipeline.step} in {files.out}")


if __name__ == "__main__":
    main()
