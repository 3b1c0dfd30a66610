"""Checks of the training loop that need several real processes; `tests/test_loop.py` starts them.

torchrun --nproc-per-node 2 tests/loop_checks.py FOLDER skipped_steps_leave_no_trace ...

The oracle of a run that skipped samples, went back or was resumed is a run that never saw them, compared bitwise:
weights, EMA, optimizer state, losses, gradient norms and rates.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from named_checks import run_named

from benchmarks.whole_weights import gather_master
from trainer.checkpoint.folder import list_checkpoints
from trainer.config import ConfigError, load_config
from trainer.data.latents.samples import LatentDataset, Sample
from trainer.data.position import DataState, micro_batches
from trainer.diffusion.flow import NoisedBatch
from trainer.distributed import PeerError, World, from_main, on_all
from trainer.loop import loop
from trainer.loop.bad_steps import DivergedError
from trainer.loop.leaving import build_arrival_group
from trainer.loop.loop import Trainer
from trainer.loop.run import prepare_run_folder
from trainer.loop.run_lock import LockLostError, RunLock
from trainer.loop.sample_grid import GridSampler
from trainer.loop.signals import StopSignal
from trainer.loop.start_checks import CheckedRun, check_start

BATCH = 8
TINY = [
    "train.micro_batch_size=2", "train.gradient_accumulation_steps=2", "train.max_steps=5", "train.checkpoint_every=0",
    "parallel.ep_size=2", "moe.num_experts=4", "model.dim=16", "model.num_layers=2", "model.num_heads=2",
    "model.num_kv_heads=1", "data.image_size=8", "optim.warmup_steps=3", "optim.schedule=cosine", "ema.decay=0.5",
]  # fmt: skip


class DoctoredData:
    """A data set in which the first value of some samples is replaced, or reading them raises."""

    def __init__(self, dataset: LatentDataset, values: dict[int, float | Exception]) -> None:
        self.dataset, self.values = dataset, values
        self.info, self.layout = dataset.info, dataset.layout
        self.empty_text, self.online_encoder = dataset.empty_text, dataset.online_encoder

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, number: int) -> Sample:
        sample, value = self.dataset.read(number), self.values.get(number)
        if isinstance(value, Exception):
            raise value
        if value is None:
            return sample
        latent = sample.latent.clone()
        latent[0, 0, 0] = value
        return replace(sample, latent=latent)


def plan_of(world: World, run_dir: Path, *overrides: str) -> CheckedRun:
    return check_start(load_config("debug", [*TINY, f"run_dir={run_dir}", *overrides]), world)


def sample_at(plan: CheckedRun, batch: int, row: int) -> int:
    """Data set number of a row of a global batch of the first epoch."""
    start = DataState(seed=plan.config.seed, epoch=0, consumed=0, samples_seen=0)
    order = micro_batches(
        plan.dataset.layout, start, micro_batch_size=BATCH, num_micro_batches=1, rank=0, world_size=1,
        group_size=plan.config.data.shuffle_group,
    )  # fmt: skip
    return [next(order) for _ in range(batch + 1)][batch].samples[row]


def doctored(plan: CheckedRun, values: dict[tuple[int, int], float | Exception]) -> CheckedRun:
    """The plan with values at (global batch, row of it)."""
    return replace(
        plan, dataset=DoctoredData(plan.dataset, {sample_at(plan, *place): v for place, v in values.items()})
    )


def build(plan: CheckedRun) -> Trainer:
    Path(plan.config.run_dir).mkdir(parents=True, exist_ok=True)
    from_main(plan.world, lambda: prepare_run_folder(plan))
    return Trainer(plan, torch.device("cpu"), StopSignal(), RunLock(Path(plan.config.run_dir)))


def explode_gradient(trainer: Trainer, forward: int) -> None:
    """In forward pass number `forward` of this rank, let the gradient behind block 0 be infinite."""
    calls = iter(range(1_000_000))

    def watch(module: torch.nn.Module, inputs: object, output: tuple[torch.Tensor, object]) -> None:
        if next(calls) == forward:
            output[0].register_hook(lambda gradient: gradient * math.inf)

    trainer.engine.module.blocks[0].register_forward_hook(watch)


def without(batches: Iterator[NoisedBatch], left_out: set[int], num_micro: int) -> Iterator[NoisedBatch]:
    """The oracle's data: global batches that it never sees."""
    for number, batch in enumerate(batches):
        if number // num_micro not in left_out:
            yield batch


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, EMA and optimizer state of this rank, by name."""
    found = {f"weight {name}": value for name, value in gather_master(trainer.engine).items()}
    found |= {f"ema {name}": value for name, value in trainer.ema.average.items()}
    for number, state in enumerate(trainer.engine.optimizer.optimizer.state.values()):
        found |= {f"optimizer {number} {key}": torch.as_tensor(value) for key, value in state.items()}
    return {name: value.clone() for name, value in found.items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


def lines(run_dir: Path, name: str) -> list[dict[str, Any]]:
    path = run_dir / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(run_dir: Path) -> list[tuple[float, ...]]:
    return [(m["step"], m["loss"], m["grad_norm"], m["learning_rate"]) for m in lines(run_dir, "metrics.jsonl")]


def ended(trainer: Trainer) -> dict[str, torch.Tensor]:
    trainer.run()
    state = everything(trainer)
    trainer.reporter.close()
    trainer.engine.destroy()
    return state


def bitwise(trainer: Trainer, world: World, oracle_dir: Path, left_out: set[int], *overrides: str) -> None:
    """Run the trainer to its end, and compare with a run of clean data without some global batches."""
    mine = ended(trainer)
    oracle = build(plan_of(world, oracle_dir, *overrides))
    oracle.batches = without(oracle.batches, left_out, num_micro=2)
    assert_same(mine, ended(oracle))
    run_dir = Path(trainer.config.run_dir)
    assert losses(run_dir) == losses(oracle_dir), (losses(run_dir), losses(oracle_dir))


def raises(kind: type[Exception], trainer: Trainer) -> Exception:
    """The error that ends a run."""
    try:
        trainer.run()
    except kind as error:
        trainer.reporter.close()
        trainer.engine.destroy()
        return error
    raise AssertionError(f"the run did not end with {kind.__name__}")


def checkpoints(trainer: Trainer) -> list[str]:
    return [path.name for path in list_checkpoints(Path(trainer.config.run_dir) / "checkpoints")]


def skipped_steps_leave_no_trace(world: World, folder: Path) -> None:
    """Stages 1-3, fp32 and bf16: a run with bad batches equals one that never saw them.

    Batch 1 has a NaN latent in the first micro-batch of rank 1. In the second micro-batch of batch 3 the
    gradient of rank 0 explodes, while its loss is finite.
    """
    cases = [(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")]
    for stage, precision in [*cases, ("3_offload", "fp32")]:
        overrides = [f"parallel.deepspeed_config=ds_configs/zero{stage}.json", f"train.precision={precision}"]
        run_dir = folder / f"skips_{stage}_{precision}"
        plan = doctored(plan_of(world, run_dir, *overrides), {(1, 3): math.nan})
        trainer = build(plan)
        if world.is_main:
            explode_gradient(trainer, forward=3 * 2 + 1)
        bitwise(trainer, world, folder / f"skips_oracle_{stage}_{precision}", {1, 3}, *overrides)
        assert trainer.state.step == 5 and trainer.state.data.samples_seen == 7 * BATCH
        events = lines(run_dir, "bad_steps.jsonl")
        assert [(e["step"], e["cause"]) for e in events] == [(2, "loss"), (3, "gradient norm")], events
        assert events[0]["indices"] == list(range(8, 16)), events
        assert sample_at(plan, 1, 3) in events[0]["suspected_samples"] and not events[1]["suspected_samples"], events
        assert lines(run_dir, "metrics.jsonl")[-1]["bad_steps"] == 2


def going_back_goes_on_past_the_bad_samples(world: World, folder: Path) -> None:
    """Three bad batches after a checkpoint and one more step: back to it, on past them; also across a restart."""
    bad = {(3, 0): math.nan, (4, 5): math.inf, (5, 7): math.nan}
    for stage in (1, 2, 3):
        overrides = [
            f"parallel.deepspeed_config=ds_configs/zero{stage}.json", "train.max_steps=4", "train.checkpoint_every=2"
        ]  # fmt: skip
        run_dir = folder / f"back_{stage}"
        trainer = build(doctored(plan_of(world, run_dir, *overrides), bad))
        bitwise(trainer, world, folder / f"back_oracle_{stage}", {2, 3, 4, 5}, *overrides)
        assert trainer.state.data.samples_seen == 8 * BATCH
        kinds = [(e["kind"], e["step"]) for e in lines(run_dir, "bad_steps.jsonl")]
        assert kinds == [("skip", 4)] * 3 + [("rollback", 2)], kinds
    # Killed after step 3 of the second try, before its checkpoint: the same end.
    torch.distributed.barrier()
    if world.is_main:
        shutil.rmtree(run_dir / "checkpoints" / "step_00000004")
    torch.distributed.barrier()
    bitwise(build(doctored(plan_of(world, run_dir, *overrides), bad)), world, folder / "back_oracle_4",
            {2, 3, 4, 5}, *overrides)  # fmt: skip
    kinds = [(e["kind"], e["step"]) for e in lines(run_dir, "bad_steps.jsonl")]
    assert kinds == [("skip", 4)] * 3 + [("rollback", 2)], kinds


def going_back_has_an_end(world: World, folder: Path) -> None:
    """Bad samples without end: one error that names setting and file, and the checkpoint is still there."""
    everywhere = {(batch, 0): math.nan for batch in range(2, 8)}
    overrides = ["train.checkpoint_every=2", "train.max_bad_steps=2", "train.max_rollbacks=1"]
    trainer = build(doctored(plan_of(world, folder / "end", *overrides), everywhere))
    error = str(raises(DivergedError, trainer))
    assert "in 2 tries in a row" in error and "checkpoint of step 2 as often" in error, error
    assert checkpoints(trainer) == ["step_00000002"]
    assert trainer.state.step == 2 and len(lines(folder / "end", "metrics.jsonl")) == 2
    trainer = build(doctored(plan_of(world, folder / "end_0", "train.max_bad_steps=1"), {(0, 0): math.nan}))
    assert "no checkpoint yet" in str(raises(DivergedError, trainer))
    assert checkpoints(trainer) == []


def an_error_in_one_ranks_data_saves_on_all(world: World, folder: Path) -> None:
    """The rank that cannot read raises its own error, the other one quotes it, and nothing is lost."""
    run_dir = folder / "data_error"
    broken = OSError("shard 7 is gone")
    trainer = build(doctored(plan_of(world, run_dir), {(3, 2): broken}))
    if world.rank == 1:
        assert raises(OSError, trainer) is broken
    else:
        assert "rank 1: OSError('shard 7 is gone')" in str(raises(PeerError, trainer))
    assert checkpoints(trainer) == ["step_00000003"] and trainer.state.step == 3
    torch.distributed.barrier()
    bitwise(build(plan_of(world, run_dir)), world, folder / "data_error_oracle", set())


class Grid:
    """Stands in for the sample grid: runs the model as it does, then returns a picture or raises.

    With a `mask_length` other than 8 the model itself raises, in the middle of its first block.
    """

    def __init__(self, error: Exception | None, mask_length: int = 8) -> None:
        self.error, self.mask_length = error, mask_length

    @torch.no_grad()
    def draw(self, engine: Any) -> torch.Tensor:
        engine.eval()
        mask = torch.ones(1, self.mask_length, dtype=torch.bool)
        engine(torch.zeros(1, 3, 8, 8), torch.ones(1), torch.zeros(1, 8, 32), mask)
        engine.train()
        if self.error is not None:
            raise self.error
        return torch.zeros(8, 8, 3, dtype=torch.uint8)

    save = staticmethod(GridSampler.save)


def with_grid(plan: CheckedRun, grid: Grid) -> Trainer:
    trainer = build(plan)
    trainer.config = replace(trainer.config, train=replace(trainer.config.train, sample_every=2))
    trainer.grid = grid  # type: ignore[assignment]
    return trainer


def an_error_in_the_grid_saves_the_weights_not_the_average(world: World, folder: Path) -> None:
    """On all ranks while drawing; on the main one alone while writing the picture."""
    codec_fails, model_fails = Grid(ArithmeticError("the codec fails")), Grid(None, mask_length=7)
    for name, stage, grid, kind in (
        ("codec", 2, codec_fails, ArithmeticError),
        ("model", 3, model_fails, RuntimeError),
    ):
        overrides = [f"parallel.deepspeed_config=ds_configs/zero{stage}.json"]
        run_dir = folder / f"grid_{name}_{stage}"
        error = raises(kind, with_grid(plan_of(world, run_dir, *overrides), grid))
        assert type(error) is kind and "ZeRO" not in str(error), error
        torch.distributed.barrier()
        trainer = build(plan_of(world, run_dir, *overrides))
        assert trainer.state.step == 2
        bitwise(trainer, world, folder / f"grid_oracle_{name}_{stage}", set(), *overrides)
    run_dir = folder / "grid_file"
    trainer = with_grid(plan_of(world, run_dir), Grid(None))
    if world.is_main:
        (run_dir / "samples").write_text("not a folder")
    assert "grid_file cannot be written: File exists" in str(raises(ConfigError, trainer)), "the same on all"
    assert checkpoints(trainer) == ["step_00000003"], "the others are told at the end of the next step"


def one_ranks_grid_fails_while_the_other_draws(world: World, folder: Path) -> None:
    """Ends the process with the error; `tests/test_loop.py` looks at how."""
    trainer = with_grid(plan_of(world, folder / "half_grid"), Grid(None))
    loop.ARRIVAL_SECONDS, trainer.arrivals = 2.0, build_arrival_group(2.0)
    if world.rank == 1:
        trainer.grid.draw = lambda engine: 1 / 0  # type: ignore[assignment,return-value]
    trainer.run()


def a_lost_lock_ends_the_run_unsaved(world: World, folder: Path) -> None:
    """A job whose folder was taken over must not write there again."""
    run_dir = folder / "lost"
    trainer = build(plan_of(world, run_dir))
    if world.is_main:
        trainer.lock = RunLock(run_dir, lease_seconds=0.6)
        trainer.lock.acquire()
        other = RunLock(run_dir, lease_seconds=0.6)
        other.lease.force_break()
        other.acquire()
        while not trainer.lock.lost:
            time.sleep(0.05)
    raises(LockLostError if world.is_main else PeerError, trainer)
    assert checkpoints(trainer) == []
    if world.is_main:
        trainer.lock.release()
        assert other.holder() is not None, "the new holder keeps its lock"
        other.release()


def ranks_agree_on_errors(world: World, folder: Path) -> None:
    """What fails on one rank is raised on all, in kind and words that all of them can act on."""
    assert on_all(lambda: world.rank * 10) == [0, 10]
    assert from_main(world, lambda: f"from {world.rank}") == "from 0"
    mine, other = OSError("disk"), ConfigError("seed is -1: use 0 or more")

    def fail(error: Exception, *, on: int) -> None:
        if world.rank == on:
            raise error

    for kind, expected in ((mine, PeerError), (other, ConfigError)):
        for rank in (0, 1):
            found = caught(lambda kind=kind, rank=rank: on_all(lambda: fail(kind, on=rank)))  # type: ignore[misc]
            if world.rank == rank:
                assert found is kind
            else:
                assert type(found) is expected and str(kind) in str(found), found
    assert type(caught(lambda: from_main(world, lambda: fail(mine, on=0)))) is (OSError if world.is_main else PeerError)
    both = caught(lambda: on_all(lambda: fail([other, mine][world.rank], on=world.rank)))
    assert both is [other, mine][world.rank], "each rank that failed raises its own"


def caught(action: Callable[[], object]) -> Exception:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


if __name__ == "__main__":
    run_named(sys.argv[2:], lambda world, name: globals()[name](world, Path(sys.argv[1])))
