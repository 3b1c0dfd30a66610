"""The embedded picture set: small scenes of drawn objects with exact captions and labels.

Six categories named after GenEval. Some object-colour and object-object combinations never occur in a
training scene, so that `held_out_scenes` asks for compositions the model has not seen. Every scene is a
pure function of (seed, index).
"""

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain, combinations, permutations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.data.demo.emoji import EMOJI_NAMES, sprite

OBJECTS = tuple(EMOJI_NAMES)
COLORS = {
    "white": (250, 250, 250),
    "black": (25, 25, 25),
    "red": (215, 40, 45),
    "yellow": (250, 220, 60),
    "green": (50, 160, 70),
    "blue": (45, 95, 215),
    "purple": (130, 60, 180),
    "pink": (250, 160, 190),
}
RELATIONS = ("left of", "right of", "above", "below")
_READING_ORDER = ("left of", "above")  # of two objects without a relation, the first named is met first
NUMBER_WORDS = ("one", "two", "three", "four")
# Share of each category in the training scenes. single_object and colors differ in judging alone.
CATEGORY_WEIGHTS = {
    "single_object": 0.22,
    "two_object": 0.14,
    "counting": 0.12,
    "colors": 0.24,
    "position": 0.15,
    "color_attr": 0.13,
}
CATEGORIES = tuple(CATEGORY_WEIGHTS)

_HELD_OUT_SHARE = 0.2
_OVERSAMPLING = 4
_LOW, _MIDDLE, _HIGH = 0.26, 0.5, 0.74  # centres of the cells of a 2 x 2 arrangement, and of the picture
_CORNERS = tuple(product((_LOW, _HIGH), (_LOW, _HIGH)))
_PAIR_SIZE = 0.46
_TILE_OBJECT_SIZE = 0.44
_SINGLE_SIZES = (0.72, 0.84)
_GRID = 32  # sizes and corners are whole pixels of a picture of this size: small drawings stay sharp
_COUNT_SIZES = {1: 0.62, 2: 0.46, 3: 0.43, 4: 0.42}


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One drawn object: centre (x right, y down) and size as fractions of the picture; colour behind it."""

    name: str
    x: float
    y: float
    size: float
    background: str


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture's description with all labels that scoring needs.

    `objects` is in the order of the caption. `count` is len(objects). `relation` is one of RELATIONS, of
    the first object to the second, in category position, else "". In color_attr the left half of the
    picture has the first object's background and the right half the second's.
    """

    category: str
    caption: str
    objects: tuple[SceneObject, ...]
    count: int
    relation: str = ""

    def to_json(self) -> str:
        """One line of JSON; `from_json` of it gives an equal scene."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "Scene":
        """Inverse of `to_json`."""
        content: dict[str, Any] = json.loads(text)
        content["objects"] = tuple(SceneObject(**item) for item in content["objects"])
        return Scene(**content)


@dataclass(frozen=True)
class _Content:
    """What a scene says, without its layout: name and colour of each object."""

    names: tuple[str, ...]
    colors: tuple[str, ...]
    relation: str = ""


def _choose_held_out(candidates: list[tuple[str, str]]) -> frozenset[tuple[str, str]]:
    """A seeded fifth of the candidate pairs, spread so that no word has many more than its share."""
    random.Random("held out").shuffle(candidates)
    wanted = round(_HELD_OUT_SHARE * len(candidates))
    total, used = Counter(chain.from_iterable(candidates)), Counter[str]()
    chosen: list[tuple[str, str]] = []
    for pair in candidates:
        if len(chosen) < wanted and all(used[w] <= _HELD_OUT_SHARE * total[w] for w in pair):
            chosen.append(pair)
            used.update(pair)
    return frozenset(chosen)


HELD_OUT_COLORS = _choose_held_out(list(product(OBJECTS, COLORS)))  # (object, colour behind it)
HELD_OUT_PAIRS = _choose_held_out(list(combinations(OBJECTS, 2)))  # (object, object), alphabetical


def _held_out_parts(content: _Content) -> tuple[bool, bool]:
    """Whether an object-colour pair and whether an object-object pair of it is held out."""
    colors = zip(content.names, content.colors, strict=True)
    return not HELD_OUT_COLORS.isdisjoint(colors), tuple(sorted(content.names)) in HELD_OUT_PAIRS


def _all_contents(category: str) -> Iterator[_Content]:
    """Every content a category can have, held out or not."""
    if category == "color_attr":
        yield from (_Content(n, c) for n, c in product(permutations(OBJECTS, 2), permutations(COLORS, 2)))
    elif category in ("two_object", "position"):
        relations = RELATIONS if category == "position" else ("",)
        for names, color, relation in product(permutations(OBJECTS, 2), COLORS, relations):
            yield _Content(names, (color, color), relation)
    else:
        counts = range(1, len(NUMBER_WORDS) + 1) if category == "counting" else (1,)
        for name, color, count in product(OBJECTS, COLORS, counts):
            yield _Content((name,) * count, (color,) * count)


@lru_cache(maxsize=2 * len(CATEGORIES))
def _contents(category: str, held_out: bool) -> tuple[_Content, ...]:
    """Contents of the training scenes, or of the held-out scenes.

    A held-out scene of two objects is new in the pair of objects alone: each object-colour pair was seen.
    """
    by_pair = category in ("two_object", "position", "color_attr")
    wanted = (held_out and not by_pair, held_out and by_pair)
    return tuple(content for content in _all_contents(category) if _held_out_parts(content) == wanted)


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _caption(category: str, content: _Content) -> str:
    names, color = content.names, content.colors[0]
    if category == "color_attr":
        tiles = zip(names, content.colors, strict=True)
        return " and ".join(f"{_article(name)} on {_article(tile)} tile" for name, tile in tiles)
    if category == "counting":
        suffix = "" if len(names) == 1 else "es" if names[0].endswith("sh") else "s"
        what = f"{NUMBER_WORDS[len(names) - 1]} {names[0]}{suffix}"
    else:
        what = f" {content.relation or 'and'} ".join(map(_article, names))
    return f"{what} on {_article(color)} background"


@lru_cache(maxsize=1)
def all_captions() -> frozenset[str]:
    """Every caption that a scene can have, held out or not."""
    return frozenset(_caption(category, content) for category in CATEGORIES for content in _all_contents(category))


def _pair_centres(relation: str, rng: random.Random) -> list[tuple[float, float]]:
    """Centres of two objects, the first standing in `relation` to the second."""
    near = _MIDDLE + rng.uniform(-0.1, 0.1), _MIDDLE + rng.uniform(-0.1, 0.1)
    centres = [(_LOW, near[0]), (_HIGH, near[1])]
    if relation in ("above", "below"):
        centres = [(x, y) for y, x in centres]
    return centres if relation in _READING_ORDER else centres[::-1]


def _layout(category: str, content: _Content, rng: random.Random) -> list[tuple[float, float, float]]:
    """(x, y, size) of each object."""
    if category in ("single_object", "colors"):
        centres, size, jitter = [(_MIDDLE, _MIDDLE)], rng.uniform(*_SINGLE_SIZES), 0.06
    elif category == "counting":
        count = len(content.names)
        size, jitter, centres = _COUNT_SIZES[count], 0.02, rng.sample(_CORNERS, count)
        if count == 1:
            centres, jitter = [(_MIDDLE, _MIDDLE)], 0.15
    elif category == "color_attr":
        centres, size, jitter = [(0.25, _MIDDLE), (0.75, _MIDDLE)], _TILE_OBJECT_SIZE, 0.02
        centres = [(x, y + rng.uniform(-0.15, 0.15)) for x, y in centres]
    else:
        centres = _pair_centres(content.relation or rng.choice(_READING_ORDER), rng)
        size, jitter = _PAIR_SIZE, 0.02
    return [(x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter), size) for x, y in centres]


def _snap(x: float, y: float, size: float) -> tuple[float, float, float]:
    """The nearest place and size on the grid."""
    pixels = round(size * _GRID)
    x, y = ((round(centre * _GRID - pixels / 2) + pixels / 2) / _GRID for centre in (x, y))
    return x, y, pixels / _GRID


def _build(category: str, content: _Content, rng: random.Random) -> Scene:
    places = [_snap(*place) for place in _layout(category, content, rng)]
    objects = tuple(
        SceneObject(name=name, x=x, y=y, size=size, background=color)
        for name, color, (x, y, size) in zip(content.names, content.colors, places, strict=True)
    )
    caption = _caption(category, content)
    return Scene(category=category, caption=caption, objects=objects, count=len(objects), relation=content.relation)


def training_scene(seed: int, index: int) -> Scene:
    """Training scene number `index`: a pure function of both, never with a held-out combination."""
    rng = random.Random(f"train/{seed}/{index}")
    category = rng.choices(CATEGORIES, list(CATEGORY_WEIGHTS.values()))[0]
    return _build(category, rng.choice(_contents(category, False)), rng)


def held_out_scenes(seed: int, per_category: int) -> list[Scene]:
    """`per_category` scenes of each category, each with a held-out combination.

    The combination is object-colour in single_object, counting and colors, and object-object in the rest.
    Captions differ within a category until all of its held-out contents are used; then they repeat.
    """
    scenes = []
    for category in CATEGORIES:
        rng = random.Random(f"held out/{seed}/{category}")
        pool = list(_contents(category, True))
        rng.shuffle(pool)
        scenes += [_build(category, pool[i % len(pool)], rng) for i in range(per_category)]
    return scenes


def render(scene: Scene, size: int) -> NDArray[np.uint8]:
    """The scene as RGB [size, size, 3], drawn at 4 times the size and reduced."""
    side = _OVERSAMPLING * size
    canvas = Image.new("RGB", (side, side), COLORS[scene.objects[0].background])
    if scene.category == "color_attr":
        canvas.paste(COLORS[scene.objects[1].background], (side // 2, 0, side, side))
    for item in scene.objects:
        pixels = max(1, round(item.size * side))
        picture = sprite(item.name, pixels)
        canvas.paste(picture, (round(item.x * side - pixels / 2), round(item.y * side - pixels / 2)), picture)
    return np.array(canvas.resize((size, size), Image.Resampling.LANCZOS))
