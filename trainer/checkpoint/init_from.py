"""Starting a run from the weights of an export: which exports fit, and how each rank reads its share of one.

Master weights and EMA start from the exported values, at step 0 with a fresh optimizer, on any topology. An export of a
dense model can also start one with experts (trainer/checkpoint/upcycle.py).
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe.layer import MoeLayer
from trainer.checkpoint.agree import agree, refused
from trainer.checkpoint.export import CONFIG
from trainer.checkpoint.export_reader import ExportReader, WeightSource, is_export, read_export_config
from trainer.checkpoint.folder import fault
from trainer.checkpoint.load import fill
from trainer.checkpoint.upcycle import Upcycled, check_upcycle
from trainer.config import ConfigError, TrainConfig, config_from_dict, require
from trainer.data.latents.samples import LatentInfo
from trainer.diffusion.model import EcDit, ModelShape
from trainer.distributed import World
from trainer.engine.zero_state import master_pieces, publish_master
from trainer.settings.tokens import token_counts

_DATA_KEYS = {"codec": "data.codec", "text_encoder": "data.text_encoder"}


def check_init(folder: Path, config: TrainConfig, info: LatentInfo) -> None:
    """Refuse an export that cannot start this run, reading no large file.

    Raises ConfigError with one sentence that names the key, both values and the remedy.
    """
    require(
        is_export(folder),
        f"init_from={folder} is not an export: make one with `python -m trainer.checkpoint export RUN OUT`",
    )
    saved = read_export_config(folder, checksums=False)
    old = config_from_dict(saved["config"])
    for key, value in asdict(config.model).items():
        was = getattr(old.model, key)
        require(value == was, _sentence(f"model.{key}", value, folder, was, f"set model.{key}={was}"))
    _check_data(folder, LatentInfo(**saved["data_info"]), info)
    _check_moe(folder, old, config, info)
    _check_shapes(folder, config, info)


def _sentence(key: str, value: object, folder: Path, was: object, remedy: str) -> str:
    return f"{key} is {value} but init_from={folder} was trained with {was}: {remedy}"


def _check_data(folder: Path, old: LatentInfo, info: LatentInfo) -> None:
    for name in ("codec", "text_encoder", "channels", "text_dim"):
        value, was = getattr(info, name), getattr(old, name)
        key = _DATA_KEYS.get(name, f"the data's {name}")
        require(value == was, _sentence(key, value, folder, was, "encode the data as it was, or drop init_from"))


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
    require(
        _moe_blocks(old) == _moe_blocks(config),
        _sentence(
            "moe.every", config.moe.every, folder, old.moe.every,
            f"experts stay in their blocks, so set moe.every={old.moe.every} or use an export of a dense model",
        ),
    )  # fmt: skip
    require(
        not _moe_blocks(config) or old.moe.num_experts == config.moe.num_experts,
        _sentence(
            "moe.num_experts", config.moe.num_experts, folder, old.moe.num_experts,
            f"experts are not split or merged, so set moe.num_experts={old.moe.num_experts} or use an export of a "
            "dense model",
        ),
    )  # fmt: skip


def _check_shapes(folder: Path, config: TrainConfig, info: LatentInfo) -> None:
    """Compare with a model that is built without memory: what the settings do not say."""
    shape = ModelShape.of(info)
    with torch.device("meta"):
        model = EcDit(config.model, config.moe, shape, MoeLayer)
    reader = ExportReader(folder)
    here, there = {name: tuple(p.shape) for name, p in model.named_parameters()}, _source(reader, config).shapes
    reader.close()
    for name in sorted(here.keys() | there.keys()):
        new, old = (str(list(shapes[name])) if name in shapes else "absent" for shapes in (here, there))
        require(new == old, _sentence(name, new, folder, old, "use an export of the same model"))


def _source(reader: ExportReader, config: TrainConfig) -> WeightSource:
    old = config_from_dict(read_export_config(reader.folder, checksums=False)["config"])
    return Upcycled(reader, config.moe) if _is_upcycled(old, config) else reader


def init_notes(config: TrainConfig, info: LatentInfo, checkpoint: Path | None) -> list[str]:
    """What to tell the user about `init_from`; `checkpoint` is the one that the run resumes from, if any."""
    if not config.init_from:
        return []
    if checkpoint is not None:
        return [f"init_from={config.init_from} is ignored: the run goes on from its own checkpoint"]
    saved = read_export_config(Path(config.init_from), checksums=False)
    old, data = config_from_dict(saved["config"]), LatentInfo(**saved["data_info"])
    notes = [f"initial weights: {saved['weights']} of step {saved['step']} in {saved['dtype']}"]
    if _is_upcycled(old, config):
        scale = config.moe.num_experts / config.moe.capacity_factor
        notes.append(f"each of {config.moe.num_experts} experts is the dense FFN with its output times {scale:g}")
    changes: list[tuple[str, Any, Any]] = [
        (key, getattr(data, key), getattr(info, key)) for key in ("height", "width", "mean", "std")
    ]
    changes += [("moe.capacity_factor", old.moe.capacity_factor, config.moe.capacity_factor)]
    return notes + [f"{key} since the export: {was} -> {now}" for key, was, now in changes if was != now]


def check_init_whole(folder: Path, world: World) -> None:
    """Compare all checksums; the ranks share the files. Collective; ConfigError naming the broken file."""
    with refused(f"init_from={folder} cannot be read"):
        problems = agree(lambda: fault(folder, part=world.rank, num_parts=world.size, state=CONFIG))
    problem = next(filter(None, problems), "")
    if problem:
        raise ConfigError(f"init_from={folder} is not whole: {problem}: export it anew")


def load_init(folder: Path, engine: Any, config: TrainConfig) -> None:
    """Set the engine's weights: each rank reads its slices of the fp32 masters. Collective."""

    def read() -> None:
        reader = ExportReader(folder)
        source = _source(reader, config)
        fill((piece.values, piece.offset, partial(source.read_into, name)) for name, piece in master_pieces(engine))
        reader.close()

    with refused(f"init_from={folder} cannot be read"):
        agree(read)
    publish_master(engine)
