"""Frozen networks that turn pictures into features, behind one small protocol.

`prepare` runs on the CPU in worker threads, `encode` on the device in batches. `key` holds everything that shapes
the features: network, hash of its weights, preprocessing, precision. Shapes: N pictures, H x W pixels, D features.
"""

import warnings
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from eval.networks.inception import NUM_FEATURES, Inception, build_inception, fidelity_layers, read_torchscript
from eval.networks.resize import check_convention, fid_input, pil_bicubic
from eval.weights import file_sha256, find_file, find_weights_file
from trainer.config import ConfigError
from trainer.encoders.pretrained import encoder_device

SLIM, FULL = "inception-2015-12-05", "inception-2015-12-05-full"


class ImageEncoder(Protocol):
    """Pictures to features."""

    key: dict[str, str]
    dim: int

    def prepare(self, picture_HW3: Tensor) -> Tensor:
        """A uint8 picture [H, W, 3] as the network's input, float32 [3, h, w]; thread-safe."""
        ...

    def encode(self, x_N3hw: Tensor) -> Tensor:
        """Network input to features, fp32 [N, D] on the CPU."""
        ...


class InceptionEncoder:
    """Pool features of the FID network, under a named resize convention."""

    dim = NUM_FEATURES

    def __init__(self, convention: str, net: Inception | None = None, weights_sha256: str = "") -> None:
        self.convention = check_convention(convention)
        if net is None:
            path = find_weights_file(SLIM)
            net, weights_sha256 = build_inception(read_torchscript(path)), file_sha256(path)
        self.key = {
            "network": "inception-2015-12-05",
            "weights_sha256": weights_sha256,
            "preprocess": f"{convention}-299",
            "precision": "fp32",
        }
        self.device = encoder_device()
        self.net = net.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def prepare(self, picture_HW3: Tensor) -> Tensor:
        """Resize to 299 and scale."""
        return fid_input(picture_HW3, self.convention)

    @torch.inference_mode()
    def encode(self, x_N3hw: Tensor) -> Tensor:
        """[N, 3, 299, 299] -> [N, 2048]."""
        x_N3hw = x_N3hw.to(self.device).contiguous(memory_format=torch.channels_last)
        features: Tensor = self.net(x_N3hw).float().cpu()
        return features


def classifier_weight() -> Tensor | None:
    """Rows of the FID network's classifier, fp32 [1008, 2048], if its full weights are here.

    The Inception score uses the logits without bias, as torch-fidelity and the original graph do.
    """
    if find_file(FULL) is None:
        return None
    state = torch.load(find_weights_file(FULL), map_location="cpu", weights_only=True)
    weight: Tensor = state["fc.weight"]
    return weight.float()


def full_inception(path: Path) -> Inception:
    """The FID network from torch-fidelity's file of weights."""
    return build_inception(fidelity_layers(torch.load(path, map_location="cpu", weights_only=True)))


class DinoEncoder:
    """Class token of DINOv2 ViT-L/14 at 224 pixels, bicubic, ImageNet scaling (FD-DINOv2, arXiv 2306.04675).

    Position embeddings are resampled by timm (antialiased bicubic), a little unlike Meta's own code.
    """

    dim = 1024
    _MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, model: Any = None, weights_sha256: str = "random") -> None:
        if model is None:
            path = find_weights_file("dinov2-vit-l-14")
            model, weights_sha256 = build_dino(path), file_sha256(path)
        self.dim = int(model.num_features)
        self.key = {
            "network": "dinov2-vit-l-14",
            "weights_sha256": weights_sha256,
            "preprocess": "pil-bicubic-224-imagenet",
            "precision": "fp32",
        }
        self.device = encoder_device()
        self.model = model.eval().requires_grad_(False).to(self.device)

    def prepare(self, picture_HW3: Tensor) -> Tensor:
        """Squash to 224 x 224 and scale."""
        mean, std = (torch.tensor(value)[:, None, None] for value in (self._MEAN, self._STD))
        return (pil_bicubic(picture_HW3, 224) / 255 - mean) / std

    @torch.inference_mode()
    def encode(self, x_N3hw: Tensor) -> Tensor:
        """[N, 3, 224, 224] -> [N, D]."""
        features: Tensor = self.model(x_N3hw.to(self.device)).float().cpu()
        return features


def build_dino(path: Path | None) -> Any:
    """DINOv2 ViT-L/14 by timm, with Meta's file of weights; random weights for None."""
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = timm.create_model("vit_large_patch14_dinov2", pretrained=False, num_classes=0, img_size=224)
    if path is not None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        try:
            model.load_state_dict(checkpoint_filter_fn(state, model))
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{path} holds other weights than DINOv2 ViT-L/14: {reason}") from error
    return model
