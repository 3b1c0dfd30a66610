"""Reads an export: what it says of itself, and its tensors as fp32 by flat range."""

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.checkpoint.export import CONFIG, DTYPES, FORMAT, INDEX
from trainer.checkpoint.folder import fault
from trainer.checkpoint.tensorfile import TensorFile
from trainer.config import ConfigError, require

_PART = 1 << 22  # elements of bf16 held while they become fp32
_DTYPE_OF = {"F32": torch.float32, "BF16": torch.bfloat16}


class WeightSource(Protocol):
    """Full logical tensors by name, all experts, of which a rank reads the ranges that it keeps."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of each tensor."""
        ...

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill the flat fp32 host tensor `out` with the elements from `start` on of a flattened tensor."""
        ...


def is_export(path: Path) -> bool:
    """Whether a folder is an export rather than a run or a checkpoint; it may be broken."""
    return (path / INDEX).is_file()


def read_export_config(folder: Path, *, checksums: bool) -> dict[str, Any]:
    """Content of `config.json` of a whole export; ConfigError saying what is wrong with another.

    Without `checksums` only the sizes of the large files are compared.
    """
    problem = fault(folder, checksums=checksums, state=CONFIG)
    require(not problem, f"{folder} is not whole: {problem}: export it anew")
    content: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    found = content.get("format")
    require(
        found == FORMAT,
        f"{folder} has export format {found}, this version reads {FORMAT}: read it with the version that wrote it",
    )
    assert content["dtype"] in DTYPES, content["dtype"]
    return content


class ExportReader:
    """The tensors of an export, read as fp32 by range; holds open files and no data.

    Raises ConfigError naming the file that is damaged or does not have what the index promises.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._holder: dict[str, TensorFile] = {}
        try:
            weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{folder / INDEX} is missing or unreadable: export it anew") from error
        self._files = {name: TensorFile(folder / name) for name in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            require(name in self._files[file].places, f"{folder / file} is damaged: it has no {name}")
            self._holder[name] = self._files[file]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of each tensor."""
        return {name: file.places[name].shape for name, file in self._holder.items()}

    def read(self, name: str) -> Tensor:
        """A full tensor, fp32."""
        out = torch.empty(self._holder[name].places[name].shape)
        self.read_into(name, 0, out.view(-1))
        return out

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill the flat fp32 host tensor `out` with the elements from `start` on of a flattened tensor."""
        file = self._holder[name]
        dtype = _DTYPE_OF[file.places[name].dtype]
        if dtype == out.dtype:
            file.read_into(name, start, out)
            return
        for first in range(0, out.numel(), _PART):
            part = out[first : first + _PART]
            raw = torch.empty(part.numel(), dtype=dtype)
            file.read_into(name, start + first, raw)
            part.copy_(raw)

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()


def read_export(folder: Path) -> dict[str, Tensor]:
    """All tensors of an export: {name: full fp32 tensor, all experts}."""
    reader = ExportReader(folder)
    weights = {name: reader.read(name) for name in reader.shapes}
    reader.close()
    return weights
