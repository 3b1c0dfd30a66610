"""From the bytes of a picture file to upright RGB of the training size."""

import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageStat

# Grey, palette and colour, with or without transparency. Not among them: floats of unknown range, LAB, HSV.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "I")

_MAX_ASPECT = 64  # beyond it the crop of a line of pixels would need gigabytes
_MIN_STANDARD_DEVIATION = 2.0  # of 255; below it a picture is one colour (16-bit pictures saved wrongly are white)
_EXIF_ORIENTATION = 0x0112
# EXIF value -> what makes the picture upright, and the words img2dataset's metadata have for it.
_UPRIGHT = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, "Mirrored horizontal"),
    3: (Image.Transpose.ROTATE_180, "Rotated 180"),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, "Mirrored vertical"),
    5: (Image.Transpose.TRANSPOSE, "Mirrored horizontal then rotated 90 CCW"),
    6: (Image.Transpose.ROTATE_270, "Rotated 90 CW"),
    7: (Image.Transpose.TRANSVERSE, "Mirrored horizontal then rotated 90 CW"),
    8: (Image.Transpose.ROTATE_90, "Rotated 90 CCW"),
}


class BadPictureError(ValueError):
    """Bytes that cannot be used as a picture; the message says why, its cause what the decoder said."""


def orientation_of(metadata: dict[str, Any]) -> int:
    """EXIF orientation of the original, from the `exif` column: re-encoding ignored it and dropped the tag."""
    try:
        words = json.loads(metadata.get("exif") or "{}").get("Image Orientation")
    except (ValueError, AttributeError, TypeError, RecursionError):
        return 1
    return next((value for value, (_, known) in _UPRIGHT.items() if known == words), 1)


def read_rgb(content: bytes, orientation: int = 1) -> Image.Image:
    """Decode to upright 8-bit RGB: 16-bit grey is scaled, transparency becomes white; or BadPictureError.

    Of an animation the first frame. `orientation` is used when the file has no tag of its own.
    """
    try:
        return _read_rgb(content, orientation)
    except (BadPictureError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly every type for damaged bytes, RuntimeError too
        raise BadPictureError("picture that cannot be decoded") from error


def _read_rgb(content: bytes, orientation: int) -> Image.Image:
    image: Image.Image = Image.open(io.BytesIO(content))
    if max(image.size) > _MAX_ASPECT * min(image.size):
        raise BadPictureError(f"picture more than {_MAX_ASPECT} times as long as wide")
    if image.format == "EPS":  # Pillow would hand the file to Ghostscript, a program for trusted input
        raise BadPictureError("picture that is a PostScript program")
    image.load()
    if image.mode not in _MODES and not image.mode.startswith("I;16"):
        raise BadPictureError("picture of a mode that is neither grey nor colour")
    orientation = image.getexif().get(_EXIF_ORIENTATION, orientation)
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64)
        image = Image.fromarray((grey * (255 / 65535)).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation][0])
    return image.convert("RGB")


def is_constant(image: Image.Image) -> bool:
    """Whether the picture shows one colour only, give or take noise."""
    return max(ImageStat.Stat(image).stddev) < _MIN_STANDARD_DEVIATION


def cover_scale(image_height: int, image_width: int, height: int, width: int) -> float:
    """By what a picture's sides are multiplied until it covers a rectangle."""
    return max(width / image_width, height / image_height)


def cover_crop(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """Resize until the picture covers a rectangle, keep the middle: [height, width, 3]."""
    scale = cover_scale(image.height, image.width, height, width)
    resized = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.LANCZOS)
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


def nearest_bucket(sizes: Sequence[tuple[int, int]], height: int, width: int) -> int:
    """Which of some (height, width) has the aspect ratio nearest to a picture's, by their quotient."""
    quotients = [abs(math.log(width * h / (height * w))) for h, w in sizes]
    return quotients.index(min(quotients))


def shorter_side(sizes: Sequence[tuple[int, int]]) -> int:
    """To how many pixels on their shorter side pictures may be reduced and still cover the nearest (height, width).

    The squarest of the pictures that a size is nearest to needs most. Its longer side is rounded when it is reduced.
    """
    ratios = [math.log(w / h) for h, w in sizes]
    needed = []
    for (h, w), ratio in zip(sizes, ratios, strict=True):
        lowest = max(((ratio + other) / 2 for other in ratios if other < ratio), default=-math.inf)
        highest = min(((ratio + other) / 2 for other in ratios if other > ratio), default=math.inf)
        squarest = min(max(0.0, lowest), highest)
        stretch = math.exp(abs(squarest))
        short, long = (h, w) if squarest >= 0 else (w, h)
        needed.append(max(short, long if math.isclose(stretch, 1) else math.ceil((long + 0.5) / stretch)))
    return max(needed)
