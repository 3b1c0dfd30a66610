"""Where a trained model's experts compute: does a token get more of them where the picture has more detail?

The paper says that text-heavy and detailed regions get more. Asked here as a correlation, over the tokens of all
pictures, between the number of experts that take a token, summed over the layers, and the detail of the clean picture
under it; against the same with other pictures' detail (shuffled), which keeps where in a picture detail usually lies.

Shapes: B scenes, S = 8 x 8 image tokens.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.compare.data import Noised
from benchmarks.compare.scenes import SIZE, render
from benchmarks.compare.training import Run
from benchmarks.compare.validation import BACKGROUND, PLACES, TIMES, TOKEN, held_out, places
from trainer.diffusion.flow import interpolate

SCENES, SHUFFLES = 256, 200


def detail(pixels_B3HW: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels under each token, [B, S]."""
    across, down = pixels_B3HW.diff(dim=-1).abs().mean(1), pixels_B3HW.diff(dim=-2).abs().mean(1)
    both = torch.nn.functional.pad(across, (0, 1)) + torch.nn.functional.pad(down, (0, 0, 0, 1))
    return torch.nn.functional.avg_pool2d(both[:, None], TOKEN)[:, 0].flatten(1)


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, over all values."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


@torch.no_grad()
def where_it_computes(run: Run) -> dict[str, Any]:
    """By time: the correlation, the highest of the shuffled ones, experts per token on objects and background, and the
    share of tokens on objects that no expert takes, mean over the layers. Sets the model to its averaged weights.
    """
    count = SCENES
    scenes, x0, x1, text, mask = held_out(count, run.config.num_kinds)
    pixels = torch.from_numpy(np.stack([render(s) for s in scenes]))
    assert pixels.shape[-1] == SIZE
    detail_BS = detail(pixels)
    on_object_BS = torch.from_numpy(places(scenes)) != PLACES.index(BACKGROUND)
    orders = [torch.randperm(count, generator=torch.Generator().manual_seed(i)) for i in range(SHUFFLES)]
    run.publish(run.average)
    run.model.eval()
    found = {}
    for time in TIMES:
        t_B = torch.full((count,), time)
        noised = Noised(interpolate(x0, x1, t_B), t_B, x1 - x0, text, mask).to(run.device)
        layers = [layer.statistics().experts_per_token_BS.cpu().float() for layer in run.predict(noised)[1]]
        experts_BS = torch.stack(layers).sum(0)
        untaken = torch.stack([(layer == 0).float() for layer in layers]).mean(0)
        found[str(time)] = {
            "correlation": correlation(experts_BS, detail_BS),
            "shuffled_highest": max(correlation(experts_BS, detail_BS[order]) for order in orders),
            "on_objects": float(experts_BS[on_object_BS].mean()) / len(layers),
            "on_background": float(experts_BS[~on_object_BS].mean()) / len(layers),
            "untaken_on_objects": float(untaken[on_object_BS].mean()),
            "untaken_on_background": float(untaken[~on_object_BS].mean()),
        }
    return found
