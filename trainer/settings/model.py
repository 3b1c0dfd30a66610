"""Settings of what is learned: the transformer, the flow from noise to data, and how pictures are drawn from it."""

import unicodedata
from dataclasses import dataclass, field
from typing import Literal

from moe.ranges import at_least, between, check_ranges, from_to_below, more_than
from trainer.errors import ConfigError, require


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Size and variants of the diffusion transformer.

    An attention head has `dim / num_heads` values, which 2-D rotary positions need to be a multiple of 4.
    """

    dim: int = field(default=64, metadata=at_least(1))
    """Width: values of a token between blocks; 1 or more, a multiple of 4 x `num_heads`."""
    num_layers: int = field(default=4, metadata=at_least(1))
    """Transformer blocks; 1 or more. `moe.every` says which of them have experts."""
    num_heads: int = field(default=4, metadata=at_least(1))
    """Attention heads of queries; 1 or more, divides `dim`."""
    num_kv_heads: int = field(default=2, metadata=at_least(1))
    """Heads of keys and values, each shared by equally many query heads; 1 or more, divides `num_heads`."""
    patch_size: int = field(default=2, metadata=at_least(1))
    """Side in latent pixels of the square that becomes a token; 1 or more, divides the latent's height and width."""
    mlp_ratio: int = field(default=4, metadata=at_least(1))
    """Hidden width of the MLP, and of each expert alike, as a multiple of `dim`; 1 or more."""
    pooled_text: bool = False
    """Add the mean text token to the timestep embedding, as SD3 does; the EC-DIT paper does not say what it does."""
    prediction: Literal["velocity", "data"] = "velocity"
    """What the network puts out: the velocity, or the clean latent, from which the velocity follows; the latter is
    better where a patch has nearly as many values as the width (pixels; arXiv 2511.13720)."""

    def __post_init__(self) -> None:
        check_ranges(self, "model.", ConfigError)
        require(
            self.dim % self.num_heads == 0, f"model.num_heads={self.num_heads} does not divide model.dim={self.dim}"
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}",
        )
        require(
            (self.dim // self.num_heads) % 4 == 0,
            f"model.dim={self.dim} / model.num_heads={self.num_heads} gives a head of "
            f"{self.dim // self.num_heads} values: 2-D RoPE needs a multiple of 4",
        )


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Rectified flow: timesteps and masking in training, solver and guidance in sampling.

    Time is 0 at the clean latent and 1 at pure noise. In training it is logit-normal: the sigmoid of a normal number.
    """

    logit_mean: float = field(default=0.0, metadata=between(-10, 10))
    """Mean of the normal number behind a training timestep; above 0 favours noise."""
    logit_std: float = field(default=1.0, metadata=more_than(0, 10))
    """Standard deviation of that number; more than 0."""
    time_shift: float = field(default=1.0, metadata=more_than(0, 1000))
    """Moves timesteps t towards noise, to s t / (1 + (s - 1) t), in training and sampling alike; more than 0, 1 is off.
    The larger a picture, the more noise it takes to hide its layout (arXiv 2403.03206, equation 23)."""
    mask_ratio: float = field(default=0.0, metadata=from_to_below(0, 1))
    """Share of the image tokens left out in each training pass (MaskDiT, arXiv 2306.09305); 0 (off) to below 1."""
    unmask_at_step: int = field(default=0, metadata=at_least(0))
    """Step from which on all tokens are seen, the last stage of MaskDiT; 0 (masked to the end) or more."""
    sampler: Literal["euler", "heun"] = "euler"
    """Solver: first order, or second order with two evaluations of the model per step (arXiv 2206.00364)."""
    sampling_steps: int = field(default=25, metadata=at_least(1))
    """Solver steps from noise to picture; 1 or more."""
    time_grid: Literal["equal", "diffusers"] = "equal"
    """Times of the steps: n equal steps from 1 to 0, shifted once, so that the last step begins at 1 / n (`equal`); or
    those of diffusers' FlowMatchEulerDiscreteScheduler, n - 1 equal steps from 1 to 1 / 1000, which is shifted itself,
    shifted again, and one to 0 (`diffusers`)."""
    guidance_scale: float = field(default=3.0, metadata=between(0, 1000))
    """Classifier-free guidance (arXiv 2207.12598): 1 is off, more follows the caption closer, 0 ignores it. Where
    it acts, an evaluation of the model costs twice."""
    guidance_start: float = field(default=0.0, metadata=between(0, 1))
    """Lowest time at which guidance acts; 0 to `guidance_end`."""
    guidance_end: float = field(default=1.0, metadata=between(0, 1))
    """Highest time at which guidance acts; `guidance_start` to 1."""

    def __post_init__(self) -> None:
        check_ranges(self, "diffusion.", ConfigError)
        require(
            self.unmask_at_step == 0 or self.mask_ratio > 0,
            f"diffusion.unmask_at_step={self.unmask_at_step} ends the masking, but diffusion.mask_ratio=0 masks none: "
            "set a ratio, or leave out the step",
        )
        require(
            self.guidance_start <= self.guidance_end,
            f"diffusion.guidance_start={self.guidance_start} and guidance_end={self.guidance_end}: "
            "use 0 <= start <= end <= 1",
        )

    def mask_ratio_at(self, step: int) -> float:
        """Share of image tokens left out in optimizer step number `step` (from 0)."""
        return 0.0 if 0 < self.unmask_at_step <= step else self.mask_ratio


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The picture grid that is drawn from the EMA during training."""

    prompts: list[str] = field(default_factory=list)
    """Captions of the grid, one picture each; at least one where `train.sample_every` is on."""

    def __post_init__(self) -> None:
        for prompt in self.prompts:
            check_prompt(prompt, "sample.prompts")


def check_prompt(prompt: str, setting: str) -> None:
    """ConfigError for a caption without anything to see, or that no encoder can read."""
    require(
        any(unicodedata.category(letter)[0] not in "ZC" for letter in prompt),  # neither blank nor control or format
        f"{setting} has {prompt!a}, which shows no letter: say what to draw, or leave it out",
    )
    require(
        not any("\ud800" <= letter <= "\udfff" for letter in prompt),
        f"{setting} has {prompt!a}, which is not Unicode text (an unpaired surrogate): write it in UTF-8",
    )
