"""Prompts to pictures on disk, in GenEval's folder layout.

`DIR/00000/metadata.jsonl` describes prompt 0 and `DIR/00000/samples/0000.png` is its first picture. The
seed of a picture is a hash of the prompt's id and the sample number, so neither the batch, the number of
ranks nor a restart changes it. What exists is not drawn again. Shapes: N pictures, H x W pixels.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.pictures.prompts import Prompt
from trainer.config import ConfigError

Generator = Callable[[list[str], list[int]], Tensor]  # captions, seeds -> uint8 [N, H, W, 3]


def picture_seed(prompt_id: str, sample: int) -> int:
    """Seed of one picture, 63 bits, the same on every platform."""
    digest = hashlib.sha256(f"{prompt_id}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def picture_path(folder: Path, number: int, sample: int) -> Path:
    """Where picture `sample` of prompt `number` lies."""
    return folder / f"{number:05d}" / "samples" / f"{sample:04d}.png"


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write through a temporary name, so that a reader or a restart never meets half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(temporary)
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, lambda temporary: temporary.write_text(text))


def write_picture(path: Path, picture_HWC: Tensor) -> None:
    """Write a uint8 picture [H, W, 3] as PNG atomically; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(picture_HWC.cpu().numpy())
    _replace(path, lambda temporary: image.save(temporary, format="PNG"))


def _is_whole(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def generate_pictures(
    prompts: Sequence[Prompt],
    folder: Path,
    generate: Generator,
    *,
    num_samples: int = 1,
    batch_size: int = 40,
    rank: int = 0,
    world_size: int = 1,
) -> int:
    """Draw this rank's missing pictures into `folder`; returns how many were drawn.

    Rank r takes prompts r, r + world_size, ...: shares differ by one at most and none is padded.
    """
    jobs = []
    for number in range(rank, len(prompts), world_size):
        line = json.dumps(prompts[number].metadata) + "\n"
        write_text(folder / f"{number:05d}" / "metadata.jsonl", line)
        samples = range(num_samples)
        jobs += [(number, s) for s in samples if not _is_whole(picture_path(folder, number, s))]
    hidden = rank != 0 or not sys.stderr.isatty()
    with tqdm(total=len(jobs), desc="pictures", unit="image", disable=hidden) as bar:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            captions = [prompts[number].text for number, _ in batch]
            seeds = [picture_seed(prompts[number].id, sample) for number, sample in batch]
            for (number, sample), picture in zip(batch, generate(captions, seeds), strict=True):
                write_picture(picture_path(folder, number, sample), picture)
            bar.update(len(batch))
    return len(jobs)


def read_pictures(folder: Path, num_prompts: int, num_samples: int = 1) -> Tensor:
    """All pictures, prompt by prompt: uint8 [num_prompts * num_samples, H, W, 3].

    Raises ConfigError naming the first missing file: a score over fewer pictures would be a wrong score.
    """
    pictures = []
    for number in range(num_prompts):
        for sample in range(num_samples):
            path = picture_path(folder, number, sample)
            if not _is_whole(path):
                raise ConfigError(f"{path} is missing: run the command again to draw the rest")
            with Image.open(path) as image:
                pictures.append(torch.from_numpy(np.array(image.convert("RGB"))))
    return torch.stack(pictures)
