"""DINOv2 ViT-L/14, the features of FD-DINOv2 (arXiv 2306.04675). Shapes: N pictures, H x W pixels, D features."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.networks.protocols import ImageEncoder
from eval.networks.resize import pil_bicubic
from eval.weights import file_sha256, find_weights_file
from trainer.encoders.pretrained import must_fit

DINO_WEIGHTS = "dinov2-vit-l-14"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class DinoEncoder(ImageEncoder):
    """Class token of DINOv2 ViT-L/14 at 224 pixels, bicubic, ImageNet scaling.

    Position embeddings are resampled by timm (antialiased bicubic), a little unlike Meta's own code. `model` replaces
    the listed weights by a network of the caller's.
    """

    def __init__(self, model: Any = None, weights_sha256: str = "random") -> None:
        if model is None:
            path = find_weights_file(DINO_WEIGHTS)
            model, weights_sha256 = _load_dino(path), file_sha256(path)
        super().__init__(
            model,
            int(model.num_features),
            network="dinov2-vit-l-14",
            weights_sha256=weights_sha256,
            preprocess="pil-bicubic-224-imagenet",
        )

    def prepare(self, picture_HW3: Tensor) -> Tensor:
        """Resize to 224 x 224 without regard to the sides' ratio, and scale."""
        mean, std = (torch.tensor(value)[:, None, None] for value in (_MEAN, _STD))
        return (pil_bicubic(picture_HW3, 224) / 255 - mean) / std


def _load_dino(path: Path) -> Any:
    """timm's network with Meta's file of weights."""
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = timm.create_model("vit_large_patch14_dinov2", pretrained=False, num_classes=0, img_size=224)
    state = torch.load(path, map_location="cpu", weights_only=True)
    with must_fit(f"{path} holds other weights than DINOv2 ViT-L/14"):
        model.load_state_dict(checkpoint_filter_fn(state, model))
    return model
