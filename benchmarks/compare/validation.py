"""Loss on scenes held out of training at fixed times and fixed noise, by time and by how rare an object is.

Shapes: B scenes, S = 8 x 8 image tokens.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.compare.data import Noised, latents, text_of
from benchmarks.compare.kinds import BINS, kinds
from benchmarks.compare.scenes import SIZE, Scene, scene
from trainer.diffusion.flow import interpolate
from trainer.randomness import keyed_generator

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
TOKEN = 8  # pixels of a token's side
HELD_OUT, HELD_OUT_SEED = 512, 10**9  # scenes, and their seed
BACKGROUND = "background"
PLACES = (*BINS, BACKGROUND)
Loss = dict[str, dict[str, float]]  # by time or "mean", by place or "all"


@lru_cache(maxsize=2)
def held_out(count: int, num_kinds: int) -> tuple[list[Scene], Tensor, Tensor, Tensor, Tensor]:
    """Scenes with latents, noise, text and mask."""
    scenes = [scene(HELD_OUT_SEED, i, num_kinds) for i in range(count)]
    x0 = latents(scenes)
    x1 = torch.stack([torch.randn(x0.shape[1:], generator=keyed_generator(HELD_OUT_SEED, i)) for i in range(count)])
    return scenes, x0, x1, *text_of(scenes)


def places(scenes: list[Scene]) -> NDArray[np.int64]:
    """What each token shows, [B, S]: number in `PLACES` of the object that covers its middle, else background."""
    found = np.full((len(scenes), SIZE // TOKEN, SIZE // TOKEN), PLACES.index(BACKGROUND))
    middle = np.arange(SIZE // TOKEN) * TOKEN + TOKEN / 2
    for number, item in enumerate(scenes):
        for placed in item.objects:
            rows = (middle > placed.top) & (middle < placed.top + placed.side)
            columns = (middle > placed.left) & (middle < placed.left + placed.side)
            found[number][np.ix_(rows, columns)] = PLACES.index(kinds()[placed.rank].bin)
    return found.reshape(len(scenes), -1)


@torch.no_grad()
def validation_loss(
    predict: Callable[[Noised], Tensor], device: torch.device, num_kinds: int, batch_size: int = 64
) -> Loss:
    """Mean squared error of the velocity: {"0.1": {"common": ..., "all": ...}, ..., "mean": ...}."""
    count = HELD_OUT
    scenes, x0, x1, text, mask = held_out(count, num_kinds)
    place_BS = torch.from_numpy(places(scenes))
    found: Loss = {}
    for time in TIMES:
        error_BS = []
        for start in range(0, count, batch_size):
            rows = slice(start, start + batch_size)
            t_B = torch.full((len(x0[rows]),), time)
            noised = Noised(interpolate(x0[rows], x1[rows], t_B), t_B, x1[rows] - x0[rows], text[rows], mask[rows])
            noised = noised.to(device)
            squared = (predict(noised).float() - noised.target_BCHW).square().mean(1, keepdim=True)
            error_BS.append(torch.nn.functional.avg_pool2d(squared, 2).flatten(1).cpu())
        errors = torch.cat(error_BS)
        here = {name: errors[place_BS == i] for i, name in enumerate(PLACES)}
        found[str(time)] = {name: float(values.mean()) for name, values in here.items() if len(values)}
        found[str(time)]["all"] = float(errors.mean())
    found["mean"] = {name: sum(found[str(t)][name] for t in TIMES) / len(TIMES) for name in found[str(TIMES[0])]}
    return found
