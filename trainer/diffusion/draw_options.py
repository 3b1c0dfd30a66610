"""How pictures are drawn where it is to differ from the run's own settings.

Sizes of pictures are those that the model was trained on: the data's buckets.
"""

from dataclasses import dataclass, replace
from typing import Any

from trainer.config import DiffusionConfig, require
from trainer.data.latents.samples import LatentInfo
from trainer.diffusion.solver import SOLVERS
from trainer.settings.model import check_prompt


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """What is None stays as the run has it (`diffusion.*`, its first bucket)."""

    steps: int | None = None
    """Solver steps from noise to picture; 1 or more."""
    guidance: float | None = None
    """Scale of classifier-free guidance; 1 is off, 0 or more."""
    solver: str | None = None
    """euler or heun, which takes two evaluations a step."""
    negative_prompt: str = ""
    """What guidance leads away from; empty: from pictures of no caption."""
    height: int | None = None
    """Pixels; with `width` one of the trained sizes, or alone where only one of them has it."""
    width: int | None = None
    """Pixels."""

    def __post_init__(self) -> None:
        require(self.steps is None or 1 <= self.steps <= 10_000, f"steps is {self.steps}: use 1 to 10000")
        require(self.guidance is None or 0 <= self.guidance <= 1000, f"guidance is {self.guidance}: use 0 to 1000")
        known = self.solver is None or self.solver in SOLVERS
        require(known, f"solver is {self.solver}: choose from {', '.join(SOLVERS)}")
        if self.negative_prompt:
            check_prompt(self.negative_prompt, "the negative prompt")

    def diffusion(self, config: DiffusionConfig) -> DiffusionConfig:
        """The run's settings with these in place of them; ConfigError for a negative prompt that would do nothing."""
        given: dict[str, Any] = {"sampling_steps": self.steps, "guidance_scale": self.guidance, "sampler": self.solver}
        found = replace(config, **{name: value for name, value in given.items() if value is not None})
        scale = found.guidance_scale
        require(
            not self.negative_prompt or scale != 1,
            f"the negative prompt does nothing without guidance, and guidance is {scale:g}: use more than 1",
        )
        return found

    def latent_size(self, info: LatentInfo, factor: int) -> tuple[int, int]:
        """Height and width of the latent; ConfigError, naming the trained sizes, if the pixels are none of them."""
        trained = [(h, w) for h, w in info.buckets] or [(info.height, info.width)]
        if self.height is None and self.width is None:
            return trained[0]
        fits = [(h, w) for h, w in trained if self.height in (None, h * factor) and self.width in (None, w * factor)]
        asked = f"height {self.height or 'any'} and width {self.width or 'any'}"
        sizes = ", ".join(f"{h * factor}x{w * factor}" for h, w in trained)
        words = "is none of the sizes" if not fits else "is more than one of the sizes"
        require(len(fits) == 1, f"{asked} {words} (height x width) that this model was trained on: choose from {sizes}")
        return fits[0]


def settings_of(options: DrawOptions, config: DiffusionConfig, size: tuple[int, int]) -> dict[str, Any]:
    """How a picture of `size` pixels is drawn, all settings resolved, for its metadata."""
    found = options.diffusion(config)
    return {
        "negative_prompt": options.negative_prompt,
        "solver": found.sampler,
        "steps": found.sampling_steps,
        "time_grid": found.time_grid,
        "time_shift": found.time_shift,
        "guidance": found.guidance_scale,
        "guidance_interval": [found.guidance_start, found.guidance_end],
        "height": size[0],
        "width": size[1],
    }
