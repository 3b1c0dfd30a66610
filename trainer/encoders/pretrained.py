"""What the encoders of other libraries share: local files only, one sentence when they are wrong, digests, device."""

import hashlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from trainer.config import ConfigError, require

_BLOCK, _NUM_BLOCKS = 1 << 16, 1024  # of files larger than 64 MiB


def require_package(setting: str, package: str) -> None:
    """ConfigError unless an optional package is installed; `setting` is what needs it, as key=value."""
    require(
        importlib.util.find_spec(package) is not None,
        f"{setting} needs the package {package}: run pip install '.[encoders]'",
    )


def require_file(setting: str, path: Path, what: str) -> Path:
    """The path, or a ConfigError that names setting and file."""
    require(path.is_file(), f"{setting}: {path} is not there, copy the {what} to it (nothing is downloaded)")
    return path


def read_json(setting: str, path: Path, what: str) -> dict[str, Any]:
    """A JSON object of a model's folder; ConfigError if it is missing or damaged."""
    text = require_file(setting, path, what).read_text(errors="replace")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{setting}: {path} is no JSON file, copy it again") from error
    require(isinstance(content, dict), f"{setting}: {path} holds no JSON object, copy it again")
    found: dict[str, Any] = content
    return found


def load_local(setting: str, cls: Any, folder: Path, device: torch.device | None = None, **options: Any) -> Any:
    """A library's model from a folder, frozen, on the device; ConfigError if that fails or leaves weights random."""
    try:
        model, info = cls.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    except Exception as error:  # libraries raise anything, from OSError to RuntimeError
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{setting} cannot be loaded, copy the folder again: {reason}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(f"{setting} lacks {len(missing)} weights, first {missing[0]}: copy it again")
    return model.eval().requires_grad_(False).to(encoder_device(device))


def read_weights(path: Path, rename: Callable[[str], str]) -> dict[str, Tensor]:
    """Weights of a safetensors or torch file or a TorchScript archive.

    `rename` gives their names here, "" for those that are not wanted.
    """
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(key) for key in file.keys() if (name := rename(key))}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*TorchScript archive.*")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except RuntimeError as error:
        if "TorchScript" not in str(error):
            raise
        content = read_torchscript(path)  # as OpenAI published CLIP
    state = content.get("state_dict", content)
    return {name: value for key, value in state.items() if (name := rename(key))}


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """State dict of a TorchScript archive; nothing in it is called."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the loader of this archived format is deprecated
        state: dict[str, Tensor] = torch.jit.load(str(path), map_location="cpu").state_dict()
    return state


@contextmanager
def must_fit(complaint: str) -> Iterator[None]:
    """Around a strict load: weights of another network raise ConfigError with `complaint` and the reason.

    A wrong pair of weights and network must not give wrong pictures or scores silently.
    """
    try:
        yield
    except (RuntimeError, SafetensorError, OSError, KeyError, TypeError, AttributeError, UnpicklingError) as error:
        raise ConfigError(f"{complaint}: {' '.join(str(error).split())[:300]}") from error


def weight_files(setting: str, folder: Path) -> list[Path]:
    """The weights of a model's folder, safetensors before others; ConfigError if there are none."""
    for pattern in ("*.safetensors", "*.bin"):
        found = sorted(folder.glob(pattern))
        if found:
            return found
    raise ConfigError(f"{setting}: {folder} holds no .safetensors file, copy the model's weights to it")


def config_digest(content: dict[str, Any]) -> str:
    """Hash of a model's settings without the notes of the library that saved it."""
    kept = {key: value for key, value in content.items() if not key.startswith("_") or key == "_class_name"}
    for note in ("transformers_version", "torch_dtype", "dtype"):
        kept.pop(note, None)
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def files_digest(paths: list[Path]) -> str:
    """Hash of files of weights: whole up to 64 MiB, else size and 1,024 blocks of 64 KiB evenly spread.

    Every process of a run computes it, so it must not read tens of gigabytes; whatever trains a model changes
    all blocks. Files are told apart by their order, not by name.
    """
    parts = [_file_digest(path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@cache
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    del mtime_ns  # key of the cache
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _BLOCK * _NUM_BLOCKS:
            digest.update(file.read())
        else:
            for number in range(_NUM_BLOCKS):
                file.seek((size - _BLOCK) * number // (_NUM_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def read_tokenizer(setting: str, path: Path, max_tokens: int) -> Tokenizer:
    """The tokenizer of a file, which cuts captions at `max_tokens` and pads none; ConfigError if it is damaged."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(f"{setting}: {path} is no tokenizer, copy it again") from error
    tokenizer.enable_truncation(max_tokens)
    tokenizer.no_padding()
    return tokenizer


def encoder_device(given: torch.device | None = None) -> torch.device:
    """Where frozen encoders run: where they are told to, else this process's GPU if there is one."""
    if given is not None:
        return given
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def text_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU, as these text encoders are commonly run; fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def encode_by_length(
    ids: list[list[int]], forward: Callable[[Tensor], Tensor], device: torch.device, chunk: int = 64
) -> list[Tensor]:
    """Token features of captions, equal lengths together, so that nothing is padded or masked.

    `forward` maps ids [B, L] on `device` to [B, L, D]; the result is fp32 [n, D] on the CPU each.
    """
    features: list[Tensor] = [torch.empty(0)] * len(ids)
    for length in sorted({len(row) for row in ids}):
        rows = [i for i, row in enumerate(ids) if len(row) == length]
        for part in (rows[i : i + chunk] for i in range(0, len(rows), chunk)):
            out_BLD = forward(torch.tensor([ids[i] for i in part], device=device)).float().cpu()
            for i, feature in zip(part, out_BLD, strict=True):
                features[i] = feature.clone()
    return features
