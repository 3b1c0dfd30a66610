"""Is the background the asked colour? A coarse question that a half-trained model can already answer.

Each half of a picture's border is named after the colour that most of its pixels are nearest to.
Shapes: N pictures of H x W pixels, P border pixels, K colours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from eval.metrics.geneval import Score, share_score
from eval.pictures.prompts import Prompt
from trainer.data.demo.scenes import COLORS, Scene

_BORDER = 1 / 16  # of the width


def border_colors(pictures_NHWC: Tensor) -> list[tuple[str, str]]:
    """Colour names of the left and right half of each picture's border; pictures uint8 [N, H, W, 3]."""
    _, H, W, _ = pictures_NHWC.shape
    width = max(1, round(_BORDER * W))
    inner = torch.zeros(H, W, dtype=torch.bool)
    inner[width : H - width, width : W - width] = True
    left = torch.zeros(H, W, dtype=torch.bool)
    left[:, : W // 2] = True
    names = list(COLORS)
    palette_K3 = torch.tensor(list(COLORS.values())).float()
    halves = []
    for side in (left, ~left):
        pixels_NP3 = pictures_NHWC[:, side & ~inner].float()
        nearest_NP = torch.cdist(pixels_NP3, palette_K3[None]).argmin(-1)
        halves.append([names[int(vote)] for vote in nearest_NP.mode(dim=1).values])
    return list(zip(*halves, strict=True))


def background_score(prompts: Sequence[Prompt], pictures_NHWC: Tensor, num_samples: int = 1) -> Score:
    """Share of pictures whose border has the asked colour, on both tiles where there are two."""
    flags = []
    for i, found in enumerate(border_colors(pictures_NHWC)):
        scene = Scene.from_json(prompts[i // num_samples].metadata["scene"])
        flags.append(found == (scene.objects[0].background, scene.objects[-1].background))
    return share_score(flags)
