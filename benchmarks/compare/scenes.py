"""Scenes of 64 x 64 pixels drawn on the fly, each a pure function of (seed, index): no scene is met twice in training.

One to six objects of hundreds of kinds on one of sixty patterned backgrounds, with a caption that says all but the
exact places. Kinds differ in frequency (kinds.py), so that the loss can be read by how rare an object is.

Shapes: N scenes, pixels [3, SIZE, SIZE] in -1 to 1.
"""

import random
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from benchmarks.compare.kinds import NUM_KINDS, OFFSET, kinds, sprite

SIZE = 64
COLORS = {
    "white": (250, 250, 250), "black": (25, 25, 25), "red": (215, 40, 45), "orange": (240, 140, 40),
    "yellow": (250, 220, 60), "green": (50, 160, 70), "blue": (45, 95, 215), "purple": (130, 60, 180),
    "pink": (250, 160, 190), "brown": (130, 85, 50), "gray": (140, 140, 140), "turquoise": (60, 200, 200),
}  # fmt: skip
PATTERNS = ("plain", "striped", "dotted", "checked", "fading")
NUMBERS = ("one", "two", "three", "four", "five", "six")
RELATIONS = ("left of", "right of", "above", "below")
CATEGORIES = {"single": 0.3, "pair": 0.2, "relation": 0.25, "counting": 0.25}
OBJECTS_PER_SCENE = 0.3 + 2 * 0.2 + 2 * 0.25 + 4 * 0.25  # in the mean
# All places are multiples of GRID, a token's side: what is to be learned is how each kind looks, not how to shift it.
GRID = 8
_SINGLE_SIDE, _PAIR_SIDE, _COUNT_SIDE = 48, 24, 16


@dataclass(frozen=True)
class Placed:
    """One drawn object: rank of its kind, left and upper edge and side in pixels."""

    rank: int
    left: int
    top: int
    side: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    category: str
    caption: str
    objects: tuple[Placed, ...]
    color: str
    pattern: str


@lru_cache(maxsize=8)
def _weights(num_kinds: int) -> list[float]:
    return list(accumulate(1 / (rank + OFFSET) for rank in range(num_kinds)))


def scene(seed: int, index: int, num_kinds: int = NUM_KINDS) -> Scene:
    """Scene number `index` of a seed, of the `num_kinds` most common kinds."""
    rng = random.Random(f"{seed}/{index}")
    category = rng.choices(list(CATEGORIES), list(CATEGORIES.values()))[0]
    color, pattern = rng.choice(list(COLORS)), rng.choice(PATTERNS)
    first, second = rng.choices(range(num_kinds), cum_weights=_weights(num_kinds), k=2)
    names = kinds()[first].name, kinds()[second].name
    if category == "single":
        objects = [_placed(rng, first, (0, SIZE), (0, SIZE), _SINGLE_SIDE)]
        what = f"one {names[0]}"
    elif category == "counting":
        count, cells = rng.randint(2, len(NUMBERS)), range(0, SIZE, _COUNT_SIDE)
        corners = rng.sample([(left, top) for left in cells for top in cells], count)
        objects = [Placed(first, *corner, _COUNT_SIDE) for corner in corners]
        what = f"{NUMBERS[count - 1]} of {names[0]}"
    else:
        relation = rng.choice(RELATIONS)
        halves = ((0, SIZE // 2), (SIZE // 2, SIZE))
        sides = halves if relation in ("left of", "above") else halves[::-1]
        across = relation in ("left of", "right of")
        objects = [
            _placed(rng, rank, half if across else (0, SIZE), (0, SIZE) if across else half, _PAIR_SIDE)
            for rank, half in zip((first, second), sides, strict=True)
        ]
        what = f"{names[0]} {relation if category == 'relation' else 'and'} {names[1]}"
    return Scene(category, f"{what} on {pattern} {color}", tuple(objects), color, pattern)


def _placed(rng: random.Random, rank: int, x: tuple[int, int], y: tuple[int, int], side: int) -> Placed:
    """Anywhere on the grid between these edges."""
    left, top = (rng.randrange(low, high - side + 1, GRID) for low, high in (x, y))
    return Placed(rank, left, top, side)


def render(drawn: Scene) -> NDArray[np.float32]:
    """The scene as [3, SIZE, SIZE] in -1 to 1."""
    picture = _background(drawn.color, drawn.pattern).copy()
    for item in drawn.objects:
        figure = sprite(item.rank, item.side)
        box = picture[:, item.top : item.top + item.side, item.left : item.left + item.side]
        box *= 1 - figure[3]
        box += figure[:3]
    return picture * 2 - 1


@lru_cache(maxsize=len(COLORS) * len(PATTERNS))
def _background(color: str, pattern: str) -> NDArray[np.float32]:
    rgb = np.asarray(COLORS[color], np.float32)[:, None, None] / 255
    other = rgb * 0.75 if rgb.mean() > 0.3 else rgb * 0.75 + 0.25
    y, x = np.mgrid[:SIZE, :SIZE]
    share = {
        "plain": np.zeros((SIZE, SIZE)), "striped": (x + y) // 8 % 2, "fading": y / (SIZE - 1),
        "dotted": ((x % 16 - 8) ** 2 + (y % 16 - 8) ** 2 < 12), "checked": (x // 16 + y // 16) % 2,
    }[pattern].astype(np.float32)  # fmt: skip
    drawn: NDArray[np.float32] = (rgb * (1 - share) + other * share).astype(np.float32)
    return drawn
