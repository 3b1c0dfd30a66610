"""Reads an export: what it says of itself, and its tensors as fp32 by flat range."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.export import CONFIG, DTYPES, FORMAT, INDEX
from trainer.checkpoint.folder import fault
from trainer.checkpoint.tensorfile import TensorFile
from trainer.config import ConfigError, require


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
    """The tensors of an export, read as fp32 by range; holds open files and no data. `shapes` are those of the tensors.

    Raises ConfigError naming the file that is damaged or does not have what the index promises.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{folder / INDEX} is missing or unreadable: export it anew") from error
        self._files = {name: TensorFile(folder / name) for name in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            require(name in self._files[file].places, f"{folder / file} is damaged: it has no {name}")
        self._holder = {name: self._files[file] for name, file in weight_map.items()}
        self.shapes = {name: file.places[name].shape for name, file in self._holder.items()}

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill the flat fp32 host tensor `out` with the elements from `start` on of a flattened tensor."""
        self._holder[name].read_into(name, start, out)

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()


def read_export(folder: Path) -> dict[str, Tensor]:
    """All tensors of an export: {name: full fp32 tensor, all experts}."""
    reader = ExportReader(folder)
    weights = {name: torch.empty(shape) for name, shape in reader.shapes.items()}
    for name, weight in weights.items():
        reader.read_into(name, 0, weight.view(-1))
    reader.close()
    return weights
