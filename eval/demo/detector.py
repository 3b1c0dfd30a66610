"""Detector of the built-in scenes by analysis through synthesis: nothing is trained.

Every window of a picture is compared with every object, at a ladder of sizes and sub-pixel offsets. A
template is P + V b (object light, share of visible background); the background b that explains a window w
best has a closed form, so backgrounds are fitted, not listed, and the fit names the colour behind the
object. With t = P + V b the score is 1 - |w - t|^2 / (energy of w + energy of t), energies about the mean
colour: 1 for equality, about 0 for a plain or an unrelated window, and little less than 1 for lower
contrast. Greedy selection takes the candidate that explains most of the picture's energy, then drops those
that overlap it: a part of a large object cannot beat the whole. A place that another object explains nearly
as well is left out: half a cat and half a dog is neither.
Shapes: N pictures, T templates of one size, h x w window places, k x k pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from eval.demo.templates import TemplateBank, build_bank, gaussian_blur
from eval.metrics.geneval import Detection, Rules
from trainer.data.demo.scenes import COLORS, OBJECTS

VERSION = "template-2"
PICTURE_SIZE = 32  # pixels; other sizes are reduced or enlarged to this
_CHUNK = 40  # pictures compared at once
_PADDING = 1  # border pixels repeated around the picture, for objects that touch it
_RIVAL_SCORE = 0.2  # how far below the least score of a detection a rival may lie
_SAME_PLACE = 0.7  # overlap from which two candidates explain the same thing,
_SAME_ENERGY = 0.5  # if the weaker explains this share of the other's energy or more
_FLOOR = 1e-3  # energy below which a window is plain, in squared [0, 1] light


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Score and lead were set on pictures that no model drew: true ones all pass, also blurred and noisy, and blends
    of two objects pass less often than by a score of 0.8 without a lead (`python -m eval.demo.detector_check`).
    """

    min_score: float = 0.7
    """Least score of a detection, 0 to 1."""
    min_lead: float = 0.3
    """Least share by which it leaves less unexplained (1 - score) than any other object at its place, 0 to 1."""
    blur: float = 0.6
    """Sigma of the blur that picture and templates get alike, pixels; 0 or more."""
    sizes: tuple[int, ...] = (48, 52, 56, 60, 65, 70, 76, 82, 89, 96, 104, 112)
    """Sizes of objects, quarter pixels."""
    step: int = 2
    """Distance of sub-pixel offsets, quarter pixels; 1, 2 or 4."""
    max_overlap: float = 0.3
    """Largest share of the smaller box that may lie in an accepted one, 0 to 1."""


RULES = Rules(score=0.0, counting_score=0.0)  # the detector's own threshold has been applied


class _Candidates(NamedTuple):
    """Windows above the threshold, K of them: picture, score, explained energy, object, box, background."""

    picture_K: Tensor
    score_K: Tensor
    gain_K: Tensor
    object_K: Tensor
    box_K4: Tensor
    color_K3: Tensor


def _correlate(x_NCHW: Tensor, kernel_Tkk: Tensor) -> Tensor:
    """Every channel with every kernel: [N, T, C, h, w]."""
    N, C, H, W = x_NCHW.shape
    out = functional.conv2d(x_NCHW.reshape(N * C, 1, H, W), kernel_Tkk[:, None])
    return out.reshape(N, C, *out.shape[1:]).transpose(1, 2)


def _match(x_N3HW: Tensor, bank: TemplateBank) -> tuple[Tensor, Tensor, Tensor]:
    """Score and explained energy [N, T, h, w], and fitted background [N, T, 3, h, w], of every window."""
    light, through = bank.light_T3kk, bank.through_Tkk
    pixels = through[0].numel()

    def places(value: Tensor) -> Tensor:
        return value[None, ..., None, None]

    ones = torch.ones_like(through[:1])
    sum_w = _correlate(x_N3HW, ones)
    square_w = _correlate(x_N3HW.square().sum(1, keepdim=True), ones)[:, :, 0]
    w_light = functional.conv2d(x_N3HW, light)
    w_through = _correlate(x_N3HW, through)
    light_through = (light * through[:, None]).sum((2, 3))
    through_square = through.square().sum((1, 2))
    # Least squares for w = P + V b, kept within the colours a screen can show.
    b = (w_through - places(light_through)) / places(through_square[:, None])
    b = b.clamp_(0, 1)
    square_t = places(light.square().sum((1, 2, 3))) + 2 * (b * places(light_through)).sum(2)
    square_t += places(through_square) * b.square().sum(2)
    sum_t = places(light.sum((2, 3))) + b * places(through.sum((1, 2))[:, None])
    error = (square_w - 2 * (w_light + (b * w_through).sum(2)) + square_t).clamp_min_(0)
    energy_w = square_w - sum_w.square().sum(2) / pixels
    energy_t = square_t - sum_t.square().sum(2) / pixels
    return 1 - error / (energy_w + energy_t + _FLOOR), energy_w - error, b


def _candidates(x_N3HW: Tensor, bank: TemplateBank, min_score: float) -> _Candidates:
    score, gain, color = _match(x_N3HW, bank)
    n, t, y, x = torch.nonzero(score > min_score, as_tuple=True)
    offset_T2 = torch.tensor(bank.offsets)
    corner_K2 = torch.stack([x, y], 1) + offset_T2[t] - _PADDING
    return _Candidates(
        picture_K=n,
        score_K=score[n, t, y, x],
        gain_K=gain[n, t, y, x],
        object_K=torch.tensor([OBJECTS.index(name) for name in bank.names])[t],
        box_K4=torch.cat([corner_K2, corner_K2 + bank.size], 1),
        color_K3=color[n, t, :, y, x],
    )


def _overlap(box_4: Tensor, boxes_K4: Tensor) -> Tensor:
    """Share of the smaller of two square boxes that lies in the other, [K]."""
    low = torch.maximum(box_4[:2], boxes_K4[:, :2])
    high = torch.minimum(box_4[2:], boxes_K4[:, 2:])
    area = (high - low).clamp_min(0).prod(1)
    return area / torch.minimum(box_4[2] - box_4[0], boxes_K4[:, 2] - boxes_K4[:, 0]).square()


def _leads(best: int, found: _Candidates, rows_K: Tensor, min_lead: float) -> bool:
    """Whether every other object at the place of candidate `best` leaves clearly more unexplained."""
    same_K = _overlap(found.box_K4[best], found.box_K4[rows_K]) > _SAME_PLACE
    same_K &= found.gain_K[rows_K] > _SAME_ENERGY * found.gain_K[best]
    rivals_K = rows_K[same_K & (found.object_K[rows_K] != found.object_K[best])]
    return bool((1 - found.score_K[best] <= (1 - min_lead) * (1 - found.score_K[rivals_K])).all())


def _select(found: _Candidates, rows_K: Tensor, config: DetectorConfig, scale: float) -> list[Detection]:
    """Greedy choice among the candidates `rows_K` of one picture, most explained energy first."""
    all_rows_K = rows_K
    rows_K = rows_K[found.score_K[rows_K] >= config.min_score]
    rows_K = rows_K[found.gain_K[rows_K].argsort(descending=True, stable=True)]
    palette = torch.tensor(list(COLORS.values())) / 255
    color_names = list(COLORS)
    detections = []
    while len(rows_K):
        best = int(rows_K[0])
        rows_K = rows_K[_overlap(found.box_K4[best], found.box_K4[rows_K]) <= config.max_overlap]
        if not _leads(best, found, all_rows_K, config.min_lead):
            continue
        color = int((palette - found.color_K3[best]).square().sum(1).argmin())
        x1, y1, x2, y2 = (value * scale for value in found.box_K4[best].tolist())
        detections.append(
            Detection(
                name=OBJECTS[int(found.object_K[best])],
                score=float(found.score_K[best]),
                box=(x1, y1, x2, y2),
                color=color_names[color],
            )
        )
    return sorted(detections, key=lambda item: -item.score)


def detect(pictures_NHWC: Tensor, config: DetectorConfig | None = None) -> list[list[Detection]]:
    """Objects in each uint8 picture [N, H, W, 3], best first; boxes in pixels of the given pictures.

    Raises ValueError unless the pictures are square.
    """
    config = config or DetectorConfig()
    return detect_at(pictures_NHWC, (config.min_score,), config)[0]


@torch.inference_mode()
def detect_at(
    pictures_NHWC: Tensor, min_scores: Sequence[float], config: DetectorConfig | None = None
) -> list[list[list[Detection]]]:
    """What `detect` finds with each of these `min_score`s; the pictures are compared with the templates once."""
    config = config or DetectorConfig()
    side = pictures_NHWC.shape[1]
    if pictures_NHWC.ndim != 4 or pictures_NHWC.shape[2] != side:
        raise ValueError(f"pictures of shape {tuple(pictures_NHWC.shape)}: need [N, H, H, 3]")
    configs = [replace(config, min_score=min_score) for min_score in min_scores]
    detections: list[list[list[Detection]]] = [[] for _ in configs]
    for chunk in pictures_NHWC.split(_CHUNK):
        x_N3HW = chunk.permute(0, 3, 1, 2).float().cpu() / 255
        if side != PICTURE_SIZE:
            size = (PICTURE_SIZE, PICTURE_SIZE)
            x_N3HW = functional.interpolate(x_N3HW, size, mode="bilinear", antialias=True)
        x_N3HW = functional.pad(gaussian_blur(x_N3HW, config.blur), (_PADDING,) * 4, mode="replicate")
        banks = [build_bank(pixels, config.step, config.blur) for pixels in config.sizes]
        # At a lead of 0.3 and scores from 0.54 on, a rival below this cut cannot spoil a lead: one serves all scores.
        parts = [_candidates(x_N3HW, bank, min(min_scores) - _RIVAL_SCORE) for bank in banks]
        found = _Candidates(*map(torch.cat, zip(*parts, strict=True)))
        for n in range(len(chunk)):
            rows_K = torch.nonzero(found.picture_K == n).flatten()
            for one, into in zip(configs, detections, strict=True):
                into.append(_select(found, rows_K, one, side / PICTURE_SIZE))
    return detections
