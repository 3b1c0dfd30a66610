"""What each step of a run is given, and what it leaves; `tests/test_trainer.py` starts these on one and two processes.

torchrun --nproc-per-node 2 tests/trainer_checks.py FOLDER the_average_is_a_plain_lerp_of_whole_weights ...

Seen from outside through a whole `Trainer`: at torch's optimizer, at the experts' door, in the files.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from math import cos, nan, pi
from pathlib import Path
from typing import Any

import torch
from loop_checks import build, doctored, lines
from named_checks import run_named
from torch import Tensor

from benchmarks.parity import SHAPE, parity_config, random_value
from benchmarks.whole_weights import gather_master
from moe.config import MoeConfig
from moe.layer import MoeLayer
from trainer.config import load_config
from trainer.data.dataset import open_dataset
from trainer.data.position import DataState
from trainer.diffusion.model import EcDit
from trainer.distributed import World, gather
from trainer.engine.deepspeed_config import load_deepspeed_config
from trainer.engine.engine import build_engine
from trainer.loop.loop import Trainer
from trainer.loop.start_checks import check_start
from trainer.loop.step import next_step, noised_batches, train_step
from trainer.telemetry.step_timer import StepTimer

SMALL = [
    "train.gradient_accumulation_steps=2", "train.checkpoint_every=0", "train.max_steps=6", "moe.num_experts=4",
    "model.dim=16", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "data.image_size=16",
]  # fmt: skip
GLOBAL_MICRO_BATCH = 4
CPU = torch.device("cpu")


def started(world: World, run_dir: Path, *overrides: str, bad_batch: int | None = None) -> Trainer:
    """A trainer with experts on all processes; goes on where the folder has a checkpoint.

    Global batch number `bad_batch` has a value that is not finite, so that its step is skipped.
    """
    of_world = [f"parallel.ep_size={world.size}", f"train.micro_batch_size={GLOBAL_MICRO_BATCH // world.size}"]
    plan = check_start(load_config("debug", [*SMALL, *of_world, f"run_dir={run_dir}", *overrides]), world)
    return build(plan if bad_batch is None else doctored(plan, {(bad_batch, 0): nan}))


def finish(trainer: Trainer) -> None:
    trainer.run()
    trainer.reporter.close()
    trainer.engine.destroy()
    torch.distributed.barrier()


def after_each_step(trainer: Trainer, action: Callable[[], None]) -> None:
    """Let all ranks do something together when an applied step has been counted."""
    counted = trainer.reporter.advance

    def advance() -> None:
        counted()
        action()

    trainer.reporter.advance = advance  # type: ignore[method-assign]


def the_average_is_a_plain_lerp_of_whole_weights(world: World, folder: Path) -> None:
    """After n steps it keeps min(decay, (1 + n) / (10 + n)) of itself; both sides of the minimum, and over a resume."""
    kept = [2 / 11, 3 / 12, 4 / 13, 0.33, 0.33, 0.33]
    expected: dict[str, Tensor] = {}
    for stop_at in (4, 6):
        trainer = started(world, folder / "average", "ema.decay=0.33", f"train.stop_at_step={stop_at}")
        weights: list[dict[str, Tensor]] = []
        after_each_step(trainer, lambda t=trainer, w=weights: w.append(gather_master(t.engine)))  # type: ignore[misc]
        expected = expected or gather_master(trainer.engine)
        first = trainer.state.step
        trainer.run()
        assert len(weights) == stop_at - first
        for share, of_step in zip(kept[first:], weights, strict=False):
            expected = {name: share * value + (1 - share) * of_step[name] for name, value in expected.items()}
        with trainer.ema.swapped(trainer.engine):
            average = gather_master(trainer.engine)
        for name, value in expected.items():
            torch.testing.assert_close(average[name], value, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
        trainer.reporter.close()
        trainer.engine.destroy()
        torch.distributed.barrier()


class Given:
    """What the steps of a trainer were given: {step: values}, steps from 0."""

    def __init__(self) -> None:
        self.rates: dict[int, set[float]] = {}
        self.tokens: dict[int, set[int]] = {}
        self.capacities: dict[int, set[int]] = {}

    def watch(self, trainer: Trainer, ep_size: int) -> None:
        """Learning rates where torch's optimizer steps, tokens of an image, rows that an expert takes of each."""
        batch = trainer.config.train.micro_batch_size

        def stepping(optimizer: torch.optim.Optimizer, *_: object) -> None:
            self.rates.setdefault(trainer.state.step, set()).update(g["lr"] for g in optimizer.param_groups)

        def entering(_: object, inputs: tuple[Any, ...]) -> None:
            self.tokens.setdefault(trainer.state.step, set()).add(inputs[0].shape[1])

        def computing(_: object, inputs: tuple[Any, ...]) -> None:
            self.capacities.setdefault(trainer.state.step, set()).add(inputs[0].shape[1] // (batch * ep_size))

        trainer.engine.optimizer.optimizer.register_step_pre_hook(stepping)
        trainer.engine.module.blocks[0].register_forward_pre_hook(entering)
        trainer.engine.module.blocks[1].mlp.experts.register_forward_pre_hook(computing)


def every_step_has_its_rate_capacity_and_mask(world: World, folder: Path) -> None:
    """Warm-up of two steps and half a cosine to a tenth; factor 4 to 2 in four steps; half masked in the first three.

    Also over two resumes, and with step 2 skipped once, just before the masks end. 16 x 16 pixels are 64 tokens. With
    the skipped one, eight batches of eight are an epoch of the 64 samples.
    """
    given, rates = Given(), [0.005, 0.01, *(0.01 * (0.1 + 0.9 * cos(pi / 2 * n / 6) ** 2) for n in range(6))]
    for stop_at in (2, 4, 8):
        trainer = started(
            world, folder / "schedules", f"train.stop_at_step={stop_at}", "optim.learning_rate=0.01",
            "optim.warmup_steps=2", "optim.schedule=cosine", "optim.min_lr_ratio=0.1", "moe.capacity_factor_start=4",
            "moe.capacity_anneal_steps=4", "diffusion.mask_ratio=0.5", "diffusion.unmask_at_step=3",
            "train.max_steps=8", bad_batch=2,
        )  # fmt: skip
        given.watch(trainer, world.size)
        finish(trainer)
    tokens, capacities = [32, 32, 32, 64, 64, 64, 64, 64], [32 * 4 // 4, 28, 32 * 3 // 4, 40, 32, 32, 32, 64 * 2 // 4]
    assert given.tokens == {step: {value} for step, value in enumerate(tokens)}, given.tokens
    assert given.capacities == {step: {value} for step, value in enumerate(capacities)}, given.capacities
    assert list(given.rates) == list(range(8)) and all(len(found) == 1 for found in given.rates.values()), given.rates
    logged = lines(folder / "schedules", "metrics.jsonl")
    for key, values in (
        ("step", [1, 2, 3, 4, 5, 6, 7, 8]), ("epoch", [0] * 7 + [1]), ("bad_steps", [0, 0, 1, 1, 1, 1, 1, 1])
    ):  # fmt: skip
        assert [m[key] for m in logged] == values, (key, logged)
    for n, rate in enumerate(rates):
        (applied,), shown = given.rates[n], logged[n]["learning_rate"]
        assert abs(applied - rate) < 1e-12 and abs(shown - rate) < 1e-12, (n, applied, shown, rate)


def a_report_is_the_mean_of_its_steps_over_any_number_of_stops(world: World, folder: Path) -> None:
    """Reports every third step, of runs stopped in the middle, at the end and at the begin of an interval.

    Also where the interval changes between two starts: a report has all steps since the last one, however many.
    """
    finish(started(world, folder / "each"))
    each = [m["loss"] for m in lines(folder / "each", "metrics.jsonl")]
    cases = {
        "third": ([(3, 2), (3, 3), (3, 6)], [(0, 3), (3, 6)]),
        "shorter": ([(3, 4), (2, 6)], [(0, 3), (3, 6)]),
        "longer": ([(2, 4), (3, 6)], [(0, 2), (2, 4), (4, 6)]),
    }
    for name, (starts, intervals) in cases.items():
        for every, stop_at in starts:
            finish(started(world, folder / name, f"train.log_every={every}", f"train.stop_at_step={stop_at}"))
        reports = lines(folder / name, "metrics.jsonl")
        assert [m["step"] for m in reports] == [end for _, end in intervals], reports
        for m, (begin, end) in zip(reports, intervals, strict=True):
            mean = sum(each[begin:end]) / (end - begin)
            assert abs(m["loss"] - mean) < 1e-6 * mean, (name, m, each)


def balance_by_hand(model: EcDit) -> list[Tensor]:
    """Filled by each forward pass: per MoE layer, E times the sum of (share of first choices) x (mean probability)."""
    found: list[Tensor] = []

    def read(_: object, __: object, logits_BSE: Tensor) -> None:
        of_images = []
        for logits_SE in logits_BSE:
            probability, first = logits_SE.softmax(1), logits_SE.argmax(1)
            shares = [float((first == e).sum()) / len(first) for e in range(logits_SE.shape[1])]
            of_images.append(sum(len(shares) * share * probability[:, e].mean() for e, share in enumerate(shares)))
        found.append(torch.stack(of_images).mean())

    for module in model.modules():
        if isinstance(module, MoeLayer):
            module.router.register_forward_hook(read)
    return found


def a_routers_loss_is_learned_and_not_reported(world: World, folder: Path) -> None:
    """One step of gradient descent: weights move by the gradient of error + 0.5 x balance, the error is reported."""
    config = parity_config("sgd", world.size, world.size)
    config = replace(
        config,
        moe=MoeConfig(num_experts=4, router="token_choice", auxiliary_weight=0.5),
        optim=replace(config.optim, max_grad_norm=1e9, weight_decay=0),
    )
    engine = build_engine(config, load_deepspeed_config(config, world.size), SHAPE, CPU, random_value)
    before = gather_master(engine)
    start = DataState(seed=config.seed, epoch=0, consumed=0, samples_seen=0)
    batches = next_step(
        noised_batches(open_dataset(config), config, rank=world.rank, world_size=world.size, state=start), config, 0
    )
    size = config.model.patch_size
    result = train_step(engine, batches, 1.0, CPU, StepTimer(CPU), patch_size=size, statistics=False)
    moved = {name: before[name] - value for name, value in gather_master(engine).items()}
    model = EcDit(config.model, config.moe, SHAPE)
    model.load_state_dict(before)
    balance, errors = balance_by_hand(model), []
    for batch in (batch for rank in gather(batches) for batch in rank):
        prediction, _ = model(batch.x_BCHW, batch.t_B, batch.text_BLD, batch.text_mask_BL)
        errors.append(((prediction - batch.target_BCHW) ** 2).mean())
    assert len(balance) == 2 * len(errors), "two layers have experts"
    (torch.stack(errors).mean() + 0.5 * torch.stack(balance).sum() / len(errors)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(moved[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    mine = torch.stack(errors)[world.rank * len(batches) :][: len(batches)]
    torch.testing.assert_close(result.losses, mine.detach(), rtol=1e-5, atol=0)
    engine.destroy()


if __name__ == "__main__":
    run_named(sys.argv[2:], lambda world, name: globals()[name](world, Path(sys.argv[1])))
