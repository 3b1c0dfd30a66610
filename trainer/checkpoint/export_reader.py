"""Reads an export: what it says of itself, and its tensors as fp32 by flat range."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, TypeAdapter
from torch import Tensor

from trainer.checkpoint.export import CONFIG, FORMAT, INDEX, READABLE
from trainer.checkpoint.folder import MANIFEST, fault, read_manifest
from trainer.checkpoint.members import FileName, member, read_json
from trainer.checkpoint.tensorfile import TensorFile
from trainer.config import require
from trainer.data.latents.samples import LatentInfo
from trainer.formats.progress_bar import ProgressBar

_STORED = ("BF16", "F32")


@dataclass(frozen=True, kw_only=True)
class SavedEncoder:
    """Codec or text encoder: its setting with a name in place of a path, the digest of its weights ("": unknown)."""

    setting: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class SavedExport:
    """What is read of `config.json`; format 2 names encoders by their paths in `data_info`, and has no `encoders`."""

    step: NonNegativeInt
    data_info: LatentInfo
    config: dict[str, Any]
    weights: str
    dtype: Literal["bf16", "fp32"]
    format: int
    encoders: dict[str, SavedEncoder] = field(default_factory=dict)

    def check_encoders(self, whose: Path, digests: dict[str, str]) -> None:
        """ConfigError if an encoder, of whose weights the digest is given, is another than the model learned with."""
        for name, known in self.encoders.items():
            require(
                digests.get(name) == known.digest or not known.digest,
                f"{whose} learned with {known.setting} of digest {known.digest}, but the one that is here has "
                f"{digests.get(name)}: copy the right one, or name by --encoders the folder that has it",
            )


@dataclass(frozen=True, kw_only=True)
class _Index:
    weight_map: dict[str, FileName]


_ANY, _CONFIG, _INDEX = TypeAdapter(dict[str, Any]), TypeAdapter(SavedExport), TypeAdapter(_Index)


def is_export(path: Path) -> bool:
    """Whether a folder is an export rather than a run or a checkpoint; it may be broken."""
    return (path / INDEX).is_file()


def read_export_config(folder: Path, *, checksums: bool) -> SavedExport:
    """Content of `config.json` of a whole export; ConfigError saying what is wrong with another.

    Without `checksums` only the sizes of the large files are compared.
    """
    problem = fault(folder, checksums=checksums, state=CONFIG)
    require(not problem, f"{folder} is not whole: {problem}: export it anew")
    found = read_json(folder, CONFIG, _ANY).get("format")
    require(
        found in READABLE,
        f"{folder} has export format {found!r}, this version reads {FORMAT}: read it with the version that wrote it",
    )
    return read_json(folder, CONFIG, _CONFIG)


class ExportReader:
    """The tensors of an export, read as fp32 by range; holds open files and no data. `shapes` are those of the tensors.

    Raises ConfigError naming the file that is damaged or does not have what the index promises.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        weight_map, verified = read_json(folder, INDEX, _INDEX).weight_map, read_manifest(folder)
        files = sorted(set(weight_map.values()))
        for file in files:
            require(file in verified, f"{folder / INDEX} is damaged: {file} is not in {MANIFEST}")
        self._files = {file: TensorFile(member(folder, file)) for file in files}
        for name, file in weight_map.items():
            place = self._files[file].places.get(name)
            require(place is not None, f"{folder / file} is damaged: it has no {name}")
            fits = place is not None and place.dtype in _STORED
            require(fits, f"{folder / file} is damaged: {name} is not stored as {' or '.join(_STORED)}")
        self._holder = {name: self._files[file] for name, file in weight_map.items()}
        self.shapes = {name: file.places[name].shape for name, file in self._holder.items()}

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill the flat fp32 host tensor `out` with the elements from `start` on of a flattened tensor."""
        self._holder[name].read_into(name, start, out)

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()


def read_export(folder: Path, *, shown: bool = False) -> dict[str, Tensor]:
    """All tensors of an export: {name: full fp32 tensor, all experts}. With `shown` there is a bar."""
    reader = ExportReader(folder)
    weights = {name: torch.empty(shape) for name, shape in reader.shapes.items()}
    for name in ProgressBar(list(weights), "load", unit="tensor", shown=shown, leave=False):
        reader.read_into(name, 0, weights[name].view(-1))
    reader.close()
    return weights
