"""One run in one process: the model of the training system on drawn scenes, with its measures on the way.

Weights are bf16 with fp32 masters, as the trainer's; what several processes compute is equal (docs/correctness.md).
A stopped run goes on from its file, bitwise as if it had not stopped.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.compare.data import SHAPE, Noised, training_batches
from benchmarks.compare.validation import Loss, validation_loss
from benchmarks.interleaved import write_json
from moe.config import MoeConfig
from moe.layer import auxiliary_loss
from moe.routing import Routed
from trainer.config import ModelConfig, OptimConfig
from trainer.diffusion.compiled import CompiledBlocks
from trainer.diffusion.model import EcDit, init_weights
from trainer.engine.optim import build_optimizer, learning_rate, set_learning_rate


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. `measures` is how often the validation loss is taken, at equal distances and at the end."""

    model: ModelConfig
    moe: MoeConfig
    optim: OptimConfig
    seed: int
    steps: int
    batch_size: int
    num_kinds: int
    measures: int = 8
    time_shift: float = 2.0
    ema: float = 0.998

    def as_json(self) -> dict[str, Any]:
        """The settings as a record holds them."""
        content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return content

    @property
    def measured_every(self) -> int:
        """Steps between two measures."""
        return max(1, self.steps // self.measures)


@dataclass
class Record:
    """What a run has shown so far: training loss by step, validation loss by step, seconds of training steps alone."""

    of: dict[str, Any]
    device: str
    step: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)
    measured: dict[str, Loss] = field(default_factory=dict)


class Run:
    """Model, masters, optimizer and average of one run."""

    def __init__(self, config: RunConfig, device: torch.device, *, compiled: bool = True) -> None:
        self.config, self.device = config, device
        self.model = EcDit(config.model, config.moe, SHAPE)
        init_weights(self.model, config.seed)
        self.model.to(device, torch.bfloat16)
        self.weights = dict(self.model.named_parameters())
        self.masters = {name: nn.Parameter(value.detach().float()) for name, value in self.weights.items()}
        self.average = {name: value.detach().clone() for name, value in self.masters.items()}
        self.optimizer = build_optimizer(self.masters.items(), config.optim)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.record = Record(of=config.as_json(), device=name)
        if compiled:
            CompiledBlocks(self.model)

    def predict(self, noised: Noised) -> tuple[Tensor, list[Routed]]:
        """Velocity [B, C, H, W] and what the routers decided."""
        out: tuple[Tensor, list[Routed]] = self.model(noised.x_BCHW, noised.t_B, noised.text_BLD, noised.mask_BL)
        return out

    def train_step(self, noised: Noised) -> Tensor:
        """One optimizer step; the loss, a tensor, so that a GPU need not be waited for."""
        optim, record = self.config.optim, self.record
        set_learning_rate(self.optimizer, learning_rate(record.step, optim, self.config.steps))
        velocity, routed = self.predict(noised)
        loss = (velocity - noised.target_BCHW).square().mean()
        own = auxiliary_loss(routed)
        (loss if own is None else loss + own).backward()
        for name, master in self.masters.items():
            gradient = self.weights[name].grad
            master.grad = torch.zeros_like(master) if gradient is None else gradient.float()
            self.weights[name].grad = None
        nn.utils.clip_grad_norm_(self.masters.values(), optim.max_grad_norm)
        self.optimizer.step()
        record.step += 1
        self.publish(self.masters)
        decay = min(self.config.ema, (1 + record.step) / (10 + record.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.masters.values()), 1 - decay)
        return loss.detach()

    @torch.no_grad()
    def publish(self, values: Mapping[str, Tensor]) -> None:
        """Let the model compute with these fp32 weights."""
        torch._foreach_copy_(list(self.weights.values()), [values[name] for name in self.weights])

    def validate(self) -> Loss:
        """Validation loss of the averaged weights."""
        self.publish(self.average)
        self.model.eval()
        found = validation_loss(lambda noised: self.predict(noised)[0], self.device, self.config.num_kinds)
        self.model.train()
        self.publish(self.masters)
        return found

    def save(self, path: Path) -> None:
        """Write everything, and what is to be read of it as JSON beside it."""
        state = {"masters": dict(self.masters), "average": self.average, "optimizer": self.optimizer.state_dict()}
        record = dataclasses.asdict(self.record)
        temporary = path.with_suffix(".tmp")
        torch.save({**state, "record": record}, temporary)
        os.replace(temporary, path)
        write_json(path.with_suffix(".json"), record)

    def load(self, path: Path) -> None:
        """Continue what `save` wrote; ValueError where it is of other settings."""
        state = torch.load(path, weights_only=True, map_location=self.device)
        record = Record(**state["record"])
        if record.of != self.record.of:
            raise ValueError(f"{path} is a run of other settings: use another --out")
        self.record = record
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(state["masters"][name])
                self.average[name].copy_(state["average"][name])
        self.publish(self.masters)
        self.optimizer.load_state_dict(state["optimizer"])


def train(run: Run, path: Path, *, stop: Callable[[], bool] = lambda: False, log_every: int = 50) -> bool:
    """Train what is left, with state in PATH and PATH with .json, unless `stop` says so; whether it is done."""
    config, record = run.config, run.record
    if path.is_file():
        run.load(path)
        record = run.record
    batches: Iterable[Noised] = training_batches(
        config.seed,
        range(record.step, config.steps),
        config.batch_size,
        config.time_shift,
        config.num_kinds,
        run.device,
    )
    losses: list[Tensor] = []
    start = time.perf_counter()
    for noised in batches:
        losses.append(run.train_step(noised))
        measured = record.step % config.measured_every == 0 or record.step == config.steps
        if record.step % log_every == 0 or measured:
            mean = float(torch.stack(losses).mean())
            record.curve.append((record.step, mean))
            record.seconds += time.perf_counter() - start
            losses.clear()
            if measured:
                record.measured[str(record.step)] = run.validate()
                run.save(path)
                loss = record.measured[str(record.step)]["mean"]
                print(f"{path.stem}: step {record.step} of {config.steps}, loss {mean:.4f}, validation "
                      + ", ".join(f"{name} {value:.4f}" for name, value in loss.items()), flush=True)  # fmt: skip
            if record.step < config.steps and stop():
                run.save(path)
                return False
            start = time.perf_counter()
    return True
