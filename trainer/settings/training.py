"""Settings of the run itself: loop, processes, optimizer and the average of the weights."""

from dataclasses import dataclass, field
from typing import Literal

from moe.ranges import at_least, between, check_ranges, from_to_below, more_than
from trainer.errors import ConfigError, require


@dataclass(frozen=True, kw_only=True)
class TrainLoopConfig:
    """Batch, length, cadence and precision of the training loop.

    The global batch is `micro_batch_size * gradient_accumulation_steps * processes`. Steps are optimizer steps, counted
    from the run's start through every resume.
    """

    micro_batch_size: int = field(default=8, metadata=at_least(1))
    """Images in one forward and backward pass of a process; 1 or more."""
    gradient_accumulation_steps: int = field(default=1, metadata=at_least(1))
    """Passes whose gradients are averaged for one optimizer step; 1 or more."""
    max_steps: int = field(default=20, metadata=at_least(1))
    """Optimizer steps of the whole run, which the learning-rate schedule spans; 1 or more."""
    stop_at_step: int | None = field(default=None, metadata=at_least(1))
    """End at this step with a checkpoint, the schedule unchanged: 1 to `max_steps`; null runs to `max_steps`."""
    log_every: int = field(default=1, metadata=at_least(1))
    """Steps between two lines of metrics (file, log, TensorBoard); the loss is their mean; 1 or more."""
    checkpoint_every: int = field(default=10, metadata=at_least(0))
    """Steps between two checkpoints; 0 or more, 0 is off. A run that ends or is stopped always writes one."""
    keep_last: int = field(default=3, metadata=at_least(1))
    """Newest checkpoints that are kept when one is written and when a run resumes; 1 or more."""
    keep_every: int = field(default=0, metadata=at_least(0))
    """Checkpoints of steps that are a multiple of this are never deleted; 0 or more, 0 makes no exception."""
    on_save_error: Literal["abort", "continue"] = "abort"
    """When a checkpoint cannot be written (a full disk): end the run, or go on without it. The last must succeed."""
    async_save: bool = False
    """Write checkpoints while training goes on; needs host memory for a copy of each process's state."""
    sample_every: int = field(default=0, metadata=at_least(0))
    """Steps between two picture grids of `sample.prompts`, also drawn after the last; 0 or more, 0 is off."""
    profile_every: int = field(default=0, metadata=at_least(0))
    """Steps between two that are timed section by section for the metrics, and slower for it; 0 or more, 0 is off."""
    wandb: str = ""
    """Project on Weights & Biases, or ENTITY/PROJECT, to log to as well; empty is none. Needs the package wandb."""
    mlflow: str = ""
    """MLflow's tracking server (URI) or a folder, to log to as well; empty is none. Needs the package mlflow-skinny."""
    max_bad_steps: int = field(default=3, metadata=at_least(1))
    """Steps in a row skipped because loss or gradient norm is not finite, at which the run goes back to its newest
    checkpoint, and on with the samples after the bad ones; 1 or more."""
    max_rollbacks: int = field(default=2, metadata=at_least(0))
    """How often a run may go back to the same checkpoint before it ends with an error; 0 (never) or more."""
    emergency_save_seconds: float = field(default=600.0, metadata=more_than(0, 1_000_000))
    """Seconds that each attempt to save may take after an error between two steps, or the process ends; more than 0."""
    hang_seconds: float = field(default=60.0, metadata=at_least(0))
    """Seconds without progress within a step, at least, after which the process that is behind is named and the run
    ends: 2.5 times the slowest step if that is more, and longer in start-up, saves and samples. 1 or more; 0 is off."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Numbers that the model computes in, also when sampling; the optimizer's copy of the weights stays fp32."""
    deterministic: bool = True
    """Sum in a fixed order on a GPU, so that a resumed run repeats an unbroken one bitwise; a CPU always does."""
    compile: bool | None = None
    """Compile the blocks: a minute or two at each start and for each new shape, then fewer passes over memory and a
    third of the host's work (trainer/diffusion/compiled.py). Null: on a GPU yes, on a CPU no."""
    activation_checkpointing: bool = False
    """Keep only the inputs of each block for the backward pass and compute the rest again: less memory, more time."""

    def __post_init__(self) -> None:
        check_ranges(self, "train.", ConfigError)
        require(
            (self.stop_at_step or 1) <= self.max_steps,
            f"train.stop_at_step is {self.stop_at_step}: use 1 to train.max_steps={self.max_steps}",
        )
        require(
            self.hang_seconds == 0 or self.hang_seconds >= 1,
            f"train.hang_seconds is {self.hang_seconds}: use 1 or more, or 0 (off)",
        )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes share model, experts and optimizer state."""

    ep_size: int = field(default=1, metadata=at_least(1))
    """Processes that share the experts of a layer; 1 or more, divides `moe.num_experts` and the number of processes."""
    exchange_chunks: int = field(default=1, metadata=between(1, 8))
    """Parts in which the rows of each expert travel, so that experts compute with one part while the next is under way;
    1 (nothing beside them but a shared expert) to 8. Without expert parallelism nothing travels. Results differ by the
    rounding of the experts' weight gradients, which are summed over the parts."""
    elastic: bool = False
    """Fit `ep_size` to the processes of each start, and micro-batch and accumulation so that a resumed run keeps its
    global batch (trainer/engine/elastic.py has the rule). Off, a start that does not fit is refused."""
    deepspeed_config: str = "ds_configs/zero3.json"
    """Native DeepSpeed JSON file, in the working folder or the repository; ds_configs/README.md compares those here."""

    def __post_init__(self) -> None:
        check_ranges(self, "parallel.", ConfigError)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its learning rate by step, and gradient clipping.

    The rate rises linearly to `learning_rate`, then stays or falls by half a cosine to its `min_lr_ratio` share.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or gradient descent without momentum."""
    learning_rate: float = field(default=1e-3, metadata=more_than(0, 1000))
    """Peak learning rate, that of the last warm-up step; more than 0."""
    beta1: float = field(default=0.9, metadata=from_to_below(0, 1))
    """Decay per step of AdamW's mean of gradients; 0 to below 1. SGD ignores it."""
    beta2: float = field(default=0.99, metadata=from_to_below(0, 1))
    """Decay per step of AdamW's mean of squared gradients; 0 to below 1. SGD ignores it."""
    eps: float = field(default=1e-8, metadata=between(1e-30, 1))
    """Added to the root of AdamW's mean of squared gradients, which it is divided by; more than 0. SGD ignores it."""
    weight_decay: float = field(default=0.01, metadata=between(0, 1000))
    """Share of each weight subtracted per step, times the rate; 0 or more. Matrices only, no norms and no biases."""
    warmup_steps: int = field(default=10, metadata=at_least(0))
    """Steps in which the rate rises from `learning_rate / warmup_steps` to `learning_rate`; 0 (none) or more."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: keep the rate, or let it fall by half a cosine until `train.max_steps`."""
    min_lr_ratio: float = field(default=0.0, metadata=between(0, 1))
    """Share of `learning_rate` that a cosine ends at; 0 to 1."""
    router_lr_ratio: float = field(default=1.0, metadata=more_than(0, 1000))
    """Learning rate of the routers' matrices as a share of what all others have at that step; more than 0. Below 1, an
    expert gets tokens of the same kind for longer (docs/expert-choice.md)."""
    max_grad_norm: float = field(default=1.0, metadata=more_than(0))
    """Gradients are scaled down to this global L2 norm where theirs is larger; more than 0."""

    def __post_init__(self) -> None:
        check_ranges(self, "optim.", ConfigError)


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Exponential moving average (EMA) of the weights, with which pictures are drawn and scored."""

    decay: float = field(default=0.999, metadata=from_to_below(0, 1))
    """Share of the average kept per step; 0 to below 1. Step n keeps at most (1 + n) / (10 + n), to start fast."""

    def __post_init__(self) -> None:
        check_ranges(self, "ema.", ConfigError)
