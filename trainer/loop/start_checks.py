"""What a run is going to do, checked before anything is allocated or written."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.init_from import check_init
from trainer.checkpoint.resume import check_resumable, find_candidate
from trainer.checkpoint.state import Topology, read_state
from trainer.config import ConfigError, TrainConfig, require
from trainer.data.dataset import check_latent_size, open_dataset
from trainer.data.latents.samples import LatentDataset, LatentInfo
from trainer.diffusion.model import ModelShape
from trainer.distributed import World
from trainer.engine.deepspeed_config import load_deepspeed_config, zero_stage
from trainer.engine.elastic import adapt
from trainer.loop.run_lock import LOCK_NAME
from trainer.loop.sample_grid import GridSampler
from trainer.loop.switches import SAVE_NAME, STOP_NAME
from trainer.settings.tokens import token_counts
from trainer.telemetry.trackers import check_trackers

# Put there by batch scripts and users, or (the first) by a start of an older version that was killed.
_LEFTOVERS = ("config.yaml.tmp", "logs", "failures.json", "bad_nodes", STOP_NAME, SAVE_NAME)


@dataclass(frozen=True, kw_only=True)
class CheckedRun:
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
        return ModelShape.of(self.dataset.info)


def check_start(config: TrainConfig, world: World) -> CheckedRun:
    """Check everything a user can get wrong; ConfigError with one sentence.

    Every process calls it by itself, before it knows the others: nothing is allocated or written, nothing collective.
    """
    # First the settings that depend on the number of processes, as all that follows is checked with them. The newest
    # checkpoint may still turn out to be damaged; all of a run have the same global batch, which is all that is read.
    notes: list[str] = []
    if config.parallel.elastic:
        newest = find_candidate(Path(config.run_dir))
        saved_batch = None if newest is None else read_state(newest).global_batch_size
        config, notes = adapt(config, world_size=world.size, local_size=world.local_size, saved_batch=saved_batch)
    ep_size = config.parallel.ep_size
    require(
        world.size % ep_size == 0,
        f"parallel.ep_size={ep_size} does not divide the number of processes, {world.size}: "
        "start a multiple of it, or lower parallel.ep_size",
    )
    deepspeed_config = load_deepspeed_config(config, world.size)
    # Then what needs the data: sizes of latents and of the data set, prompts of the sample grid.
    dataset = open_dataset(config)
    check_latent_size(config, dataset.info.height, dataset.info.width)
    _check_batch(config, dataset, world)
    GridSampler.check(config)
    check_trackers(config.train.wandb, config.train.mlflow)
    # Last the run folder: a checkpoint is compared with the topology and the data that were found above.
    topology = Topology(world_size=world.size, ep_size=ep_size, zero_stage=zero_stage(deepspeed_config))
    checkpoint = find_resume(config, topology, dataset.info)
    if config.init_from and checkpoint is None:
        check_init(Path(config.init_from), config, dataset.info)
    return CheckedRun(
        config=config, world=world, deepspeed_config=deepspeed_config, dataset=dataset,
        topology=topology, checkpoint=checkpoint, notes=tuple(notes),
    )  # fmt: skip


def _check_batch(config: TrainConfig, dataset: LatentDataset, world: World) -> None:
    batch = config.global_batch_size(world.size)
    require(
        len(dataset) >= batch,
        f"train.micro_batch_size={config.train.micro_batch_size} x gradient_accumulation_steps="
        f"{config.train.gradient_accumulation_steps} x {world.size} processes is a global batch of {batch}, but the "
        f"data set has {len(dataset)} samples: lower one of them",
    )


def rounded_capacities(config: TrainConfig, info: LatentInfo) -> Iterator[str]:
    """One sentence for each token count at which the experts' capacity had to be rounded down."""
    if not config.moe.every:
        return
    per_pool = config.moe.pool_images(config.train.micro_batch_size)
    tokens = token_counts([(info.height, info.width)], config.model.patch_size, config.diffusion.mask_ratio)
    for count in (per_pool * num_tokens for num_tokens in reversed(tokens)):
        exact, used = config.moe.exact_capacity(count), config.moe.capacity(count)
        if exact != used:
            yield (
                f"expert capacity on {count} tokens is rounded down: {config.moe.capacity_factor} * {count} / "
                f"{config.moe.num_experts} = {float(exact):.3f}, used {used}"
            )


def find_resume(config: TrainConfig, topology: Topology, info: LatentInfo) -> Path | None:
    """The checkpoint to continue from, unless its checksums prove wrong; refuses a folder that is not a run's."""
    run_dir = Path(config.run_dir)
    try:
        if all(_is_leftover(path) for path in run_dir.iterdir()):
            return None
    except FileNotFoundError:
        return None
    except OSError as error:  # a file, a name that is too long, a folder of somebody else
        raise ConfigError(f"run_dir={run_dir}: {error.strerror}: choose an empty or new folder") from error
    require(
        (run_dir / "config.yaml").is_file(),
        f"run_dir={run_dir} exists and is not the folder of a run (no config.yaml): choose an empty or new folder",
    )
    checkpoint = find_candidate(run_dir)
    if checkpoint is not None:
        check_resumable(checkpoint, config, topology, info)
    return checkpoint


def _is_leftover(path: Path) -> bool:
    """What a job that died before its first write of `config.yaml` leaves, and what batch scripts put beside it."""
    half_written = path.name.startswith(".") and path.name.endswith(".tmp")  # by trainer.files.replacing
    return half_written or path.name.startswith((LOCK_NAME, ".doctor.")) or path.name in _LEFTOVERS
