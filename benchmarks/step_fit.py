"""What a step is made of, from its seconds at several micro-batch sizes: what grows with the images, and what does not.

A step takes the longer of two: the host's time, which does not depend on the images, and the GPU's, a line.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.errors import require


@dataclass(frozen=True, kw_only=True)
class StepFit:
    """`host` seconds whatever the size (None: no size was small enough to show it), or `fixed + image * images`."""

    host: float | None
    image: float
    fixed: float

    def seconds(self, images: float) -> float:
        """Of a step of so many images."""
        return max(self.host or 0.0, self.fixed + self.image * images)

    def __str__(self) -> str:
        host = "not seen" if self.host is None else f"{1e3 * self.host:.3g} ms a step"
        return f"GPU {1e3 * self.image:.4g} ms an image + {1e3 * self.fixed:.3g} ms a step (intercept); host {host}"


def read_sizes(text: str) -> list[int]:
    """The sizes of `--micro-batches`, ascending; none for an empty text."""
    parts = [part.strip() for part in text.split(",")] if text else []
    good = all(part.isdecimal() and int(part) >= 1 for part in parts)
    require(
        good and len({*parts}) == len(parts) != 1,
        f"--micro-batches is {text}: use two or more different sizes, for instance 32,64,128",
    )
    return sorted(int(part) for part in parts)


def fit_steps(images: Sequence[int], seconds: Sequence[float]) -> StepFit:
    """The best of all ways to take the first sizes as the host's and the rest as a line; `images` ascend.

    The best has the smallest sum of squared relative errors. A line needs two sizes, or there is none.
    """
    fits = [StepFit(host=sum(seconds) / len(seconds), image=0.0, fixed=0.0)]
    for split in range(len(images) - 1):
        host = sum(seconds[:split]) / split if split else None
        image, fixed = line(images[split:], seconds[split:])
        fits.append(StepFit(host=host, image=image, fixed=fixed))

    def error(fit: StepFit) -> float:
        return sum((fit.seconds(x) / y - 1) ** 2 for x, y in zip(images, seconds, strict=True))

    return min(fits, key=lambda fit: round(error(fit), 9))


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept of least squares."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return slope, mean_y - slope * mean_x
