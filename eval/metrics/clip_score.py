"""CLIP score: cosine between a picture's and its caption's features, in float64.

Three forms are in use: the raw cosine, 100 max(cosine, 0) per picture, and the paper's 2.5 max(cosine, 0)
(arXiv 2104.08718). R-precision: share of pictures whose own caption is closer than 99 other ones.
Shapes: N pictures, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

DISTRACTORS = 99


@dataclass(frozen=True, kw_only=True)
class ClipScore:
    """Mean raw cosine and its standard error, the 100 x and 2.5 x forms, and the count."""

    cosine: float
    standard_error: float
    score100: float
    score100_standard_error: float
    paper: float
    count: int


def cosines(images_ND: Tensor, texts_ND: Tensor) -> Tensor:
    """Cosine of each pair, float64 [N]."""
    return (functional.normalize(images_ND.double(), dim=1) * functional.normalize(texts_ND.double(), dim=1)).sum(1)


def clip_score(cosine_N: Tensor) -> ClipScore:
    """Summary of cosines; raises ValueError below two."""
    if len(cosine_N) < 2:
        raise ValueError(f"{len(cosine_N)} pictures: the standard error needs 2 or more")
    positive_N = cosine_N.clamp_min(0)
    root = len(cosine_N) ** 0.5
    return ClipScore(
        cosine=float(cosine_N.mean()),
        standard_error=float(cosine_N.std() / root),
        score100=100 * float(positive_N.mean()),
        score100_standard_error=100 * float(positive_N.std() / root),
        paper=2.5 * float(positive_N.mean()),
        count=len(cosine_N),
    )


def r_precision(
    images_ND: Tensor, texts_ND: Tensor, captions: Sequence[str], *, distractors: int = DISTRACTORS, seed: int = 0
) -> tuple[float, int]:
    """Share of pictures closer to their caption than to every distractor, and how many distractors there were.

    Distractors are distinct captions other than the picture's own, drawn by `seed`; with fewer captions all
    others are used. Raises ValueError when there is no other caption.
    """
    distinct = {text: i for i, text in reversed(list(enumerate(captions)))}  # caption -> its first row
    texts = sorted(distinct)
    others = min(distractors, len(texts) - 1)
    if others < 1:
        raise ValueError("R-precision needs two captions that differ")
    numbers = {text: i for i, text in enumerate(texts)}
    table_KD = functional.normalize(texts_ND[[distinct[text] for text in texts]].double(), dim=1)
    images_ND = functional.normalize(images_ND.double(), dim=1)
    draw = np.random.default_rng(seed)
    right = 0
    for image_D, caption in zip(images_ND, captions, strict=True):
        own = numbers[caption]
        chosen = draw.choice(len(texts) - 1, others, replace=False)
        chosen += chosen >= own  # skip the picture's own caption
        right += bool((table_KD[own] @ image_D) > (table_KD[torch.from_numpy(chosen)] @ image_D).max())
    return right / len(captions), others
