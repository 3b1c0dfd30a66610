"""The configuration tree: frozen dataclasses, filled from a YAML recipe and `key=value` overrides.

The merge order is dataclass defaults <- YAML <- overrides, strict: an unknown key, a wrong type or a
value outside its range is a `ConfigError` with one sentence. Nothing is allocated here.
"""

import difflib
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe.config import MoeConfig
from moe.routers.registry import build_router
from trainer.errors import ConfigError, require
from trainer.settings.data import DataConfig

__all__ = [
    "ConfigError",
    "DataConfig",
    "DiffusionConfig",
    "EmaConfig",
    "ModelConfig",
    "MoeConfig",
    "OptimConfig",
    "ParallelConfig",
    "SampleConfig",
    "TrainConfig",
    "TrainLoopConfig",
    "config_from_dict",
    "config_to_dict",
    "load_config",
    "require",
    "run_cli",
    "save_config",
]
CONFIG_DIR = Path(__file__).parent / "configs"


@dataclass(frozen=True, kw_only=True)
class TrainLoopConfig:
    """The loop: batch arithmetic, length and cadence.

    The global batch is `micro_batch_size * gradient_accumulation_steps * world_size`. `stop_at_step`
    ends a run early with a checkpoint, without changing the learning-rate schedule of `max_steps`
    (None: run to `max_steps`). A cadence of 0 switches that action off; a checkpoint is always written
    at the last step. The last `keep_last` checkpoints are kept, and for ever those of each `keep_every`-th
    step. With `on_save_error: continue` a full disk costs a checkpoint, not the run; the last one must succeed.
    `async_save` writes while training goes on, and needs host memory for a copy of each rank's state.

    A step whose loss or gradient norm is not finite is skipped; after `max_bad_steps` in a row the run goes back
    to its newest checkpoint and on past those samples, at most `max_rollbacks` times to the same checkpoint.
    `emergency_save_seconds` bounds the attempt to save when something else fails between two steps.
    Every `profile_every`-th step is measured section by section, and is slower for it (telemetry/step_timer.py).
    `deterministic` makes a GPU's sums repeatable, so that a resumed run repeats an unbroken one bitwise.
    """

    micro_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_steps: int = 20
    stop_at_step: int | None = None
    log_every: int = 1
    checkpoint_every: int = 10
    keep_last: int = 3
    keep_every: int = 0
    on_save_error: Literal["abort", "continue"] = "abort"
    async_save: bool = False
    sample_every: int = 0
    profile_every: int = 0
    max_bad_steps: int = 3
    max_rollbacks: int = 2
    emergency_save_seconds: float = 600.0
    precision: Literal["fp32", "bf16"] = "fp32"
    deterministic: bool = True
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in (
            "micro_batch_size", "gradient_accumulation_steps", "max_steps", "log_every", "keep_last", "max_bad_steps",
        ):  # fmt: skip
            require(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}: use 1 or more")
        for name in ("checkpoint_every", "sample_every", "keep_every", "profile_every"):
            require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}: use 0 (off) or more")
        require(self.max_rollbacks >= 0, f"train.max_rollbacks is {self.max_rollbacks}: use 0 (never) or more")
        require(
            self.emergency_save_seconds > 0,
            f"train.emergency_save_seconds is {self.emergency_save_seconds}: use more than 0",
        )
        if self.stop_at_step is not None:
            require(
                1 <= self.stop_at_step <= self.max_steps,
                f"train.stop_at_step is {self.stop_at_step}: use 1 to train.max_steps={self.max_steps}",
            )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """`ep_size` ranks share the experts of a layer; `deepspeed_config` is a native DeepSpeed JSON file.

    With `elastic` a start on another number of processes adapts `ep_size` and the batch arithmetic of the recipe by
    the rule of trainer/engine/elastic.py, the global batch unchanged; without it, it is refused.
    """

    ep_size: int = 1
    elastic: bool = False
    deepspeed_config: str = "ds_configs/zero3.json"

    def __post_init__(self) -> None:
        require(self.ep_size >= 1, f"parallel.ep_size is {self.ep_size}: use 1 or more")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Size of the diffusion transformer. `mlp_ratio` = hidden_dim / dim of dense MLP and experts alike.

    `pooled_text` adds the mean text token to the timestep embedding (as SD3 does); the paper does not
    say whether EC-DIT has it. `prediction: data` lets the network predict the clean latent, from which the
    velocity follows: better where a patch has nearly as many values as the width (pixels; arXiv 2511.13720).
    """

    dim: int = 64
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    patch_size: int = 2
    mlp_ratio: int = 4
    pooled_text: bool = False
    prediction: Literal["velocity", "data"] = "velocity"

    def __post_init__(self) -> None:
        require(self.dim >= 1 and self.num_layers >= 1, "model.dim and model.num_layers must be 1 or more")
        require(
            self.num_heads >= 1 and self.dim % self.num_heads == 0,
            f"model.num_heads={self.num_heads} does not divide model.dim={self.dim}",
        )
        require(
            self.num_kv_heads >= 1 and self.num_heads % self.num_kv_heads == 0,
            f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}",
        )
        require(
            (self.dim // self.num_heads) % 4 == 0,
            f"model.dim={self.dim} / model.num_heads={self.num_heads} gives a head of "
            f"{self.dim // self.num_heads} values: 2-D RoPE needs a multiple of 4",
        )
        require(self.patch_size >= 1, f"model.patch_size is {self.patch_size}: use 1 or more")
        require(self.mlp_ratio >= 1, f"model.mlp_ratio is {self.mlp_ratio}: use 1 or more")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW or SGD with linear warm-up, then a constant or cosine learning rate down to `min_lr_ratio`."""

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 10
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr_ratio: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"optim.learning_rate is {self.learning_rate}: use more than 0")
        require(self.warmup_steps >= 0, f"optim.warmup_steps is {self.warmup_steps}: use 0 or more")
        require(self.weight_decay >= 0, f"optim.weight_decay is {self.weight_decay}: use 0 or more")
        require(self.max_grad_norm > 0, f"optim.max_grad_norm is {self.max_grad_norm}: use more than 0")
        require(0 <= self.min_lr_ratio <= 1, f"optim.min_lr_ratio is {self.min_lr_ratio}: use 0 to 1")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name} is {getattr(self, name)}: use 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Exponential moving average of the weights; early steps use min(decay, (1 + step) / (10 + step))."""

    decay: float = 0.999

    def __post_init__(self) -> None:
        require(0 <= self.decay < 1, f"ema.decay is {self.decay}: use 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Rectified flow: logit-normal timesteps, share of image tokens masked out in training, sampling.

    `time_shift` s moves timesteps towards noise, t -> s t / (1 + (s - 1) t), in training and sampling alike:
    the larger a picture, the more noise it takes to hide its layout (arXiv 2403.03206, equation 23).
    `mask_ratio` of the image tokens are left out in training up to step `unmask_at_step`, from which on all are seen
    (0: masked to the end); MaskDiT (arXiv 2306.09305) ends with such a stage.
    `guidance_scale` 1 switches classifier-free guidance off; it acts for timesteps in
    [guidance_start, guidance_end] (1 is pure noise).
    """

    logit_mean: float = 0.0
    logit_std: float = 1.0
    time_shift: float = 1.0
    mask_ratio: float = 0.0
    unmask_at_step: int = 0
    sampler: Literal["euler", "heun"] = "euler"
    sampling_steps: int = 25
    guidance_scale: float = 3.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0

    def __post_init__(self) -> None:
        require(self.logit_std > 0, f"diffusion.logit_std is {self.logit_std}: use more than 0")
        require(self.time_shift > 0, f"diffusion.time_shift is {self.time_shift}: use more than 0")
        require(0 <= self.mask_ratio < 1, f"diffusion.mask_ratio is {self.mask_ratio}: use 0 to below 1")
        require(self.unmask_at_step >= 0, f"diffusion.unmask_at_step is {self.unmask_at_step}: use 0 (never) or more")
        require(
            self.unmask_at_step == 0 or self.mask_ratio > 0,
            f"diffusion.unmask_at_step={self.unmask_at_step} ends the masking, but diffusion.mask_ratio=0 masks none: "
            "set a ratio, or leave out the step",
        )
        require(self.sampling_steps >= 1, f"diffusion.sampling_steps is {self.sampling_steps}: use 1 or more")
        require(
            0 <= self.guidance_start <= self.guidance_end <= 1,
            f"diffusion.guidance_start={self.guidance_start} and guidance_end={self.guidance_end}: "
            "use 0 <= start <= end <= 1",
        )

    def mask_ratio_at(self, step: int) -> float:
        """Share of image tokens left out in optimizer step number `step` (from 0)."""
        return 0.0 if 0 < self.unmask_at_step <= step else self.mask_ratio


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Prompts of the grid that is drawn from the EMA during training (`train.sample_every`)."""

    prompts: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training run. `init_from` names an export whose weights a new run starts from."""

    run_dir: str = "runs/debug"
    seed: int = 0
    init_from: str = ""
    train: TrainLoopConfig = field(default_factory=TrainLoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        require(bool(self.run_dir), "run_dir is empty: name the folder of the run")
        require(self.seed >= 0, f"seed is {self.seed}: use 0 or more")
        build_router(self.moe)  # refuses what the configured router cannot do
        require(
            self.moe.num_experts % self.parallel.ep_size == 0,
            f"parallel.ep_size={self.parallel.ep_size} does not divide moe.num_experts={self.moe.num_experts}: "
            "each rank of an expert group holds the same number of experts",
        )
        group, micro = self.moe.group_size if self.moe.every else 0, self.train.micro_batch_size
        require(
            group == 0 or micro % group == 0,
            f"moe.pool={self.moe.pool} and train.micro_batch_size={micro}: a pool lies within one rank's micro-batch, "
            f"so use a multiple of {group} images, or moe.pool=batch",
        )

    def global_batch_size(self, world_size: int) -> int:
        """Samples per optimizer step, over all ranks and accumulation steps."""
        return self.train.micro_batch_size * self.train.gradient_accumulation_steps * world_size


def _known_keys(cls: type) -> dict[str, Any]:
    """Nested {key: None or dict} of a dataclass tree, for the check of names."""
    return {f.name: _known_keys(f.type) if is_dataclass(f.type) else None for f in fields(cls)}  # type: ignore[arg-type]


def _check_keys(given: Any, known: dict[str, Any], path: str, origin: str) -> None:
    for key, value in given.items():
        full = f"{path}{key}"
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {path}{close[0]}?" if close else f"known keys are {', '.join(known)}"
            raise ConfigError(f"{origin}: unknown key {full}; {hint}")
        if known[key] is not None:
            require(isinstance(value, dict), f"{origin}: {full} is {value!r}: it is a section with keys of its own")
            _check_keys(value, known[key], f"{full}.", origin)


def _find_recipe(recipe: str | Path) -> Path:
    for path in (Path(recipe), CONFIG_DIR / Path(recipe).name, CONFIG_DIR / f"{recipe}.yaml"):
        if path.is_file():
            return path
    available = ", ".join(sorted(p.stem for p in CONFIG_DIR.glob("*.yaml")))
    raise ConfigError(f"no recipe {recipe}: give a YAML file or one of {available}")


def load_config(recipe: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """Read a YAML recipe (a path, or a name in trainer/configs) and apply `key=value` overrides.

    Raises ConfigError with one sentence on an unknown key, a wrong type or a value out of range.
    """
    path = _find_recipe(recipe)
    for item in overrides:
        require(bool(re.match(r"[A-Za-z_][\w.]*=", item)), f"override {item!r} is not of the form key=value")
    known = _known_keys(TrainConfig)
    try:
        from_file = OmegaConf.load(path)
        from_cli = OmegaConf.from_dotlist(list(overrides))
        for origin, layer in ((path.name, from_file), ("command line", from_cli)):
            content = OmegaConf.to_container(layer)
            require(isinstance(content, dict), f"{origin}: expected a mapping of keys to values")
            _check_keys(content, known, "", origin)
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), from_file, from_cli)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_one_sentence(error)) from error
    except ConfigError:
        raise
    except (ValueError, OSError) as error:  # also YAML syntax errors, and checks of moe.config
        raise ConfigError(str(error)) from error
    assert isinstance(config, TrainConfig)
    return config


def _one_sentence(error: OmegaConfBaseException) -> str:
    reason = str(error).splitlines()[0]
    key = getattr(error, "full_key", None)
    return f"{key}: {reason}" if key else reason


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain nested dicts, lists and scalars."""
    return asdict(config)


def config_from_dict(content: dict[str, Any]) -> TrainConfig:
    """Inverse of `config_to_dict`; raises ConfigError like `load_config`."""
    _check_keys(content, _known_keys(TrainConfig), "", "saved config")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), content))
    except OmegaConfBaseException as error:
        raise ConfigError(_one_sentence(error)) from error
    assert isinstance(config, TrainConfig)
    return config


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved configuration as YAML; `load_config` of that file gives an equal tree."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(config_to_dict(config))))


def run_cli(main: Callable[[], None], errors: TextIO | None = None) -> None:
    """Run a command-line body; a ConfigError becomes one sentence (on stderr) and exit code 2."""
    try:
        main()
    except ConfigError as error:
        print(f"error: {error}", file=errors or sys.stderr)
        raise SystemExit(2) from None
