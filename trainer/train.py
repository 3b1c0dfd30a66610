"""Train, or resume if the run folder has a checkpoint.

    python -m trainer.train trainer/configs/debug.yaml
    torchrun --nproc-per-node 4 -m trainer.train trainer/configs/debug.yaml parallel.ep_size=2 train.micro_batch_size=2

Also under `deepspeed --module`, `mpirun` and `srun`. SIGTERM or SIGUSR1 saves at the next step and ends the run.
"""

import argparse
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import (
    Saver,
    Topology,
    TrainState,
    check_resumable,
    choose_checkpoint,
    find_candidate,
    load_checkpoint,
)
from trainer.config import ConfigError, TrainConfig, load_config, require, run_cli, save_config
from trainer.data.dataset import Batch, DataState, LatentDataset, build_loader, open_dataset
from trainer.deepspeed_config import load_deepspeed_config, zero_stage
from trainer.diffusion import noise_batch, num_kept_tokens, training_loss
from trainer.distributed import World, all_reduce_mean, barrier, detect_world, init_distributed
from trainer.ema import Ema
from trainer.engine import build_engine
from trainer.metrics import MetricsLog, logger, router_names, router_values, setup_logging
from trainer.model import ModelShape
from trainer.optim import learning_rate
from trainer.sample_grid import GridSampler


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that passed all checks: nothing has been allocated or written yet."""

    config: TrainConfig
    world: World
    deepspeed_config: dict[str, Any]
    dataset: LatentDataset
    topology: Topology
    checkpoint: Path | None


def plan_run(config: TrainConfig, world: World) -> Plan:
    """Check everything a user can get wrong; ConfigError with one sentence."""
    ep_size = config.parallel.ep_size
    require(
        world.size % ep_size == 0,
        f"parallel.ep_size={ep_size} does not divide the number of processes, {world.size}: "
        "start a multiple of it, or lower parallel.ep_size",
    )
    deepspeed_config = load_deepspeed_config(config, world.size)
    dataset = open_dataset(config)
    shape, patch = dataset.info, config.model.patch_size
    require(
        shape.height % patch == 0 and shape.width % patch == 0,
        f"model.patch_size={patch} does not divide the latent of {shape.height} x {shape.width}",
    )
    num_tokens = (shape.height // patch) * (shape.width // patch)
    try:
        for count in {num_tokens, num_kept_tokens(num_tokens, config.diffusion.mask_ratio)} if config.moe.every else ():
            config.moe.capacity(count)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    require(
        len(dataset) >= config.global_batch_size(world.size),
        f"train.micro_batch_size={config.train.micro_batch_size} x gradient_accumulation_steps="
        f"{config.train.gradient_accumulation_steps} x {world.size} processes is a global batch of "
        f"{config.global_batch_size(world.size)}, but the data set has {len(dataset)} samples: lower one of them",
    )
    GridSampler.check(config)
    topology = Topology(world_size=world.size, ep_size=ep_size, zero_stage=zero_stage(deepspeed_config))
    checkpoint = find_resume(config, topology, dataset.info.fingerprint)
    return Plan(
        config=config, world=world, deepspeed_config=deepspeed_config, dataset=dataset,
        topology=topology, checkpoint=checkpoint,
    )  # fmt: skip


def find_resume(config: TrainConfig, topology: Topology, fingerprint: str) -> Path | None:
    """The checkpoint to continue from, unless its checksums prove wrong; refuses a folder that is not a run's."""
    run_dir = Path(config.run_dir)
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return None
    require(
        (run_dir / "config.yaml").is_file(),
        f"run_dir={run_dir} exists and is not the folder of a run (no config.yaml): choose an empty or new folder",
    )
    checkpoint = find_candidate(run_dir)
    if checkpoint is not None:
        check_resumable(checkpoint, config, topology, fingerprint)
    return checkpoint


class StopSignal:
    """Remembers SIGTERM or SIGUSR1 until the ranks agree on a step boundary."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, *_: object) -> None:
        self.received = True


def prepare_run_folder(plan: Plan) -> None:
    """Write the resolved configurations; main process only."""
    run_dir = Path(plan.config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(plan.config, run_dir / "config.yaml")
    (run_dir / "ds_config.json").write_text(json.dumps(plan.deepspeed_config, indent=2) + "\n")
    setup_logging(run_dir / "train.log")


class Trainer:
    """The state of a running loop: engine, average, data position and writers."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.config, self.device = plan, plan.config, device
        self.stop = StopSignal()
        info = plan.dataset.info
        shape = ModelShape(channels=info.channels, height=info.height, width=info.width, text_dim=info.text_dim)
        self.engine = build_engine(plan.config, plan.deepspeed_config, shape, device)
        self.ema = Ema(self.engine, plan.config.ema)
        self.state = TrainState(step=0, data=DataState(seed=plan.config.seed, epoch=0, consumed=0, samples_seen=0))
        if plan.checkpoint is not None:
            self.state = load_checkpoint(plan.checkpoint, self.engine, self.ema, plan.world)
        self.saver = Saver(plan.config, plan.topology, info, plan.world)
        self.grid = GridSampler(plan.config, plan.dataset.info, shape, plan.world, device)
        moe_layers = [i for i in range(plan.config.model.num_layers) if plan.config.moe.has_moe(i)]
        self.router_names = router_names(moe_layers)
        self.log: MetricsLog | None = None
        if plan.world.is_main:
            self.log = MetricsLog(
                Path(plan.config.run_dir), start_step=self.state.step, max_steps=plan.config.train.max_steps
            )

    def run(self) -> None:
        """Steps until `max_steps`, `stop_at_step` or a stop signal; always ends with a checkpoint."""
        loop = self.config.train
        last = loop.stop_at_step or loop.max_steps
        self.interval_start, self.interval_step = time.perf_counter(), self.state.step
        if self.state.step >= last:
            if self.plan.world.is_main:
                logger.info("nothing to do: the checkpoint is at step %d of %d", self.state.step, last)
            return
        batches = build_loader(
            self.plan.dataset, self.config, rank=self.plan.world.rank, world_size=self.plan.world.size,
            state=self.state.data,
        )  # fmt: skip
        stopping = False
        while self.state.step < last and not stopping:
            stopping = self._step(batches)
            step = self.state.step
            if loop.sample_every and (step % loop.sample_every == 0 or step == loop.max_steps):
                self._draw_grid()
            final = stopping or step == last
            if final or (loop.checkpoint_every and step % loop.checkpoint_every == 0):
                self._save(final=final)
        if self.plan.world.is_main:
            reason = "stop signal" if stopping else "last step"
            logger.info("ended after step %d of %d (%s)", self.state.step, loop.max_steps, reason)

    def _step(self, batches: Iterator[Batch]) -> bool:
        """One optimizer step; returns whether any rank was asked to stop."""
        config, num_micro = self.config, self.config.train.gradient_accumulation_steps
        rate = learning_rate(self.state.step, config.optim, config.train.max_steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        report = torch.zeros(2 + len(self.router_names), device=self.device)
        for _ in range(num_micro):
            batch = next(batches)
            noised = noise_batch(batch, config.diffusion, seed=config.seed, patch_size=config.model.patch_size).to(
                self.device
            )
            prediction, stats = self.engine(
                noised.x_BCHW, noised.t_B, noised.text_BLD, noised.text_mask_BL, noised.keep_BS
            )
            loss = training_loss(prediction, noised, config.model.patch_size)
            self.engine.backward(loss)
            self.engine.step()
            report[0] += loss.detach() / num_micro
            report[2:] += router_values(stats).to(self.device) / num_micro
        report[1] = float(self.stop.received)
        values: list[float] = all_reduce_mean(report).tolist()
        self._finish_step(values[0], rate, values[2:])
        return bool(values[1] > 0)

    def _finish_step(self, loss: float, rate: float, router: list[float]) -> None:
        """Advance EMA and state, log at the interval."""
        config, step = self.config, self.state.step + 1
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {step} is {loss}: the newest checkpoint is still good")
        self.ema.update(self.engine, step)
        batch_size = config.global_batch_size(self.plan.world.size)
        data = self.state.data.advance(batch_size, len(self.plan.dataset), batch_size)
        self.state = TrainState(step=step, data=data, interval_loss=self.state.interval_loss + loss)
        if step % config.train.log_every == 0:
            self._log(rate, router)
        if self.log:
            self.log.advance()

    def _log(self, rate: float, router: list[float]) -> None:
        step, every = self.state.step, self.config.train.log_every
        norm = self.engine.get_global_grad_norm()
        now = time.perf_counter()
        images = (step - self.interval_step) * self.config.global_batch_size(self.plan.world.size)
        if self.log:
            values = {
                "loss": self.state.interval_loss / every,
                "grad_norm": float(norm if norm is not None else math.nan),
                "learning_rate": rate,
                "images_per_second": images / (now - self.interval_start),
                "epoch": float(self.state.data.epoch),
            }
            self.log.write(step, values | dict(zip(self.router_names, router, strict=True)))
        self.interval_start, self.interval_step = now, step
        self.state = replace(self.state, interval_loss=0.0)

    def _draw_grid(self) -> None:
        start = time.perf_counter()
        with self.ema.swapped(self.engine):
            picture = self.grid.draw(self.engine)
        if self.log:
            self.grid.save(picture, Path(self.config.run_dir), self.state.step)
            self.log.add_image(self.state.step, picture)
        self.interval_start += time.perf_counter() - start

    def _save(self, *, final: bool) -> None:
        start = time.perf_counter()
        self.saver.save(self.engine, self.ema, self.state, required=final)
        self.interval_start += time.perf_counter() - start


def train(config: TrainConfig, world: World) -> None:
    """Check, build, loop, close."""
    plan = plan_run(config, world)
    device = init_distributed(world)
    checkpoint, notes = choose_checkpoint(config, plan.topology, plan.dataset.info.fingerprint, world)
    plan = replace(plan, checkpoint=checkpoint)
    if world.is_main:
        prepare_run_folder(plan)
        for note in notes:
            logger.info(note)
        ep_size = plan.topology.ep_size
        logger.info(
            "run %s: %d processes, ep_size %d, ZeRO stage %d, %s",
            config.run_dir, world.size, ep_size, plan.topology.zero_stage, config.train.precision,
        )  # fmt: skip
        logger.info("resuming from %s" if plan.checkpoint else "starting fresh%s", plan.checkpoint or "")
    barrier()
    trainer = Trainer(plan, device)
    try:
        trainer.run()
    finally:
        if trainer.log:
            trainer.log.close()
    barrier()
    torch.distributed.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    """Command line: a recipe and `key=value` overrides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="debug", help="YAML recipe, or its name in trainer/configs")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # from the deepspeed launcher
    arguments = parser.parse_intermixed_args(argv)
    recipe, overrides = arguments.config, arguments.overrides
    if "=" in recipe:
        recipe, overrides = "debug", [recipe, *overrides]
    world = detect_world()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

    def body() -> None:
        config = load_config(recipe, overrides)
        import deepspeed.utils

        deepspeed.utils.logger.setLevel("ERROR")
        train(config, world)

    if world.is_main:
        run_cli(body)
        return
    with open(os.devnull, "w") as silent:  # one message for all ranks, not one from each
        run_cli(body, silent)


if __name__ == "__main__":
    main()
