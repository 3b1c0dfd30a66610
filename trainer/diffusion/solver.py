"""Solvers of the flow's ordinary differential equation, over any velocity function, with guidance.

Shapes: N images, C channels, H x W latent, L text tokens, D width.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from trainer.config import DiffusionConfig
from trainer.diffusion.flow import shift_time
from trainer.randomness import keyed_generator

Velocity = Callable[[Tensor, float], Tensor]


def initial_noise(seeds: list[int], shape: tuple[int, int, int]) -> Tensor:
    """One [C, H, W] noise per seed, [N, C, H, W]: picture n depends on seed n only."""
    return torch.stack([torch.randn(shape, generator=keyed_generator(seed, "sample")) for seed in seeds])


def time_grid(num_steps: int, shift: float = 1.0, kind: str = "equal") -> list[float]:
    """Times from 1 (noise) to 0 (data), `num_steps` + 1 of them; `kind` as `diffusion.time_grid` says."""
    if kind == "equal":
        return [shift_time(1 - i / num_steps, shift) for i in range(num_steps + 1)]
    last = shift_time(1 / 1000, shift)
    shares = [i / max(1, num_steps - 1) for i in range(num_steps)]
    return [*(shift_time(1 - share * (1 - last), shift) for share in shares), 0.0]


def solve_euler(x: Tensor, velocity: Velocity, times: list[float]) -> Tensor:
    """First order, one evaluation per step."""
    for now, then in pairwise(times):
        x = x + (then - now) * velocity(x, now)
    return x


def solve_heun(x: Tensor, velocity: Velocity, times: list[float]) -> Tensor:
    """Second order (trapezoid), two evaluations per step; the last step is Euler's (arXiv 2206.00364)."""
    for now, then in pairwise(times):
        first = velocity(x, now)
        if then == 0:
            return x + (then - now) * first
        second = velocity(x + (then - now) * first, then)
        x = x + (then - now) * 0.5 * (first + second)
    return x


SOLVERS = {"euler": solve_euler, "heun": solve_heun}


def guided(model: Callable[[Tensor, Tensor, slice], Tensor], config: DiffusionConfig, num_images: int) -> Velocity:
    """Classifier-free guidance (arXiv 2207.12598) in one batch: v = u + scale * (c - u).

    `model(x, t, rows)` evaluates the rows of a text batch whose first half holds the captions and whose
    second half the empty caption. Outside [guidance_start, guidance_end] only the captions are evaluated.
    """

    def velocity(x_NCHW: Tensor, t: float) -> Tensor:
        active = config.guidance_scale != 1 and config.guidance_start <= t <= config.guidance_end
        num_rows = 2 * num_images if active else num_images
        t_B = torch.full((num_rows,), t, device=x_NCHW.device)
        if not active:
            return model(x_NCHW, t_B, slice(0, num_rows))
        both = model(torch.cat([x_NCHW, x_NCHW]), t_B, slice(0, num_rows))
        captioned, empty = both.chunk(2)
        return empty + config.guidance_scale * (captioned - empty)

    return velocity


def solve(x_NCHW: Tensor, velocity: Velocity, config: DiffusionConfig) -> Tensor:
    """Noise -> latents with the configured solver and number of steps."""
    times = time_grid(config.sampling_steps, config.time_shift, config.time_grid)
    return SOLVERS[config.sampler](x_NCHW, velocity, times)
