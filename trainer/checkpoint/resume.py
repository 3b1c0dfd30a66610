"""Which checkpoint a run goes on from, and whether this configuration may go on from it.

The topology may differ: every rank reads the ranges it needs. What may not differ is in `RULES`.
"""

from functools import partial
from pathlib import Path
from typing import Any

from trainer.checkpoint.agree import agree, refused, shared_fault
from trainer.checkpoint.folder import clean, fault, list_checkpoints, prune
from trainer.checkpoint.state import STATE, Topology, read_state
from trainer.config import TrainConfig, config_to_dict, known_keys, leaves, require
from trainer.data.latents.samples import LatentInfo
from trainer.distributed import World

# Setting or section -> (may it change between save and resume, why). The longest name that fits a setting counts.
RULES: dict[str, tuple[bool, str]] = {
    "run_dir": (True, "a run folder may be moved"),
    "seed": (False, "it keys the order of the data and all noise"),
    "init_from": (True, "it is where a new run starts; a resumed one goes on from its own checkpoint"),
    "train": (True, "length, cadence and batch arithmetic; the global batch is compared by itself"),
    "train.precision": (False, "losses before and after would not compare"),
    "parallel": (True, "any topology reads any checkpoint"),
    "moe": (False, "the experts and their routing are part of what was learned"),
    "moe.sampling_choice": (True, "sampling has no influence on training"),
    "model": (False, "the weights have its shapes and meaning"),
    "optim": (True, "rates, decay and schedule are the user's to change, from the next step on"),
    "optim.name": (False, "the moments belong to one optimizer"),
    "ema": (True, "the average goes on with the new decay"),
    "data": (True, "paths and reading; the data set itself is compared by its fingerprint"),
    "data.caption_dropout": (False, "it is part of the objective"),
    "data.shuffle_group": (False, "it is part of the order of the data, and the position in it would be wrong"),
    "diffusion": (True, "an unmasked last stage is usual, and sampling has no influence on training"),
    "sample": (True, "pictures for people"),
}


def find_candidate(run_dir: Path) -> Path | None:
    """The newest checkpoint whose state can be read, to check a configuration before anything starts.

    Every process may call this: the large files are not looked at.
    """
    paths = list_checkpoints(run_dir / "checkpoints")
    return next((path for path in reversed(paths) if not fault(path, only=[STATE])), None)


def choose_checkpoint(
    config: TrainConfig, topology: Topology, info: LatentInfo, world: World
) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of the run, or None if it has none; and what to tell the user. Collective.

    The ranks share the verification: each file is read once. Removes what dead jobs left unfinished and what
    `train.keep_last` no longer keeps, so the caller must own the run folder. Raises ConfigError when the checkpoint
    does not fit the configuration, or when there are checkpoints and none is whole.
    """
    folder = Path(config.run_dir) / "checkpoints"

    def tidy() -> list[Path]:
        if not world.is_main:
            return []
        clean(folder)
        return list_checkpoints(folder)

    with refused(f"{folder} cannot be prepared"):
        paths: list[Path] = agree(tidy)[0]  # one listing for all: a network file system may show each rank another
    # The newest first. A broken one is no reason to stop: an older one costs steps, not the run. But a whole one that
    # does not fit the configuration is: falling back would silently train something else.
    notes: list[str] = []
    for path in reversed(paths):
        problem = shared_fault(path, world)
        if not problem:
            notes += check_resumable(path, config, topology, info)
            with refused(f"{folder} cannot be prepared"):
                agree(partial(_make_room, path, config, world))
            return path, notes
        notes.append(f"passed over checkpoint {path}: {problem}")
    require(
        not paths,
        f"run_dir={config.run_dir} has checkpoints and none is whole ({'; '.join(notes)}): restore one, "
        "or delete them to start over, or use a new run_dir",
    )
    return None, notes


def _make_room(checkpoint: Path, config: TrainConfig, world: World) -> None:
    """Delete what is kept no longer before the next save needs the space; `checkpoint` was just verified."""
    if world.is_main:
        prune(checkpoint.parent, checkpoint, keep_last=config.train.keep_last, keep_every=config.train.keep_every)


def check_resumable(checkpoint: Path, config: TrainConfig, topology: Topology, info: LatentInfo) -> list[str]:
    """Refuse a checkpoint that this configuration cannot continue; return the changes that it may have.

    Raises ConfigError naming the first breaking difference, its old and new value and the remedy.
    """
    # The global batch is compared, not the micro-batch: other processes divide it up in another way.
    saved = read_state(checkpoint)
    old_batch, batch = saved.global_batch_size, config.global_batch_size(topology.world_size)
    require(
        old_batch == batch,
        f"{checkpoint} was trained with a global batch of {old_batch}, this run has {batch}: adapt "
        "train.micro_batch_size or train.gradient_accumulation_steps, or start a new run_dir",
    )
    notes = compare_configs(saved.config, config_to_dict(config), str(checkpoint))
    was, micro = leaves(saved.config).get("train.micro_batch_size"), config.train.micro_batch_size
    require(
        was in (None, micro) or not config.moe.every or config.moe.pool != "batch",
        f"train.micro_batch_size is {micro} but {checkpoint} was trained with {was}, and with moe.pool=batch "
        "that many images share their experts: restore it, or use a new run_dir",
    )
    _check_data(checkpoint, config, saved.data_info, info, notes)
    old = saved.topology
    return notes if old == topology else [f"topology: {old} -> {topology}", *notes]


def _check_data(checkpoint: Path, config: TrainConfig, was: LatentInfo, info: LatentInfo, notes: list[str]) -> None:
    """Refuse other values (the fingerprint: encoding, mix, blocks) and other samples; `notes` say what was changed."""
    data = config.data
    setting = next((f"data.{name}={getattr(data, name)}" for name in ("mix", "latents") if getattr(data, name)), "data")
    changes = "; ".join(note for note in notes if note.startswith("data."))
    changed, remedy = f" ({changes})" if changes else "", "restore it, or use a new run_dir"
    same = was.fingerprint == info.fingerprint
    require(same, f"{setting} is not the data set that {checkpoint} was trained on{changed}: {remedy}")
    # Checkpoints of older versions do not say which samples they were trained on.
    same = was.samples in ("", info.samples)
    require(
        same,
        f"{setting} has other samples than {checkpoint} was trained on, or in another order{changed}, and its position "
        f"in them would be wrong: {remedy}",
    )


def compare_configs(old: dict[str, Any], new: dict[str, Any], checkpoint: str) -> list[str]:
    """Lines like `train.log_every: 1 -> 5` for settings that may change; ConfigError for one that may not."""
    known = known_keys(TrainConfig)
    for name in (name for name, below in known.items() if below is not None):
        section = old.get(name, {})
        require(isinstance(section, dict), f"{checkpoint} is damaged: its setting {name} is no section: {section!r}")
    before, after, defaults = (leaves(content, known) for content in (old, new, config_to_dict(TrainConfig())))
    notes = []
    for key, value in after.items():
        was = before.get(key, defaults[key])  # a setting that did not exist then had its default's effect
        if was == value:
            continue
        allowed, reason = rule_of(key)
        require(
            allowed,
            f"{key} is {value} but {checkpoint} was trained with {was}, and {reason}: restore it, or use a new run_dir",
        )
        notes.append(f"{key}: {was} -> {value}")
    notes += [f"{key}: {was} -> no longer a setting" for key, was in before.items() if key not in after]
    return notes


def rule_of(key: str) -> tuple[bool, str]:
    """The entry of `RULES` for a setting."""
    return next(RULES[name] for name in (key, key.partition(".")[0]) if name in RULES)
