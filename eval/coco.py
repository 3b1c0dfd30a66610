"""COCO-30K: a list of captions with its hash, and the reference pictures that belong to it.

    python -m eval.coco list captions_val2014.json --out coco30k.jsonl     # 30,000 captions, one a picture
    python -m eval.coco pictures coco30k.jsonl val2014 --out coco30k_256    # short side 256, centre crop, PNG

Which captions and pictures are used moves FID by several points, so the list is a file with a hash: one caption of
each drawn picture, both by seed, in the order of the draw.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.files import check_file
from eval.pictures.prompt_files import json_rows
from trainer.config import ConfigError, command_parser, interruptible, require
from trainer.data.images.decode import BadPictureError, read_rgb
from trainer.files import check_writable, replacing, write_text
from trainer.formats.progress_bar import ProgressBar


def read_annotations(path: Path) -> dict[str, Any]:
    """Content of a captions_*.json of COCO; ConfigError if it is no such file."""
    require(path.is_file(), f"annotations {path} are not a file: give captions_val2014.json of COCO")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON file: copy it again") from error
    whole = isinstance(content, dict) and bool(content.get("images")) and bool(content.get("annotations"))
    require(whole, f"{path} has no images and annotations: give captions_val2014.json of COCO")
    found: dict[str, Any] = content
    return found


def build_list(annotations: dict[str, Any], count: int, seed: int) -> list[dict[str, Any]]:
    """Rows {id, image_id, caption_id, file, prompt} of `count` pictures; ConfigError when there are fewer."""
    captions: dict[int, list[dict[str, Any]]] = {}
    for row in sorted(annotations["annotations"], key=lambda row: row["id"]):
        captions.setdefault(row["image_id"], []).append(row)
    files = {row["id"]: row["file_name"] for row in annotations["images"]}
    images = sorted(files.keys() & captions.keys())
    require(count <= len(images), f"--count is {count}, the annotations have {len(images)} pictures with captions")
    draw = np.random.default_rng(seed)
    rows = []
    for image in (images[int(i)] for i in draw.permutation(len(images))[:count]):
        chosen = captions[image][int(draw.integers(len(captions[image])))]
        text = " ".join(chosen["caption"].split())
        rows.append(
            {"id": f"coco/{image}/{chosen['id']}", "image_id": image, "caption_id": chosen["id"],
             "file": files[image], "prompt": text}
        )  # fmt: skip
    return rows


def crop_square(image: Image.Image, size: int) -> Image.Image:
    """Picture of size x size pixels: the short side resized (bicubic, antialiased), the centre cut out."""
    scale = size / min(image.size)
    width, height = (max(size, round(length * scale)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def write_pictures(rows: list[dict[str, Any]], folder: Path, out: Path, size: int) -> int:
    """Write the list's pictures as PNG, those there are skipped; ConfigError naming the first missing or damaged."""
    from eval.scoring.feature_store import num_workers, prefetched  # imports torch: here, so that --help is quick

    require(bool(rows) and all("file" in row for row in rows), "the list has no file names: make it by eval.coco list")
    missing = [row["file"] for row in rows if not (folder / row["file"]).is_file()]
    require(not missing, f"{len(missing)} pictures are not in {folder}, first {missing[0] if missing else ''}")
    out.mkdir(parents=True, exist_ok=True)

    def work(row: dict[str, Any]) -> bool:
        target = out / (Path(row["file"]).stem + ".png")
        if target.is_file():
            return False
        try:
            cropped = crop_square(read_rgb((folder / row["file"]).read_bytes()), size)
        except (OSError, BadPictureError) as error:
            raise ConfigError(f"picture {folder / row['file']} cannot be read ({error}): copy it again") from error
        with replacing(target) as temporary:
            cropped.save(temporary, format="PNG")
        return True

    done = prefetched(rows, work, num_workers(), 64)
    return sum(ProgressBar(done, "pictures", len(rows), unit="image"))


@interruptible("pictures that were written are kept, and the same command goes on with the others")
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = command_parser("eval.coco", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="captions by seed")
    listing.add_argument("annotations", type=Path)
    listing.add_argument("--count", type=int, default=30_000)
    listing.add_argument("--seed", type=int, default=0)
    pictures = commands.add_parser("pictures", help="reference pictures of a list")
    pictures.add_argument("list", type=Path)
    pictures.add_argument("folder", type=Path)
    pictures.add_argument("--size", type=int, default=256)
    for part in (listing, pictures):
        part.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(argv)
    if given.command == "list":
        require(given.count >= 1, f"--count is {given.count}: use 1 or more")
        check_file(given.out, "--out")
        rows = build_list(read_annotations(given.annotations), given.count, given.seed)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_text(given.out, text)
        print(f"{len(rows)} captions, sha256 {hashlib.sha256(text.encode()).hexdigest()}: {given.out}")
        return
    require(given.list.is_file(), f"{given.list} is not a file: make it by eval.coco list")
    check_writable(given.out, f"--out {given.out}")
    require(given.size >= 1, f"--size is {given.size}: use 1 or more")
    rows = [row for _, row in json_rows(given.list)]
    print(f"{write_pictures(rows, given.folder, given.out, given.size)} pictures written to {given.out}")


if __name__ == "__main__":
    main()
