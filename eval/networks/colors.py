"""Colours of detected objects as GenEval judges them: zero-shot CLIP on the masked, cropped object.

Pixels outside the mask become #999, the picture is cropped to the box, and the ten colours are compared through three
templates per class, whose normalised features are averaged and normalised again. Shapes: N objects, K = 10 colours.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from eval.networks.clip import ClipModel, find_clip, network_name
from eval.networks.protocols import FoundObject
from eval.pictures.geneval_names import COLORS
from eval.weights import file_sha256

BLANK = (0x99, 0x99, 0x99)
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class ColorJudge(Protocol):
    """Objects of one class to colour probabilities."""

    def classify(self, picture_HW3: Tensor, found: Sequence[FoundObject], name: str) -> Tensor:
        """Probability of each colour of each object, fp32 [N, K]."""
        ...


def crop(picture_HW3: Tensor, item: FoundObject) -> Image.Image:
    """The object's box cut out, grey outside of its mask; at least one pixel wide and high."""
    image = Image.fromarray(picture_HW3.numpy())
    if item.mask_HW is not None:
        blank = Image.new("RGB", image.size, BLANK)
        image = Image.composite(image, blank, Image.fromarray(item.mask_HW.numpy()))
    x1, y1, x2, y2 = (round(value) for value in item.box)
    return image.crop((x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)))


class ClipColors:
    """GenEval's judge: zero-shot classification by CLIP (the official one is ViT-L-14:openai)."""

    def __init__(self, clip: ClipModel) -> None:
        self.clip = clip
        self._classifiers: dict[str, Tensor] = {}

    def classifier(self, name: str) -> Tensor:
        """CLIP features of the ten colours of objects of a class, one row a colour, fp32 [K, D]."""
        if name not in self._classifiers:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            features = functional.normalize(self.clip.encode_texts(texts), dim=1)
            mean_KD = features.unflatten(0, (len(COLORS), len(TEMPLATES))).mean(1)
            self._classifiers[name] = functional.normalize(mean_KD, dim=1)
        return self._classifiers[name]

    def classify(self, picture_HW3: Tensor, found: Sequence[FoundObject], name: str) -> Tensor:
        """Softmax over the ten colours of each object with CLIP's temperature of 100, fp32 [N, K]."""
        if not found:
            return torch.empty(0, len(COLORS))
        x_N3hw = torch.stack([self.clip.transform(crop(picture_HW3, item)) for item in found])
        features_ND = functional.normalize(self.clip.encode(x_N3hw), dim=1)
        return (100 * features_ND @ self.classifier(name).T).softmax(1)


# What the ten names look like on a screen: RGB in [0, 255].
_LIGHT = {
    "red": (214, 39, 40), "orange": (245, 140, 30), "yellow": (240, 220, 50), "green": (50, 150, 60),
    "blue": (45, 90, 200), "purple": (130, 70, 160), "pink": (240, 150, 190), "brown": (120, 75, 40),
    "black": (25, 25, 25), "white": (240, 240, 240),
}  # fmt: skip


class NearestColors:
    """Share of the object's pixels nearest to each colour: needs no weights, for checks; never comparable."""

    card: dict[str, str] = {"colors": "nearest-rgb-1", "weights_sha256": ""}  # noqa: RUF012

    def classify(self, picture_HW3: Tensor, found: Sequence[FoundObject], name: str) -> Tensor:
        """Share of each object's pixels that is nearest to each colour, fp32 [N, K]."""
        del name
        palette_K3 = torch.tensor([_LIGHT[color] for color in COLORS]).float()
        rows = torch.zeros(len(found), len(COLORS))
        for row, item in zip(rows, found, strict=True):
            x1, y1, x2, y2 = (max(round(value), 0) for value in item.box)
            pixels = picture_HW3[y1:y2, x1:x2]
            chosen = pixels.flatten(0, 1) if item.mask_HW is None else pixels[item.mask_HW[y1:y2, x1:x2]]
            if len(chosen):
                row += torch.bincount(torch.cdist(chosen.float(), palette_K3).argmin(1), minlength=len(COLORS))
                row /= len(chosen)
        return rows


def describe_colors(colors: str, clip: str) -> dict[str, str]:
    """`card` of the judge that --colors and --clip name, without loading it; ConfigError if it is not here."""
    if colors != "clip":
        return NearestColors.card
    arch, _, path = find_clip(clip)
    return {"colors": network_name(arch), "weights_sha256": file_sha256(path)}
