"""How pictures become input of the FID network: three conventions, named after those who use them.

The same pictures give FIDs that differ by several points through the resize alone, so the convention's name travels
with statistics and results, and sets of two conventions are never compared.

    torch-fidelity   TF1 bilinear (no half pixel, no antialias), (x - 128) / 128; also ADM and the TensorFlow original
    clean            PIL bicubic per float channel (antialiased), clipped to 0..255, (x - 128) / 128; clean-fid
    pytorch-fid      bilinear with half pixel, no antialias, 2 x / 255 - 1

Shapes: H x W pixels.
"""

from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from trainer.config import require

RESOLUTION = 299
"""Pixels of a side of the FID network's input."""

CONVENTIONS = ("torch-fidelity", "clean", "pytorch-fid")


def check_convention(name: str) -> str:
    """The same name; ConfigError if it is none of the three."""
    require(name in CONVENTIONS, f"convention {name} is unknown: choose from {', '.join(CONVENTIONS)}")
    return name


def pil_bicubic(picture_HW3: Tensor, size: int) -> Tensor:
    """Antialiased bicubic resize of each channel in float32: uint8 [H, W, 3] -> [3, size, size], clipped to 0..255."""
    channels = picture_HW3.numpy().astype(np.float32)
    parts = [
        np.asarray(Image.fromarray(channels[:, :, i]).resize((size, size), Image.Resampling.BICUBIC)) for i in range(3)
    ]
    return torch.from_numpy(np.stack(parts).clip(0, 255))


@cache
def _resize_matrix(size: int, resolution: int) -> Tensor:
    """TF1 bilinear interpolation along one axis as a matrix [resolution, size]."""
    source = torch.arange(resolution, dtype=torch.float64) * (size / resolution)
    low = source.floor().long().clamp(max=size - 1)
    high = (low + 1).clamp(max=size - 1)
    weight = source - low
    matrix = torch.zeros(resolution, size, dtype=torch.float64)
    rows = torch.arange(resolution)
    matrix.index_put_((rows, low), 1 - weight, accumulate=True)
    matrix.index_put_((rows, high), weight, accumulate=True)
    return matrix.float()


def tf1_preprocess(images_NHWC: Tensor, resolution: int = RESOLUTION) -> Tensor:
    """uint8 pictures [N, H, W, 3] -> network input [N, 3, resolution, resolution], float32 in [-1, 1)."""
    x_NCHW = images_NHWC.permute(0, 3, 1, 2).float()
    rows = _resize_matrix(images_NHWC.shape[1], resolution).to(x_NCHW.device)
    columns = _resize_matrix(images_NHWC.shape[2], resolution).to(x_NCHW.device)
    return (rows @ x_NCHW @ columns.T - 128) / 128


def fid_input(picture_HW3: Tensor, convention: str, size: int = RESOLUTION) -> Tensor:
    """A uint8 picture [H, W, 3] as network input [3, size, size], float32."""
    if convention == "clean":
        return (pil_bicubic(picture_HW3, size) - 128) / 128
    if convention == "pytorch-fid":
        x_NCHW = picture_HW3.permute(2, 0, 1)[None].float() / 255
        return 2 * functional.interpolate(x_NCHW, (size, size), mode="bilinear", align_corners=False)[0] - 1
    return tf1_preprocess(picture_HW3[None], size)[0]
