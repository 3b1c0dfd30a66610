"""Export: the weights of a checkpoint as plain safetensors files, on a CPU, one part of a tensor in memory at a time.

An export folder holds

| file                                 | what                                                                    |
|--------------------------------------|-------------------------------------------------------------------------|
| `model-00001-of-00002.safetensors`   | whole tensors under their names in the model, all experts, bf16 or fp32 |
| `model.safetensors.index.json`       | Hugging Face's index: in which file each tensor is, size of all         |
| `config.json`                        | settings, description of the data, step: all that is needed to draw     |
| `MANIFEST.json`                      | size and XXH3-128 of each file above, as in a checkpoint                |
| `README.md`                          | model card, for you to finish (trainer/checkpoint/model_card.py)        |
| `encoders/`                          | codec and text encoder: yours to put there, but for a codec of your own |

Equal checkpoints and options give equal bytes. The folder appears at once, when it is whole. No file says where things
lay on this machine (trainer/checkpoint/portable.py).
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.folder import check_written, write_durable, write_manifest
from trainer.checkpoint.model_card import CARD, model_card
from trainer.checkpoint.portable import copy_encoders, describe_encoders, portable_config, portable_info
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.state import read_state
from trainer.checkpoint.tensorfile import Source, Written, write_tensors
from trainer.errors import ConfigError, require, sentence_of
from trainer.files import flush
from trainer.formats.progress_bar import ProgressBar

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
# Of 1 the weights meant another pairing of channels in the rotary embedding; 2 named encoders by their whole paths.
FORMAT, READABLE = 3, (2, 3)
KIND_OF = {"ema": "ema", "model": "weight"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_PART_BYTES = 1 << 24  # of fp32 values held at a time; larger parts are not faster


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Which weights, in which dtype, in files of at most how many bytes (a larger tensor has a file of its own).

    `encoders` is the folder of codec and text encoder, where they do not lie as the run says; without `digests` they
    need not be there.
    """

    weights: str
    dtype: str
    shard_bytes: int
    encoders: Path | None = None
    digests: bool = True

    def __post_init__(self) -> None:
        for name, known in (("weights", KIND_OF), ("dtype", DTYPES)):
            value = getattr(self, name)
            require(value in known, f"--{name} {value} is unknown: choose from {', '.join(known)}")
        require(self.shard_bytes >= 1, f"--shard-gb {self.shard_bytes / 1e9:g}: use more than 0")


def check_target(out: Path) -> None:
    """Refuse a target that would be overwritten."""
    require(
        not out.exists() or (out.is_dir() and not any(out.iterdir())),
        f"{out} exists and is not an empty folder: name a new one, or remove it",
    )


def export(source: Path, out: Path, options: ExportOptions) -> int:
    """Write the checkpoint folder `source`, which is whole, as an export; returns the bytes of its tensors.

    A crash leaves `out` as it was. Raises ConfigError for a target that is not empty and a disk that refuses.
    """
    out = Path(os.path.abspath(out))
    check_target(out)
    temporary = out.with_name(f".{out.name}.export.tmp")
    # A folder is not replaced as a file is (`trainer.files.replacing`): the target must be absent or empty, and is
    # looked at again just before the rename, which the system refuses for one that has been filled meanwhile.
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # of a job that died
        temporary.mkdir()
        size = _write(source, temporary, options)
        check_written(temporary, state=CONFIG)
        check_target(out)
        os.replace(temporary, out)
        flush(out.parent)
    except OSError as error:
        raise ConfigError(f"{out} could not be written: {sentence_of(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return size


def _write(source: Path, folder: Path, options: ExportOptions) -> int:
    state = read_state(source)
    encoders = describe_encoders(state.data_info, options.encoders, digests=options.digests)  # refuses before it writes
    files, index = _write_weights(source, folder, options)
    config = {
        "step": state.step,
        "data_info": {k: v for k, v in asdict(portable_info(state.data_info)).items() if k != "samples"},
        "config": portable_config(state.config),
        "encoders": encoders,
        "architectures": ["EcDit"],
        "model_type": "ec_dit",
        "torch_dtype": str(DTYPES[options.dtype]).removeprefix("torch."),
        "format": FORMAT,
        "weights": options.weights,
        "dtype": options.dtype,
        "git_commit": state.git_commit,
    }
    for file, content in {INDEX: index, CONFIG: config}.items():
        files[file] = write_durable(folder / file, json.dumps(content, indent=2, sort_keys=True) + "\n")
    write_manifest(folder, files)
    copy_encoders(state.data_info, options.encoders, folder)
    write_durable(folder / CARD, model_card(source, state, encoders, weights=options.weights, dtype=options.dtype))
    size: int = index["metadata"]["total_size"]
    return size


def _write_weights(source: Path, folder: Path, options: ExportOptions) -> tuple[dict[str, Written], dict[str, Any]]:
    """The files of tensors, and their index."""
    reader = CheckpointReader(source)
    dtype, kind = DTYPES[options.dtype], KIND_OF[options.weights]
    shapes = {name: reader.shape(name) for name in reader.names(kind)}
    require(bool(shapes), f"{source} has no {options.weights} weights: choose others with --weights")
    sizes = {name: prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = split_shards(sizes, options.shard_bytes)
    files: dict[str, Written] = {}
    weight_map: dict[str, str] = {}
    bar = ProgressBar(desc="export", total=sum(sizes.values()), unit="B", unit_scale=True)
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        sources = {}
        for name in names:
            chunks = _counted(bar, (chunk.to(dtype) for chunk in reader.chunks(kind, name, chunk_bytes=_PART_BYTES)))
            sources[name] = Source(dtype=dtype, shape=shapes[name], chunks=chunks)
        files[file] = write_tensors(folder / file, sources, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    bar.close()
    reader.close()
    return files, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}


def _counted(bar: ProgressBar, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The chunks, each told to the bar when it is asked for."""
    for chunk in chunks:
        bar.update(chunk.numel() * chunk.element_size())
        yield chunk


def split_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, in groups of at most `limit` bytes; a larger tensor is a group of its own."""
    groups: list[list[str]] = []
    used = 0
    for name, size in sizes.items():
        if not groups or used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups
