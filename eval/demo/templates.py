"""What every object looks like at every size the detector looks for: templates with transparency.

A template is the object's own light P (premultiplied by its coverage) and the share V of the background
that shows through, so that P + V b is the object on background colour b. Blurring is linear, so both are
blurred once here. Shapes: T templates of one size, k x k pixels.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from trainer.data.demo.emoji import sprite
from trainer.data.demo.scenes import OBJECTS

_OVERSAMPLING = 4  # as the scenes are drawn: objects lie on a grid of a quarter pixel
_MARGIN = 3  # pixels around a template while it is blurred


@dataclass(frozen=True, kw_only=True)
class TemplateBank:
    """All objects at one `size` (pixels), each at several sub-pixel offsets.

    `light_T3kk` in [0, 1] is the object's own light, `through_Tkk` the share of the background that is
    seen. `names` and `offsets` (x, y of the object's corner in the window, pixels) have T entries.
    """

    size: float
    names: tuple[str, ...]
    offsets: tuple[tuple[float, float], ...]
    light_T3kk: Tensor
    through_Tkk: Tensor


def gaussian_blur(x_NCHW: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur that repeats the border; `sigma` in pixels, 0 changes nothing."""
    if sigma == 0:
        return x_NCHW
    radius = max(1, round(3 * sigma))
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).to(x_NCHW.dtype)
    channels = x_NCHW.shape[1]
    kernel = taps.expand(channels, 1, 1, -1)
    padded = functional.pad(x_NCHW, (radius, radius, radius, radius), mode="replicate")
    rows = functional.conv2d(padded, kernel, groups=channels)
    return functional.conv2d(rows, kernel.transpose(2, 3), groups=channels)


def _template(name: str, pixels: int, dx: int, dy: int, window: int, blur: float) -> Tensor:
    """Premultiplied light and coverage [4, window, window] of one object, `pixels` on the fine grid."""
    side = window + 2 * _MARGIN
    canvas = np.zeros((4, side * _OVERSAMPLING, side * _OVERSAMPLING), np.float32)
    drawn = np.asarray(sprite(name, pixels), np.float32).transpose(2, 0, 1) / 255
    x, y = _MARGIN * _OVERSAMPLING + dx, _MARGIN * _OVERSAMPLING + dy
    canvas[:3, y : y + pixels, x : x + pixels] = drawn[:3] * drawn[3]
    canvas[3, y : y + pixels, x : x + pixels] = drawn[3]
    reduced = [np.asarray(Image.fromarray(part).resize((side, side), Image.Resampling.LANCZOS)) for part in canvas]
    blurred = gaussian_blur(torch.from_numpy(np.stack(reduced))[None], blur)[0]
    return blurred[:, _MARGIN:-_MARGIN, _MARGIN:-_MARGIN]


@lru_cache(maxsize=64)
def build_bank(pixels: int, step: int, blur: float) -> TemplateBank:
    """Templates of objects that are `pixels` quarter pixels wide, at offsets of multiples of `step`."""
    window = -(-(pixels + _OVERSAMPLING - step) // _OVERSAMPLING)
    shifts = range(0, _OVERSAMPLING, step)
    keys = [(name, dx, dy) for name in OBJECTS for dx in shifts for dy in shifts]
    stack = torch.stack([_template(name, pixels, dx, dy, window, blur) for name, dx, dy in keys])
    return TemplateBank(
        size=pixels / _OVERSAMPLING,
        names=tuple(name for name, _, _ in keys),
        offsets=tuple((dx / _OVERSAMPLING, dy / _OVERSAMPLING) for _, dx, dy in keys),
        light_T3kk=stack[:, :3].contiguous(),
        through_Tkk=(1 - stack[:, 3]).contiguous(),
    )
