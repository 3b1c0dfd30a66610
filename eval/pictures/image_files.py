"""Pictures on disk: which files a set consists of, and how they are read.

A set is a folder in GenEval's layout (DIR/00000/samples/0000.png), any other folder of pictures (read in the order
of their names), or the batch file of ADM's evaluator (an npz with `arr_0`, uint8 [N, H, W, 3]), which is unpacked.
Nothing is dropped silently: a missing, empty or damaged picture is an error that names it, and files that are no
pictures by their name are counted on the report.
"""

import os
import re
import zipfile
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.config import ConfigError, require
from trainer.data.images.decode import BadPictureError, read_rgb
from trainer.files import replacing

DECODING = "upright, 16 bits scaled, on white"
"""How `read_picture` reads: part of what features and detections are kept by."""
_NUMBERED = re.compile(r"\d+\.png")


def picture_path(folder: Path, number: int, sample: int) -> Path:
    """Where picture `sample` of prompt `number` lies."""
    return folder / f"{number:05d}" / "samples" / f"{sample:04d}.png"


def write_picture(path: Path, picture_HWC: Tensor) -> None:
    """Write a uint8 picture [H, W, 3] as PNG, whole or not at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        Image.fromarray(picture_HWC.cpu().numpy()).save(temporary, format="PNG")


def read_picture(path: Path) -> Tensor:
    """A picture as uint8 [H, W, 3], read as for training. ConfigError if it cannot be decoded."""
    try:
        return torch.from_numpy(np.array(read_rgb(path.read_bytes())))
    except (OSError, BadPictureError) as error:
        raise ConfigError(f"picture {path} cannot be read ({error}): delete it and draw or copy it again") from error


def is_whole(path: Path) -> bool:
    """Whether a picture is there and not empty."""
    return path.is_file() and path.stat().st_size > 0


def geneval_files(folder: Path, num_prompts: int, num_samples: int) -> list[Path]:
    """The files of prompts 0, 1, ... with `num_samples` each; ConfigError unless exactly these are there."""
    require(folder.is_dir(), f"pictures {folder} do not exist: give a folder in GenEval's layout")
    groups = {path.name for path in folder.iterdir() if path.is_dir() and re.fullmatch(r"\d{5}", path.name)}
    require(
        bool(groups), f"{folder} has no folder 00000: pictures must lie in DIR/00000/samples/0000.png, as in GenEval"
    )
    surplus = sorted(groups - {f"{number:05d}" for number in range(num_prompts)})
    if surplus:
        raise ConfigError(
            f"{folder} has {len(groups)} prompts, first surplus {surplus[0]}, but the prompt set has {num_prompts}: "
            "use the set that the pictures were drawn for"
        )
    files = [picture_path(folder, number, sample) for number in range(num_prompts) for sample in range(num_samples)]
    expected = set(files)
    for samples in dict.fromkeys(file.parent for file in files):
        found = {path for path in samples.glob("*.png") if _NUMBERED.fullmatch(path.name)}
        require(
            found <= expected,
            f"{samples} has {len(found)} pictures, {num_samples} are asked for: set --samples to {len(found)}",
        )
    missing = [file for file in files if not is_whole(file)]
    if missing:
        raise ConfigError(f"{len(missing)} of {len(files)} pictures are missing, first {missing[0]}: draw the rest")
    return files


@cache
def _suffixes() -> set[str]:
    """Of all files that Pillow opens."""
    return {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}


def _all_files(folder: Path) -> list[Path]:
    """Everything under a folder but hidden files, through links too; ConfigError for what cannot be listed."""

    def refuse(error: OSError) -> None:
        raise ConfigError(f"{error.filename} cannot be listed ({error.strerror}): make it readable, or move it")

    found = []
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        for path in (Path(root, name) for name in folders):
            circle = path.is_symlink() and Path(root).resolve().is_relative_to(path.resolve())
            require(not circle, f"{path} is a link to a folder that it lies in: remove it")
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(found)


def folder_files(folder: Path) -> list[Path]:
    """All pictures under a folder in the order of their names; ConfigError if there are fewer than two."""
    require(folder.is_dir(), f"pictures {folder} do not exist: give a folder of pictures")
    files = [path for path in _all_files(folder) if path.suffix.lower() in _suffixes()]
    require(len(files) >= 2, f"{folder} has {len(files)} pictures, by their suffixes: 2 or more are needed")
    return files


def left_out(folder: Path) -> tuple[str, ...]:
    """A sentence on the files under a folder that `folder_files` takes for no pictures; nothing if there are none."""
    found = Counter(path.suffix.lower() or "no suffix" for path in _all_files(folder))
    others = [f"{count} {suffix}" for suffix, count in sorted(found.items()) if suffix not in _suffixes()]
    return (f"Left out of {folder}, no pictures by their suffixes: {', '.join(others)}.",) if others else ()


def unpack_npz(path: Path, folder: Path) -> list[Path]:
    """The pictures of an ADM batch file as PNG files in `folder`; those already there stay."""
    with open_npz(path) as content:
        require("arr_0" in content, f"{path} has no arr_0: give an npz of pictures as ADM writes it")
        pictures = content["arr_0"]
    require(
        pictures.dtype == np.uint8 and pictures.ndim == 4 and pictures.shape[-1] == 3,
        f"{path}: arr_0 is {pictures.dtype} {pictures.shape}, pictures must be uint8 [N, H, W, 3]",
    )
    files = [folder / f"{number:07d}.png" for number in range(len(pictures))]
    for file, picture in zip(files, pictures, strict=True):
        if not file.is_file():
            write_picture(file, torch.from_numpy(picture))
    return files


def open_npz(path: Path) -> "np.lib.npyio.NpzFile":
    """An npz file without pickles; ConfigError if it is missing or no npz."""
    require(path.is_file(), f"{path} is not a file: give an npz file or a folder of pictures")
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} cannot be read as npz ({error}): copy it again") from error
    if not isinstance(found, np.lib.npyio.NpzFile):
        raise ConfigError(f"{path} is no npz file: give one with mu and sigma, or with arr_0")
    return found
