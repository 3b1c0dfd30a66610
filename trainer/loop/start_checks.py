"""What a run is going to do, checked before anything is allocated or written."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.init_from import check_init
from trainer.checkpoint.resume import check_resumable, find_candidate
from trainer.checkpoint.state import Topology, read_state
from trainer.config import ConfigError, TrainConfig, require
from trainer.data.dataset import open_dataset
from trainer.data.latents.samples import LatentDataset, LatentInfo
from trainer.diffusion.model import ModelShape
from trainer.distributed import World
from trainer.engine.deepspeed_config import load_deepspeed_config, zero_stage
from trainer.engine.elastic import fit
from trainer.loop.run_lock import LOCK_NAME
from trainer.loop.sample_grid import GridSampler
from trainer.settings.tokens import num_kept_tokens

_LEFTOVERS = ("config.yaml.tmp", "logs", "failures.json", "bad_nodes")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that passed all checks. `checkpoint` is settled when the run folder is this job's.

    `notes` says what `parallel.elastic` changed in the configuration.
    """

    config: TrainConfig
    world: World
    deepspeed_config: dict[str, Any]
    dataset: LatentDataset
    topology: Topology
    checkpoint: Path | None
    notes: tuple[str, ...] = ()

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step."""
        return self.config.global_batch_size(self.world.size)

    @property
    def init_from(self) -> Path | None:
        """The export whose weights the run starts from; None if it resumes or starts fresh."""
        return Path(self.config.init_from) if self.config.init_from and self.checkpoint is None else None

    @property
    def model_shape(self) -> ModelShape:
        """Of the data that the model is built for."""
        info = self.dataset.info
        return ModelShape(channels=info.channels, height=info.height, width=info.width, text_dim=info.text_dim)

    def num_tokens(self, step: int) -> int:
        """Image tokens that the model sees in optimizer step number `step`: the kept ones, if masked."""
        return num_kept_tokens(full_tokens(self.config, self.dataset.info), self.config.diffusion.mask_ratio_at(step))


def full_tokens(config: TrainConfig, info: LatentInfo) -> int:
    """Image tokens of an unmasked latent."""
    patch = config.model.patch_size
    return (info.height // patch) * (info.width // patch)


def plan_run(config: TrainConfig, world: World) -> Plan:
    """Check everything a user can get wrong; ConfigError with one sentence."""
    notes: list[str] = []
    if config.parallel.elastic:
        newest = find_candidate(Path(config.run_dir))
        saved_batch = None if newest is None else int(read_state(newest)["global_batch_size"])
        config, notes = fit(config, world_size=world.size, local_size=world.local_size, saved_batch=saved_batch)
    ep_size = config.parallel.ep_size
    require(
        world.size % ep_size == 0,
        f"parallel.ep_size={ep_size} does not divide the number of processes, {world.size}: "
        "start a multiple of it, or lower parallel.ep_size",
    )
    deepspeed_config = load_deepspeed_config(config, world.size)
    dataset = open_dataset(config)
    _check_sizes(config, dataset, world)
    GridSampler.check(config)
    topology = Topology(world_size=world.size, ep_size=ep_size, zero_stage=zero_stage(deepspeed_config))
    checkpoint = find_resume(config, topology, dataset.info.fingerprint)
    if config.init_from and checkpoint is None:
        check_init(Path(config.init_from), config, dataset.info)
    return Plan(
        config=config, world=world, deepspeed_config=deepspeed_config, dataset=dataset,
        topology=topology, checkpoint=checkpoint, notes=tuple(notes),
    )  # fmt: skip


def _check_sizes(config: TrainConfig, dataset: LatentDataset, world: World) -> None:
    info, patch = dataset.info, config.model.patch_size
    require(
        info.height % patch == 0 and info.width % patch == 0,
        f"model.patch_size={patch} does not divide the latent of {info.height} x {info.width}",
    )
    try:
        for count in _pools(config, info):
            config.moe.capacity(count)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    require(
        len(dataset) >= config.global_batch_size(world.size),
        f"train.micro_batch_size={config.train.micro_batch_size} x gradient_accumulation_steps="
        f"{config.train.gradient_accumulation_steps} x {world.size} processes is a global batch of "
        f"{config.global_batch_size(world.size)}, but the data set has {len(dataset)} samples: lower one of them",
    )


def _pools(config: TrainConfig, info: LatentInfo) -> list[int]:
    """Tokens of an image in sampling (all) and in training, largest first: one picture alone is the smallest pool."""
    if not config.moe.every:
        return []
    num_tokens = full_tokens(config, info)
    return sorted({num_tokens, num_kept_tokens(num_tokens, config.diffusion.mask_ratio)}, reverse=True)


def rounded_capacities(config: TrainConfig, info: LatentInfo) -> Iterator[str]:
    """One sentence for each token count at which the experts' capacity had to be rounded down."""
    per_pool = config.moe.pool_images(config.train.micro_batch_size)
    for count in (per_pool * tokens for tokens in _pools(config, info)):
        exact, used = config.moe.exact_capacity(count), config.moe.capacity(count)
        if exact != used:
            yield (
                f"expert capacity on {count} tokens is rounded down: {config.moe.capacity_factor} * {count} / "
                f"{config.moe.num_experts} = {float(exact):.3f}, used {used}"
            )


def find_resume(config: TrainConfig, topology: Topology, fingerprint: str) -> Path | None:
    """The checkpoint to continue from, unless its checksums prove wrong; refuses a folder that is not a run's."""
    run_dir = Path(config.run_dir)
    if not run_dir.exists() or all(_is_leftover(path) for path in run_dir.iterdir()):
        return None
    require(
        (run_dir / "config.yaml").is_file(),
        f"run_dir={run_dir} exists and is not the folder of a run (no config.yaml): choose an empty or new folder",
    )
    checkpoint = find_candidate(run_dir)
    if checkpoint is not None:
        check_resumable(checkpoint, config, topology, fingerprint)
    return checkpoint


def _is_leftover(path: Path) -> bool:
    """What a job that died before its first write of `config.yaml` leaves, and what batch scripts put beside it."""
    return path.name.startswith((LOCK_NAME, ".doctor.")) or path.name in _LEFTOVERS
