"""Writes drawn scenes exactly as img2dataset writes downloaded pictures (webdataset layout).

Per shard: NNNNN.tar with KEY.png, KEY.txt, KEY.json; NNNNN.parquet with one row per picture;
NNNNN_stats.json, last. The bytes are a function of the arguments, so there are no times in them.
"""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from trainer.data.demo.emoji import ATTRIBUTION
from trainer.data.demo.scenes import Scene, render, training_scene

FORMAT_VERSION = 1


def write_shards(folder: Path, num_images: int, image_size: int, seed: int, shard_size: int) -> None:
    """Write training scenes 0 to num_images of `seed` into `folder`, `shard_size` pictures per tar."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, num_images, shard_size)
    for shard, start in enumerate(tqdm(starts, desc="scenes", unit="shard", disable=None)):
        indices = range(start, min(start + shard_size, num_images))
        _write_shard(folder, shard, [training_scene(seed, i) for i in indices], image_size)
    print(f"wrote {num_images} pictures in {len(starts)} shards to {folder}")
    print(ATTRIBUTION)


def _write_shard(folder: Path, shard: int, scenes: list[Scene], image_size: int) -> None:
    stem = f"{shard:05d}"
    rows = []
    temporary = folder / f"{stem}.tar.tmp"
    with tarfile.open(temporary, "w") as tar:
        for position, scene in enumerate(scenes):
            png = _png(scene, image_size)
            row = _metadata(f"{stem}{position:04d}", scene, image_size, png)
            rows.append(row)
            _add(tar, f"{row['key']}.png", png)
            _add(tar, f"{row['key']}.txt", scene.caption.encode())
            _add(tar, f"{row['key']}.json", json.dumps(row, indent=4).encode())
    os.replace(temporary, folder / f"{stem}.tar")
    temporary = folder / f"{stem}.parquet.tmp"
    pq.write_table(pa.Table.from_pylist(rows), temporary)
    os.replace(temporary, folder / f"{stem}.parquet")
    stats = {
        "count": len(scenes),
        "successes": len(scenes),
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "status_dict": {"success": len(scenes)},
    }
    temporary = folder / f"{stem}_stats.json.tmp"
    temporary.write_text(json.dumps(stats, indent=4))
    os.replace(temporary, folder / f"{stem}_stats.json")


def _png(scene: Scene, image_size: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(render(scene, image_size)).save(buffer, "png")
    return buffer.getvalue()


def _metadata(key: str, scene: Scene, image_size: int, png: bytes) -> dict[str, Any]:
    """img2dataset's fields of a successful download, and the scene as an extra column."""
    return {
        "caption": scene.caption,
        "url": f"scene://v{FORMAT_VERSION}/{key}",
        "scene": scene.to_json(),
        "key": key,
        "status": "success",
        "error_message": None,
        "width": image_size,
        "height": image_size,
        "original_width": image_size,
        "original_height": image_size,
        "exif": "{}",
        "sha256": hashlib.sha256(png).hexdigest(),
    }


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
