"""One optimizer step: forward, backward and update over the micro-batches, or a skip that leaves no trace.

A step is bad when its loss or its global gradient norm is not finite. All ranks must take the same decision before any
weight moves. It costs nothing that a step does not do anyway, no collective and no host synchronisation:

- A rank whose own loss is not finite makes its gradient NaN (the loss is multiplied by NaN instead of by 1), so that
  one question is left: is the global gradient norm finite? Averaging spreads NaN to all ranks.
- DeepSpeed 0.19.8 asks that question in stages 1, 2 and 3, of a norm that is all-reduced over every rank, before its
  update. On "no" it takes the way of an fp16 overflow: gradients (also accumulated ones) are dropped, weights and
  moments are not touched, its micro-step counter goes on, and `engine.was_step_applied()` is False.

In bf16 at stages 1 and 2 the question needs `bf16.check_grad_overflow` (on by default); engine/deepspeed_config.py
refuses settings that switch it off. `tests/loop_checks.py` shows that a run with skips equals one without those
samples bitwise.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe.layer import auxiliary_loss, collect_statistics
from moe.routing import RoutingStats
from trainer.diffusion.flow import training_loss
from trainer.loop.prepared import Prepared
from trainer.telemetry.routing_metrics import router_vector
from trainer.telemetry.step_timer import StepTimer


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did. `losses` [num_micro_batches] and `router` are this rank's, on its device, not yet reduced.

    `stats` are those of the last micro-batch, one per MoE layer. `router` is empty where no statistics were asked for.
    """

    applied: bool
    losses: Tensor
    router: Tensor
    stats: list[RoutingStats]


def poisoned(loss: Tensor) -> Tensor:
    """The same loss, with a gradient of NaN where it is not finite (an infinite loss may have a finite gradient)."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def train_step(
    engine: Any, micro_batches: list[Prepared], rate: float, device: torch.device, timer: StepTimer, *, patch_size: int,
    statistics: bool,
) -> StepResult:  # fmt: skip
    """Run one optimizer step at a learning rate, with router statistics if wanted. Collective over all ranks.

    Routers may add a loss of their own; the losses that are reported are without it, so that routers compare.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    collect_statistics(engine.module, statistics)
    losses, router, last = [], [], []
    for micro in micro_batches:
        with timer.section("data"):
            noised = micro.noised.to(device)
        with timer.section("forward"):
            prediction, stats = engine(noised.x_BCHW, noised.t_B, noised.text_BLD, noised.text_mask_BL, noised.keep_BS)
            loss = training_loss(prediction, noised, patch_size)
            own = auxiliary_loss(stats)
            total = loss if own is None else loss + own
        with timer.section("backward"):
            engine.backward(poisoned(total))
        with timer.section("optimizer"):
            engine.step()
        losses.append(torch.where(total.isfinite(), loss, total).detach())
        if statistics:
            router.append(router_vector(stats, noised.t_B).to(device))
        last = [replace(item, auxiliary_loss=item.auxiliary_loss.detach()) for item in stats]
    mean = torch.stack(router).mean(0) if router else torch.zeros(0)
    return StepResult(applied=engine.was_step_applied(), losses=torch.stack(losses), router=mean, stats=last)


def suspects(result: StepResult, micro_batches: list[Prepared]) -> list[int]:
    """Global indices of this rank's samples in micro-batches whose own loss is not finite."""
    bad = (~result.losses.isfinite()).tolist()
    return [i for micro, is_bad in zip(micro_batches, bad, strict=True) if is_bad for i in micro.index_B.tolist()]
