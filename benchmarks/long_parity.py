"""Many steps of one plain process against several with experts on all of them: when they part, and why.

    torchrun --nproc-per-node 2 -m benchmarks.long_parity --steps 240
    torchrun --nproc-per-node 2 -m benchmarks.long_parity --steps 240 --replay

Both train the `debug` recipe in fp32 on the same samples with the same noise, and each expert's choice in every step
is kept. Sums in another order differ in their last bits, and two tokens whose affinities differ by no more than that
may change places in an expert's choice: from there on two trainings are compared that learn from different rows. With
`--replay` the processes take the choices of the plain one, and what is left is rounding alone: exits 1 if losses differ
by more than 1e-6 then.

Per window of steps: largest relative difference of the loss, places of an expert that another token took (of all in
the window), and the largest gap of affinities over which such a choice went the other way. Then the first such places.
"""

import argparse

from trainer.cluster.leave import run_and_leave
from trainer.config import command, command_parser, require


def command_line() -> argparse.ArgumentParser:
    """Options; see the module docstring."""
    parser = command_parser("benchmarks.long_parity", __doc__)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--window", type=int, default=20, help="steps of a line")
    parser.add_argument("--replay", action="store_true", help="take the choices of the plain process")
    parser.add_argument("--stage", type=int, default=3, choices=[1, 2, 3])
    return parser


if __name__ == "__main__":
    command_line().parse_known_args()  # --help and mistakes are answered before torch is imported

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe.layer import MoeLayer
from moe.routing import ChoiceMemory, affinity_of
from trainer.config import TrainConfig, load_config
from trainer.data.dataset import open_dataset
from trainer.data.position import DataState
from trainer.diffusion.flow import NoisedBatch, training_loss
from trainer.diffusion.model import EcDit, ModelShape, init_weights
from trainer.distributed import World, all_reduce_mean, detect_world, gather, process_group
from trainer.engine.deepspeed_config import load_deepspeed_config
from trainer.engine.engine import build_engine
from trainer.engine.optim import build_optimizer, learning_rate
from trainer.loop.step import next_step, noised_batches, train_step
from trainer.telemetry.step_timer import StepTimer

CPU = torch.device("cpu")
LOSS_BOUND = 1e-6
Place = tuple[int, str, int]  # step, layer, sample


@dataclass
class Choices:
    """Of one training: tokens [E, C] chosen in each place, affinities [S, E] there, and the loss of each step."""

    index: dict[Place, Tensor] = field(default_factory=dict)
    affinity: dict[Place, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)


class Watcher:
    """Keeps what the MoE layers of a model choose, or makes them choose what another training did."""

    def __init__(self, model: nn.Module, replayed: Choices | None) -> None:
        self.found, self.replayed = Choices(), replayed
        self.step, self.samples = 0, torch.zeros(0, dtype=torch.int64)
        for name, module in model.named_modules():
            if isinstance(module, MoeLayer):
                module.register_forward_pre_hook(lambda layer, inputs, name=name: self._before(layer, inputs, name))
                module.register_forward_hook(lambda layer, inputs, output, name=name: self._after(inputs, name))
                module.router.register_forward_hook(lambda layer, _, logits, name=name: self._score(logits, name))

    def _places(self, layer: str) -> list[Place]:
        return [(self.step, layer, sample) for sample in self.samples.tolist()]

    def _before(self, layer: nn.Module, inputs: tuple[Any, ...], name: str) -> tuple[Any, ...]:
        memory = ChoiceMemory()
        if self.replayed is not None:
            memory.index_BEC = torch.stack([self.replayed.index[place] for place in self._places(name)])
        return (inputs[0], memory, *inputs[2:])

    def _score(self, logits_BSE: Tensor, name: str) -> None:
        for place, affinity_SE in zip(self._places(name), affinity_of(logits_BSE.detach(), "softmax"), strict=True):
            self.found.affinity[place] = affinity_SE

    def _after(self, inputs: tuple[Any, ...], name: str) -> None:
        for place, index_EC in zip(self._places(name), inputs[1].index_BEC, strict=True):
            self.found.index[place] = index_EC


def plain_training(config: TrainConfig, shape: ModelShape, steps: int) -> Choices:
    """One process without DeepSpeed, with the whole batch in each pass."""
    model = EcDit(config.model, config.moe, shape)
    init_weights(model, config.seed)
    watcher, optimizer = Watcher(model, None), build_optimizer(model.named_parameters(), config.optim)
    for step, batches in enumerate(_data(config, World(rank=0, local_rank=0, size=1), steps)):
        watcher.step, total = step, 0.0
        for batch in batches:
            watcher.samples = batch.index_B
            prediction, _ = model(batch.x_BCHW, batch.t_B, batch.text_BLD, batch.text_mask_BL, batch.keep_BS)
            loss = training_loss(prediction, batch, config.model.patch_size) / len(batches)
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.optim, config.train.max_steps)
        optimizer.step()
        optimizer.zero_grad()
        watcher.found.losses.append(total)
    return watcher.found


def parallel_training(
    config: TrainConfig, content: dict[str, Any], shape: ModelShape, steps: int, world: World, replayed: Choices | None
) -> Choices:
    """The same steps of all processes through the engine, each with its part of the batch. Collective."""
    engine = build_engine(config, content, shape, CPU)
    watcher, timer = Watcher(engine.module, replayed), StepTimer(CPU)
    for step, batches in enumerate(_data(config, world, steps)):
        (batch,) = batches
        watcher.step, watcher.samples = step, batch.index_B
        rate = learning_rate(step, config.optim, config.train.max_steps)
        result = train_step(engine, batches, rate, CPU, timer, patch_size=config.model.patch_size, statistics=False)
        watcher.found.losses.append(float(all_reduce_mean(result.losses.mean())))
    engine.destroy()
    whole = Choices(losses=watcher.found.losses)
    for index, affinity in gather((watcher.found.index, watcher.found.affinity)):
        whole.index |= index
        whole.affinity |= affinity
    return whole


def _data(config: TrainConfig, world: World, steps: int) -> Iterator[list[NoisedBatch]]:
    state = DataState(seed=config.seed, epoch=0, consumed=0, samples_seen=0)
    batches = noised_batches(open_dataset(config), config, rank=world.rank, world_size=world.size, state=state)
    for step in range(steps):
        yield next_step(batches, config, step)


@dataclass(frozen=True, kw_only=True)
class Swap:
    """A place of an expert that went to another token; `gap` between the two tokens' affinities in the plain training.

    `shift`: the larger difference of one of those affinities between the trainings.
    """

    place: Place
    expert: int
    gap: float
    shift: float


def swaps(plain: Choices, other: Choices) -> list[Swap]:
    """Every place that two trainings gave to different tokens, in the order of steps and layers."""
    found = []
    for place in sorted(plain.index):
        for expert, (mine_C, theirs_C) in enumerate(zip(plain.index[place], other.index[place], strict=True)):
            mine, theirs = set(mine_C.tolist()), set(theirs_C.tolist())
            a_S, b_S = plain.affinity[place][:, expert], other.affinity[place][:, expert]
            left = sorted(mine - theirs, key=lambda token: float(a_S[token]))
            entered = sorted(theirs - mine, key=lambda token: -float(a_S[token]))
            for out, came in zip(left, entered, strict=True):
                shift = max(abs(float(a_S[token] - b_S[token])) for token in (out, came))
                found.append(Swap(place=place, expert=expert, gap=float(a_S[out] - a_S[came]), shift=shift))
    return found


def print_table(plain: Choices, other: Choices, window: int) -> None:
    """One line for each window of steps, and the first places that went to another token."""
    found, steps = swaps(plain, other), len(plain.losses)
    places = sum(index.numel() for index in plain.index.values()) // steps
    print("| steps | loss | swapped places | gap |")
    print("|---|---|---|---|")
    for first in range(0, steps, window):
        inside = range(first, min(first + window, steps))
        loss = max(loss_differences(plain, other)[first : first + window])
        gaps = [swap.gap for swap in found if swap.place[0] in inside]
        gap = f"{max(gaps):.1e}" if gaps else "-"
        print(f"| {first + 1}-{inside[-1] + 1} | {loss:.1e} | {len(gaps)} of {places * len(inside)} | {gap} |")
    for swap in found[:3]:
        step, layer, sample = swap.place
        print(
            f"step {step + 1}, {layer}, sample {sample}, expert {swap.expert}: affinities {swap.gap:.1e} apart, "
            f"moved by {swap.shift:.1e} between the trainings"
        )


def loss_differences(plain: Choices, other: Choices) -> list[float]:
    """Relative difference of the loss in each step."""
    return [abs(mine - theirs) / mine for mine, theirs in zip(plain.losses, other.losses, strict=True)]


@command
def main(argv: list[str] | None = None) -> None:
    """Print the table for this number of processes."""
    arguments, world = command_line().parse_args(argv), detect_world()
    for name in ("steps", "window"):
        require(getattr(arguments, name) >= 1, f"--{name} is {getattr(arguments, name)}: use 1 or more")
    overrides = [
        f"train.max_steps={arguments.steps}",
        f"parallel.deepspeed_config=ds_configs/zero{arguments.stage}.json",
    ]
    config = load_config("debug", overrides)
    images = config.train.micro_batch_size
    require(images % world.size == 0, f"{world.size} processes cannot share {images} images: start 2, 4 or {images}")
    parts = [f"train.micro_batch_size={images // world.size}", f"parallel.ep_size={world.size}"]
    split = load_config("debug", [*overrides, *parts])
    import deepspeed.utils

    deepspeed.utils.logger.setLevel("ERROR")
    with process_group(world):
        shape = ModelShape.of(open_dataset(config).info)
        plain = plain_training(config, shape, arguments.steps)
        content = load_deepspeed_config(split, world.size)
        replayed = plain if arguments.replay else None
        other = parallel_training(split, content, shape, arguments.steps, world, replayed)
        if world.is_main:
            print_table(plain, other, arguments.window)
        if arguments.replay and max(loss_differences(plain, other)) > LOSS_BOUND:
            sys.exit(1)


if __name__ == "__main__":
    run_and_leave(main)
