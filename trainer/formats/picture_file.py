"""Picture files that say how they were drawn: PNG, JPEG and WebP with a caption and settings that can be read back.

In PNG the settings are the text `Comment` (the caption is `Description`), in JPEG and WebP the EXIF tag
ImageDescription: one JSON object in ASCII, so that exiftool and the like show it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from trainer.errors import ConfigError, require, writing
from trainer.files import replacing

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
SUFFIXES = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}
_SOFTWARE, _IMAGE_DESCRIPTION, _SOFTWARE_TAG = "EC-DIT", 0x010E, 0x0131
_SEEN = 128  # pixels of the larger side
_MAX_EXIF = 60_000  # bytes; a JPEG has 64 KiB for it


@dataclass(frozen=True, kw_only=True)
class PictureFiles:
    """Where pictures go: into the folder `out`, or into `out` itself (`is_file`), as `kind`, a key of FORMATS."""

    out: Path
    kind: str
    is_file: bool

    def path(self, number: int, prompt: str, seed: int) -> Path:
        """The file of a picture of prompt `number`: its number, what its name can hold of the prompt, the seed."""
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:40].strip("-")
        name = "_".join(filter(None, (f"{number:04d}", words, str(seed))))
        return self.out if self.is_file else self.out / f"{name}.{self.kind}"


def enlargement(height: int, width: int) -> int:
    """How many times to enlarge a picture by whole pixels so that it can be looked at: 1 from 128 pixels on."""
    return max(1, -(-_SEEN // max(height, width)))


def enlarged(picture: Image.Image, scale: int) -> Image.Image:
    """Each pixel as a square of `scale` pixels."""
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def write_picture_file(path: Path, picture: Image.Image, kind: str, settings: Mapping[str, Any]) -> None:
    """Write a picture whole or not at all, replacing one of that name; `kind` is a key of FORMATS."""
    text = json.dumps(settings)
    options: dict[str, Any]
    if kind == "png":
        notes = PngInfo()
        notes.add_itxt("Description", str(settings.get("prompt", "")))
        notes.add_text("Comment", text)
        notes.add_text("Software", _SOFTWARE)
        options = {"pnginfo": notes}
    else:
        require(len(text) < _MAX_EXIF, f"{path}: the prompt is too long for a {kind}'s metadata: use --format png")
        exif = Image.Exif()
        exif[_IMAGE_DESCRIPTION], exif[_SOFTWARE_TAG] = text, _SOFTWARE
        options = {"exif": exif, "quality": 95} | ({"subsampling": 0} if kind == "jpg" else {"method": 4})
    with writing(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            picture.save(temporary, FORMATS[kind], **options)


def read_settings(path: Path | str) -> dict[str, Any]:
    """What `write_picture_file` was told of a picture; ConfigError for a file that says nothing of the kind."""
    try:
        with Image.open(path) as picture:
            text = picture.info.get("Comment") if picture.format == "PNG" else picture.getexif().get(_IMAGE_DESCRIPTION)
        found: dict[str, Any] = dict(json.loads(text or ""))
    except (OSError, UnidentifiedImageError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} does not say how it was drawn: name a picture of trainer.sample") from error
    return found
