"""Starting a run from the weights of an export: which exports fit, and how each rank reads its share of one.

Master weights and EMA start from the exported values, at step 0 with a fresh optimizer, on any topology. An export of a
dense model can also start one with experts (trainer/checkpoint/upcycle.py).
"""

from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.agree import agree, refused, shared_fault
from trainer.checkpoint.export import CONFIG
from trainer.checkpoint.export_reader import ExportReader, SavedExport, is_export, read_export_config
from trainer.checkpoint.load import fill
from trainer.checkpoint.portable import encoder_digest, portable_info
from trainer.checkpoint.upcycle import Upcycled, check_upcycle
from trainer.config import TrainConfig, config_from_dict, require
from trainer.data.latents.samples import LatentInfo
from trainer.diffusion.model import EcDit, ModelShape
from trainer.distributed import World
from trainer.engine.zero_state import master_pieces, publish_master
from trainer.settings.tokens import token_counts

_AS_IT_WAS = "encode the data as it was, or drop init_from"


def check_init(folder: Path, config: TrainConfig, info: LatentInfo) -> None:
    """Refuse an export that cannot start this run, reading no large file.

    Raises ConfigError with one sentence that names the key, both values and the remedy.
    """
    require(
        is_export(folder),
        f"init_from={folder} is not an export: make one with `python -m trainer.checkpoint export RUN OUT`",
    )
    saved = read_export_config(folder, checksums=False)
    old = config_from_dict(saved.config)
    for key, value in asdict(config.model).items():
        was = getattr(old.model, key)
        _check_same(f"model.{key}", value, was, folder, f"set model.{key}={was}")
    _check_encoders(folder, saved, info)
    for name in ("channels", "text_dim"):
        _check_same(f"the data's {name}", getattr(info, name), getattr(saved.data_info, name), folder, _AS_IT_WAS)
    _check_moe(folder, old, config, info)
    _check_shapes(folder, config, info)


def _check_encoders(folder: Path, saved: SavedExport, info: LatentInfo) -> None:
    """By digest where the export has one, else by name: the same encoder may lie elsewhere."""
    ours, theirs = asdict(portable_info(info)), asdict(portable_info(saved.data_info))
    for name in ("codec", "text_encoder"):
        value, was, same = ours[name], theirs[name], ours[name] == theirs[name]
        digest = saved.encoders[name].digest if name in saved.encoders else ""
        if digest and value:
            here = encoder_digest(name, getattr(info, name))
            value, was, same = f"{value} of digest {here}", f"{was} of digest {digest}", here == digest
        _check_same(f"data.{name}", value, was, folder, _AS_IT_WAS, same)


def _check_same(key: str, value: object, was: object, folder: Path, remedy: str, same: bool | None = None) -> None:
    same = value == was if same is None else same
    require(same, f"{key} is {value} but init_from={folder} was trained with {was}: {remedy}")


def _moe_blocks(config: TrainConfig) -> list[int]:
    return [i for i in range(config.model.num_layers) if config.moe.has_moe(i)]


def _is_upcycled(old: TrainConfig, config: TrainConfig) -> bool:
    return bool(_moe_blocks(config)) and not _moe_blocks(old)


def _check_moe(folder: Path, old: TrainConfig, config: TrainConfig, info: LatentInfo) -> None:
    if _is_upcycled(old, config):
        sizes = [(height, width) for height, width in info.buckets or [[info.height, info.width]]]
        counts = token_counts(sizes, config.model.patch_size, config.diffusion.mask_ratio)
        check_upcycle(config.moe, counts, f"init_from={folder}")
        return
    every, was = config.moe.every, old.moe.every
    remedy = f"experts stay in their blocks, so set moe.every={was} or use an export of a dense model"
    _check_same("moe.every", every, was, folder, remedy, same=_moe_blocks(old) == _moe_blocks(config))
    if _moe_blocks(config):
        num_experts, was = config.moe.num_experts, old.moe.num_experts
        remedy = f"experts are not split or merged, so set moe.num_experts={was} or use an export of a dense model"
        _check_same("moe.num_experts", num_experts, was, folder, remedy)


def _check_shapes(folder: Path, config: TrainConfig, info: LatentInfo) -> None:
    """Compare with a model that is built without memory: what the settings do not say."""
    with torch.device("meta"):
        model = EcDit(config.model, config.moe, ModelShape.of(info))
    with closing(ExportReader(folder)) as reader:
        there = {name: list(shape) for name, shape in _source(reader, config).shapes.items()}
    here = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for name in sorted(here.keys() | there.keys()):
        remedy = "use an export of the same model"
        _check_same(name, here.get(name, "absent"), there.get(name, "absent"), folder, remedy)


def _source(reader: ExportReader, config: TrainConfig) -> ExportReader | Upcycled:
    old = config_from_dict(read_export_config(reader.folder, checksums=False).config)
    return Upcycled(reader, config.moe) if _is_upcycled(old, config) else reader


def init_notes(config: TrainConfig, info: LatentInfo, checkpoint: Path | None) -> list[str]:
    """What to tell the user about `init_from`; `checkpoint` is the one that the run resumes from, if any."""
    if not config.init_from:
        return []
    if checkpoint is not None:
        return [f"init_from={config.init_from} is ignored: the run goes on from its own checkpoint"]
    saved = read_export_config(Path(config.init_from), checksums=False)
    old, data = config_from_dict(saved.config), saved.data_info
    notes = [f"initial weights: {saved.weights} of step {saved.step} in {saved.dtype}"]
    if _is_upcycled(old, config):
        scale = config.moe.num_experts / config.moe.capacity_factor
        notes.append(f"each of {config.moe.num_experts} experts is the dense FFN with its output times {scale:g}")
    changes = [(key, getattr(data, key), getattr(info, key)) for key in ("height", "width", "mean", "std")]
    changes += [("moe.capacity_factor", old.moe.capacity_factor, config.moe.capacity_factor)]
    return notes + [f"{key} since the export: {was} -> {now}" for key, was, now in changes if was != now]


def check_init_whole(folder: Path, world: World) -> None:
    """Compare all checksums; the ranks share the files. Collective; ConfigError naming the broken file."""
    with refused(f"init_from={folder} cannot be read"):
        problem = shared_fault(folder, world, state=CONFIG)
    require(not problem, f"init_from={folder} is not whole: {problem}: export it anew")


def load_init(folder: Path, engine: Any, config: TrainConfig) -> None:
    """Set the engine's weights: each rank reads its slices of the fp32 masters. Collective."""

    def read() -> None:
        with closing(ExportReader(folder)) as reader:
            read_into = _source(reader, config).read_into
            pieces = master_pieces(engine)
            targets = ((piece.values, piece.offset, partial(read_into, name)) for name, piece in pieces)
            fill(targets, shown=torch.distributed.get_rank() == 0)

    with refused(f"init_from={folder} cannot be read"):
        agree(read)
    publish_master(engine)
