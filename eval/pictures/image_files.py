"""Pictures on disk: which files a set consists of, and how they are read.

A set is a folder in GenEval's layout (DIR/00000/samples/0000.png), any other folder of pictures (read in the order
of their names), or the batch file of ADM's evaluator (an npz with `arr_0`, uint8 [N, H, W, 3]), which is unpacked.
Nothing is dropped silently: a missing, empty or damaged picture is an error that names it.
"""

import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from trainer.config import ConfigError, require
from trainer.files import replacing

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
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
    """A picture as uint8 [H, W, 3]; transparency and palettes become RGB. ConfigError if it cannot be decoded."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB")))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
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


def folder_files(folder: Path) -> list[Path]:
    """All pictures under a folder in the order of their names; ConfigError if there are fewer than two."""
    require(folder.is_dir(), f"pictures {folder} do not exist: give a folder of pictures")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    require(
        len(files) >= 2, f"{folder} has {len(files)} pictures ({', '.join(sorted(SUFFIXES))}): 2 or more are needed"
    )
    return files


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
