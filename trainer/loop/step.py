"""One optimizer step: what it is given, what it does with the weights, and what the ranks then tell each other.

A step is bad when its loss or its global gradient norm is not finite. Then it must leave no trace, and all ranks must
decide so before any weight moves. It costs nothing that a step does not do anyway, no collective and no host
synchronisation:

- A rank whose own loss is not finite makes its gradient NaN (the loss is multiplied by NaN instead of by 1), so that
  one question is left: is the global gradient norm finite? Averaging spreads NaN to all ranks.
- DeepSpeed 0.19.8 asks that question in stages 1, 2 and 3, of a norm that is all-reduced over every rank, before its
  update. On "no" it takes the way of an fp16 overflow: gradients (also accumulated ones) are dropped, weights and
  moments are not touched, its micro-step counter goes on, and `engine.was_step_applied()` is False.

In bf16 at stages 1 and 2 the question needs `bf16.check_grad_overflow` (on by default); engine/deepspeed_config.py
refuses settings that switch it off. `tests/loop_checks.py` shows that a run with skips equals one without those
samples bitwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe.layer import auxiliary_loss
from moe.routing import RoutingStats
from trainer.config import TrainConfig
from trainer.data.latents.samples import LatentDataset
from trainer.data.loader import load_batches
from trainer.data.position import DataState
from trainer.diffusion.flow import NoisedBatch, draw_noise, mask_at, training_loss
from trainer.distributed import all_reduce_mean, gather
from trainer.engine.optim import set_learning_rate
from trainer.telemetry.routing_metrics import router_vector
from trainer.telemetry.step_timer import StepTimer


def noised_batches(
    dataset: LatentDataset, config: TrainConfig, *, rank: int, world_size: int, state: DataState
) -> Iterator[NoisedBatch]:
    """This rank's micro-batches for ever, on the host; how many tokens are masked is left open.

    The data workers draw the noise, each sample's from a generator of its own: in this process a GPU would wait for it.
    """
    noise = partial(draw_noise, config=config.diffusion, seed=config.seed, patch_size=config.model.patch_size)
    return load_batches(dataset, config, rank=rank, world_size=world_size, state=state, then=noise)


def next_step(batches: Iterator[NoisedBatch], config: TrainConfig, step: int) -> list[NoisedBatch]:
    """The micro-batches of optimizer step number `step` (from 0), masked as in that step; talks to no other rank.

    Workers read ahead, past steps that are skipped later, so only here is it known which step a batch is for.
    """
    taken = [next(batches) for _ in range(config.train.gradient_accumulation_steps)]
    return [mask_at(batch, config.diffusion, step) for batch in taken]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did. `losses` [num_micro_batches] and `router` are this rank's, on its device, not yet reduced.

    `stats` are those of the last micro-batch, one per MoE layer. Both are empty where no statistics were asked for.
    """

    applied: bool
    losses: Tensor
    router: Tensor
    stats: list[RoutingStats]


def poisoned(loss: Tensor) -> Tensor:
    """The same loss, with a gradient of NaN where it is not finite (an infinite loss may have a finite gradient)."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def train_step(
    engine: Any, micro_batches: list[NoisedBatch], rate: float, device: torch.device, timer: StepTimer, *,
    patch_size: int, statistics: bool,
) -> StepResult:  # fmt: skip
    """Run one optimizer step at a learning rate, with router statistics if wanted. Collective over all ranks.

    Routers may add a loss of their own; the losses that are reported are without it, so that routers compare.
    """
    set_learning_rate(engine.optimizer, rate)
    losses, router, stats = [], [], []
    for batch in micro_batches:
        with timer.section("data"):
            noised = batch.to(device)
        with timer.section("forward"):
            prediction, routed = engine(noised.x_BCHW, noised.t_B, noised.text_BLD, noised.text_mask_BL, noised.keep_BS)
            loss = training_loss(prediction, noised, patch_size)
            own = auxiliary_loss(routed)
            total = loss if own is None else loss + own
        with timer.section("backward"):
            engine.backward(poisoned(total))
        # DeepSpeed counts: clipping, the question for a finite norm and the update happen in the last of these calls.
        with timer.section("optimizer"):
            engine.step()
        # A router's own loss that is not finite makes the step bad, so it must show in the loss that is recorded.
        losses.append(torch.where(total.isfinite(), loss, total).detach())
        if statistics:
            stats = [layer.statistics() for layer in routed]
            router.append(router_vector(stats, noised.t_B).to(device))
    mean = torch.stack(router).mean(0) if router else torch.zeros(0)
    return StepResult(applied=engine.was_step_applied(), losses=torch.stack(losses), router=mean, stats=stats)


def gather_suspects(result: StepResult, micro_batches: list[NoisedBatch]) -> list[int]:
    """Indices of the samples, of all ranks, in micro-batches whose own loss is not finite. Collective."""
    bad = (~result.losses.isfinite()).tolist()
    mine = [i for batch, is_bad in zip(micro_batches, bad, strict=True) if is_bad for i in batch.index_B.tolist()]
    return sorted(index for part in gather(mine) for index in part)


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What the ranks tell each other after each step: one rank's before `exchange`, what all ranks know after it.

    `loss` is the mean of the step, `router` its statistics [router_size], zeros where none were collected. `stop`: a
    rank was asked to end. `save`: one was asked to save and go on. `failed`: a rank holds an error. `lock_lost`: the
    error is that the run folder is another's.
    """

    loss: Tensor
    stop: bool
    save: bool
    failed: bool
    lock_lost: bool
    router: Tensor

    def exchange(self, device: torch.device) -> "StepReport":
        """The means over all ranks, of a flag whether any rank has it. Collective; waits for the device."""
        return StepReport.unpack(all_reduce_mean(self.pack(device)).cpu())

    def pack(self, device: torch.device) -> Tensor:
        """As one fp32 vector, so that a step needs one collective only."""
        flags = torch.tensor([self.stop, self.save, self.failed, self.lock_lost], dtype=torch.float32)
        return torch.cat([self.loss.float().reshape(1).to(device), flags.to(device), self.router.to(device)])

    @classmethod
    def unpack(cls, vector: Tensor) -> "StepReport":
        """Inverse of `pack`; of a mean of flags, what is above 0 is set somewhere."""
        loss, flags, router = vector.split([1, 4, len(vector) - 5])
        stop, save, failed, lock_lost = (flags > 0).tolist()
        return cls(loss=loss.squeeze(), stop=stop, save=save, failed=failed, lock_lost=lock_lost, router=router)
