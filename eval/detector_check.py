"""What the detector reaches on true pictures of the built-in scenes, clean and degraded: its ceiling.

`python -m eval.detector --self-test` prints the table. Extra detections are found objects beyond those
that the scene has. Shapes: N pictures of H x W pixels.
"""

import time
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eval.detector import PICTURE_SIZE, RULES, DetectorConfig, detect
from eval.geneval import Summary, judge, summarize
from eval.prompts import Prompt, demo_prompts, render_prompts
from eval.templates import gaussian_blur
from trainer.data.scenes import Scene


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
    verdicts = [judge(prompt.metadata, items, RULES) for prompt, items in zip(prompts, found, strict=True)]
    extra = 0
    for prompt, items in zip(prompts, found, strict=True):
        scene = Scene.from_json(prompt.metadata["scene"])
        surplus = Counter(item.name for item in items) - Counter(item.name for item in scene.objects)
        extra += surplus.total()
    summary = summarize([prompt.tag for prompt in prompts], [prompt.id for prompt in prompts], verdicts)
    return Ceiling(summary=summary, extra_per_picture=extra / len(prompts), seconds=seconds)


def print_self_test(per_category: int, seed: int) -> None:
    """Table of ceilings: clean and degraded pictures at the default threshold, and at others."""
    prompts = demo_prompts(seed, per_category)
    clean = render_prompts(prompts, PICTURE_SIZE)
    default = DetectorConfig()
    rows = [("true pictures", clean, default)]
    for blur, noise, shift in ((0.7, 0.05, 0.0), (0.7, 0.05, 0.08), (1.0, 0.08, 0.05)):
        name = f"blur {blur} noise {noise} shift {shift}"
        rows.append((name, degrade(clean, blur, noise, shift), default))
    hard = degrade(clean, 0.7, 0.05, 0.0)
    rows += [(f"blur 0.7, threshold {t}", hard, replace(default, min_score=t)) for t in (0.65, 0.7, 0.75, 0.85, 0.9)]
    noise_NHWC = torch.rand(clean.shape, generator=torch.Generator().manual_seed(seed))
    rows.append(("white noise", (noise_NHWC * 255).byte(), default))
    clouds_NCHW = gaussian_blur(noise_NHWC.permute(0, 3, 1, 2), 2.0)
    clouds_NHWC = (clouds_NCHW - 0.5).mul(5).add(0.5).clamp(0, 1).permute(0, 2, 3, 1)
    rows.append(("clouds (noise of blur 2)", (clouds_NHWC * 255).byte(), default))
    header = ["pictures", *dict.fromkeys(prompt.tag for prompt in prompts), "extra", "seconds"]
    print("  ".join(f"{title:>13s}" if i else f"{title:<34s}" for i, title in enumerate(header)))
    for name, pictures, config in rows:
        ceiling = measure(prompts, pictures, config)
        values = [f"{score.value:.3f}" for score in ceiling.summary.tags.values()]
        values += [f"{ceiling.extra_per_picture:.4f}", f"{ceiling.seconds:.1f}"]
        print(f"{name:<34s}  " + "  ".join(f"{value:>13s}" for value in values))
