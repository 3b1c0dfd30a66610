"""Rectified flow and its samplers against closed forms; keyed randomness."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from benchmarks.plain_model import plain_noise
from moe.routing import Routed
from trainer.config import DiffusionConfig, OptimConfig
from trainer.data.latents.packed_text import pack_text
from trainer.data.latents.samples import Batch
from trainer.diffusion.flow import interpolate, noise_batch, shift_time, training_loss
from trainer.diffusion.layers import patchify
from trainer.diffusion.model import ModelShape
from trainer.diffusion.sampling import draw
from trainer.diffusion.solver import guided, initial_noise, solve, solve_euler, solve_heun, time_grid
from trainer.engine.optim import learning_rate
from trainer.settings.tokens import num_kept_tokens

CONFIG = DiffusionConfig()


def batch(indices: list[int]) -> Batch:
    latents = torch.stack([torch.full((3, 8, 8), float(i)) for i in indices])
    text = pack_text([torch.zeros(2, 4)] * len(indices), 2)
    return Batch(latent_BCHW=latents, text=text, index_B=torch.tensor(indices))


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_noise_of_a_sample_depends_on_its_index_only(mask_ratio: float) -> None:
    config = replace(CONFIG, mask_ratio=mask_ratio)
    together = noise_batch(batch([3, 4, 5, 6]), config, seed=1, patch_size=2)
    apart = [noise_batch(batch(part), config, seed=1, patch_size=2) for part in ([3, 4], [5, 6])]
    for name in ("x_BCHW", "t_B", "target_BCHW", "keep_BS"):
        value = getattr(together, name)
        if value is not None:
            assert torch.equal(value, torch.cat([getattr(part, name) for part in apart])), name
    other = noise_batch(batch([3, 4, 5, 6]), config, seed=2, patch_size=2)
    assert not torch.equal(other.t_B, together.t_B)


def test_path_runs_from_data_to_noise() -> None:
    x0, x1 = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(interpolate(x0, x1, torch.zeros(2)), x0)
    assert torch.equal(interpolate(x0, x1, torch.ones(2)), x1)
    noised = noise_batch(batch([7]), CONFIG, seed=0, patch_size=2)
    x1 = noised.target_BCHW + 7.0
    torch.testing.assert_close(noised.x_BCHW, (1 - noised.t_B) * 7.0 + noised.t_B * x1)


def test_timesteps_are_logit_normal() -> None:
    config = replace(CONFIG, logit_mean=0.3, logit_std=0.7)
    t = noise_batch(batch(list(range(2000))), config, seed=0, patch_size=8).t_B
    logit = torch.logit(t)
    assert float(logit.mean()) == pytest.approx(0.3, abs=0.05)
    assert float(logit.std()) == pytest.approx(0.7, abs=0.05)


def test_time_shift_adds_to_the_logit() -> None:
    t = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(torch.logit(shift_time(t, 3.0)), torch.logit(t) + math.log(3.0))
    assert time_grid(4, 3.0)[0] == 1 and time_grid(4, 3.0)[-1] == 0


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (2, 3.0), (25, 1.0), (25, 3.0), (28, 0.5)])
def test_the_grid_of_diffusers_is_theirs(steps: int, shift: float) -> None:
    theirs = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps)
    assert time_grid(steps, shift, "diffusers") == pytest.approx(theirs.sigmas.tolist(), abs=1e-6)
    assert time_grid(steps, shift)[-2] == pytest.approx(float(shift_time(1 / steps, shift)))


def test_the_time_grid_setting_reaches_the_solver() -> None:
    seen: list[float] = []

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        seen.append(t)
        return x

    config = replace(CONFIG, sampling_steps=4, time_shift=2.0, time_grid="diffusers")
    solve(torch.ones(1), velocity, config)
    assert seen == time_grid(4, 2.0, "diffusers")[:-1] and seen[-1] < 0.01


def test_loss_covers_the_kept_tokens_only() -> None:
    config = replace(CONFIG, mask_ratio=0.5)
    noised = noise_batch(batch([1, 2]), config, seed=0, patch_size=2)
    assert noised.keep_BS is not None and noised.keep_BS.shape == (2, 8)
    target = patchify(noised.target_BCHW, 2)
    kept = torch.stack([target[b, noised.keep_BS[b]] for b in range(2)])
    assert float(training_loss(kept, noised, 2)) == 0
    assert float(training_loss(kept + 2, noised, 2)) == pytest.approx(4)
    assert num_kept_tokens(256, 0.5) == 128 and num_kept_tokens(4, 0.99) == 1


@pytest.mark.parametrize("solver,order", [(solve_euler, 1), (solve_heun, 2)])
def test_solvers_converge_at_their_order(solver: object, order: int) -> None:
    """dx/dt = a x from t = 1 to 0 has the solution x(0) = x(1) exp(-a)."""
    errors = []
    for steps in (8, 16, 32):
        x = solver(torch.ones(1, dtype=torch.double), lambda x, t: 1.5 * x, time_grid(steps))  # type: ignore[operator]
        errors.append(abs(float(x) - math.exp(-1.5)))
    # Heun's last step is Euler's: its local error h^2 keeps the order at 2.
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.35)


def test_straight_paths_are_solved_exactly_in_one_step() -> None:
    x1, x0 = torch.randn(4), torch.randn(4)
    torch.testing.assert_close(solve_euler(x1, lambda x, t: x1 - x0, time_grid(1)), x0)


def test_guidance_formula_and_interval() -> None:
    calls = []

    def model(x: torch.Tensor, t_B: torch.Tensor, rows: slice) -> torch.Tensor:
        calls.append(rows.stop)
        value = torch.tensor([1.0] * 2 + [0.25] * 2)[rows]
        return value.view(-1, 1, 1, 1).expand(-1, 3, 2, 2)

    config = replace(CONFIG, guidance_scale=3.0, guidance_start=0.2, guidance_end=0.8)
    velocity = guided(model, config, 2)
    x = torch.zeros(2, 3, 2, 2)
    torch.testing.assert_close(velocity(x, 0.5), torch.full_like(x, 0.25 + 3 * 0.75))
    for t in (0.9, 0.1):  # outside the interval
        torch.testing.assert_close(velocity(x, t), torch.ones_like(x))
    assert calls == [4, 2, 2]


def test_picture_noise_depends_on_its_seed_only() -> None:
    assert torch.equal(initial_noise([5, 6], (3, 4, 4))[1:], initial_noise([6], (3, 4, 4)))


def test_learning_rate_schedule() -> None:
    config = OptimConfig(learning_rate=2.0, warmup_steps=4, schedule="cosine", min_lr_ratio=0.1)
    assert [learning_rate(s, config, 20) for s in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert learning_rate(12, config, 20) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate(20, config, 20) == pytest.approx(0.2)
    constant = replace(config, schedule="constant")
    assert learning_rate(19, constant, 20) == 2.0


def test_masking_ends_at_its_step_and_changes_nothing_else() -> None:
    config = DiffusionConfig(mask_ratio=0.5, unmask_at_step=3)
    assert [config.mask_ratio_at(step) for step in (0, 2, 3, 9)] == [0.5, 0.5, 0.0, 0.0]
    masked, whole = (noise_batch(batch([1, 2]), config, seed=0, patch_size=2, step=step) for step in (2, 3))
    assert masked.keep_BS is not None and whole.keep_BS is None
    assert torch.equal(masked.x_BCHW, whole.x_BCHW) and torch.equal(masked.t_B, whole.t_B)
    assert DiffusionConfig(mask_ratio=0.5).mask_ratio_at(10**6) == 0.5


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_noise_and_times_of_training_are_those_of_the_formula(shift: float) -> None:
    """Each sample by itself: its own generator, a normal logit moved by log(shift), a straight path to the noise."""
    config = replace(CONFIG, logit_mean=0.2, logit_std=1.3, time_shift=shift)
    noised = noise_batch(batch([3, 8, 11]), config, seed=5, patch_size=2)
    for row, index in enumerate((3, 8, 11)):
        noise, t = plain_noise(5, index, (3, 8, 8), config)
        assert float(noised.t_B[row]) == pytest.approx(float(t), rel=1e-5)
        torch.testing.assert_close(noised.x_BCHW[row], (1 - t) * index + t * noise, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(noised.target_BCHW[row], noise - index)


def test_shifted_times_of_training_have_their_quantiles() -> None:
    """Half of the times lie below the shifted median: of a logit around 0 it is shift / (1 + shift)."""
    config = replace(CONFIG, time_shift=3.0)
    t = noise_batch(batch(list(range(2000))), config, seed=0, patch_size=8).t_B
    assert float((t < 0.75).float().mean()) == pytest.approx(0.5, abs=0.04)


SHIFTED = {"euler": [1.0, 0.9, 0.75, 0.5], "heun": [1.0, 0.9, 0.9, 0.75, 0.75, 0.5, 0.5]}  # 3 t / (1 + 2 t)


@pytest.mark.parametrize("sampler", SHIFTED)
def test_sampling_asks_at_shifted_times_and_moves_by_their_distances(sampler: str) -> None:
    config = replace(CONFIG, sampler=sampler, sampling_steps=4, time_shift=3.0, guidance_scale=1.0)
    times = []

    def forward(x: torch.Tensor, t_B: torch.Tensor, rows: slice) -> tuple[torch.Tensor, list[Routed]]:
        times.append(t_B.tolist())
        return (t_B**2).view(-1, 1, 1, 1).expand_as(x), []

    shape = ModelShape(channels=3, height=4, width=4, text_dim=2)
    found = draw(forward, [7, 9], shape, config, torch.device("cpu"))
    assert [pytest.approx([t, t], abs=1e-6) for t in SHIFTED[sampler]] == times
    grid, moved = [1.0, 0.9, 0.75, 0.5, 0.0], 0.0
    for now, then in pairwise(grid):
        slope = now**2 if sampler == "euler" or then == 0 else (now**2 + then**2) / 2
        moved += (then - now) * slope
    torch.testing.assert_close(found, initial_noise([7, 9], (3, 4, 4)) + moved, rtol=1e-5, atol=1e-5)
