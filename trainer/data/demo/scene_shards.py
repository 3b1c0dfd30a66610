"""Draw the embedded picture set into image shards: `python -m trainer.data.demo.scene_shards --out DIR`.

The shards are as img2dataset writes those of downloaded pictures: NNNNN.tar with KEY.png, KEY.txt, KEY.json;
NNNNN.parquet with one row per picture; NNNNN_stats.json, last. The bytes are a function of the arguments.
"""

import hashlib
import io
import json
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from trainer.config import command_parser, interruptible, require
from trainer.data.demo.emoji import ATTRIBUTION
from trainer.data.demo.scenes import Scene, render, training_scene
from trainer.files import replacing, write_text
from trainer.formats.progress_bar import ProgressBar
from trainer.formats.worker_processes import check_num_workers, map_by

FORMAT_VERSION = 1


def write_shards(
    folder: Path, num_images: int, image_size: int, seed: int, shard_size: int, num_workers: int = 0
) -> None:
    """Write training scenes 0 to num_images of `seed` into `folder`, `shard_size` pictures per tar."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, num_images, shard_size)
    parts = [range(start, min(start + shard_size, num_images)) for start in starts]
    write = partial(_write_shard, folder, seed, image_size)
    with map_by(num_workers) as by_workers:
        for _ in ProgressBar(by_workers(write, range(len(parts)), parts), "scenes", len(parts), unit="shard"):
            pass
    print(f"wrote {num_images} pictures in {len(starts)} shards to {folder}")
    print(ATTRIBUTION)


def _write_shard(folder: Path, seed: int, image_size: int, shard: int, indices: range) -> None:
    stem, scenes = f"{shard:05d}", [training_scene(seed, i) for i in indices]
    rows = []
    with replacing(folder / f"{stem}.tar") as temporary, tarfile.open(temporary, "w") as tar:
        for position, scene in enumerate(scenes):
            buffer = io.BytesIO()
            Image.fromarray(render(scene, image_size)).save(buffer, "png")
            png = buffer.getvalue()
            row = _metadata(f"{stem}{position:04d}", scene, image_size, png)
            rows.append(row)
            _add(tar, f"{row['key']}.png", png)
            _add(tar, f"{row['key']}.txt", scene.caption.encode())
            _add(tar, f"{row['key']}.json", json.dumps(row, indent=4).encode())
    with replacing(folder / f"{stem}.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)
    stats = {
        "count": len(scenes),
        "successes": len(scenes),
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "status_dict": {"success": len(scenes)},
    }
    write_text(folder / f"{stem}_stats.json", json.dumps(stats, indent=4))


def _metadata(key: str, scene: Scene, image_size: int, png: bytes) -> dict[str, Any]:
    """img2dataset's fields of a successful download, and the scene as an extra column."""
    return {
        "caption": scene.caption,
        "url": f"scene://v{FORMAT_VERSION}/{key}",
        "scene": scene.to_json(),
        "key": key,
        "status": "success",
        "error_message": None,
        **dict.fromkeys(("width", "height", "original_width", "original_height"), image_size),
        "exif": "{}",
        "sha256": hashlib.sha256(png).hexdigest(),
    }


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@interruptible("shards that were written are kept, but the same command draws all of them again")
def main(argv: list[str] | None = None) -> None:
    """Command line: draw training scenes and write them as image shards."""
    parser = command_parser("trainer.data.demo.scene_shards", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the image shards")
    parser.add_argument("--num-images", type=int, default=16000)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", type=int, default=1000)
    parser.add_argument("--num-workers", type=int, default=0, help="processes to draw shards with (0: this one)")
    args = parser.parse_args(argv)
    for name in ("num_images", "image_size", "shard_size"):
        flag = f"--{name.replace('_', '-')}"
        require(getattr(args, name) >= 1, f"{flag} is {getattr(args, name)}: use 1 or more")
    check_num_workers(args.num_workers)
    write_shards(args.out, args.num_images, args.image_size, args.seed, args.shard_size, args.num_workers)


if __name__ == "__main__":
    main()
