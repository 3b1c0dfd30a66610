"""What the metrics ask of a network: pictures to features (`ImageEncoder`), pictures to objects (`ObjectDetector`).

Shapes: N pictures, H x W pixels, h x w pixels of a network's input, D features.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from eval.pictures.geneval_names import CLASSES, Box
from eval.pictures.image_files import DECODING
from trainer.encoders.pretrained import encoder_device

Comparable = Literal["official", "approximate"]
"""Whether scores of a detector may stand beside published ones."""


class ImageEncoder(ABC):
    """A frozen network from pictures to `dim` features, on this process's device; derive from it.

    `key` holds everything that shapes the features: network, hash of its weights, preprocessing, precision.
    """

    def __init__(self, model: Any, dim: int, *, network: str, weights_sha256: str, preprocess: str) -> None:
        self.dim = dim
        self.key = {"network": network, "weights_sha256": weights_sha256, "decoding": DECODING,
                    "preprocess": preprocess, "precision": "fp32"}  # fmt: skip
        self.device = encoder_device()
        self.model = model.eval().requires_grad_(False).to(self.device)

    @abstractmethod
    def prepare(self, picture_HW3: Tensor) -> Tensor:
        """A uint8 picture [H, W, 3] as the network's input, float32 [3, h, w]; runs in worker threads on the CPU."""

    @torch.inference_mode()
    def encode(self, x_N3hw: Tensor) -> Tensor:
        """A batch of inputs to features, not normalised, fp32 [N, D] on the CPU."""
        features: Tensor = self.model(x_N3hw.to(self.device)).float().cpu()
        return features


@dataclass(frozen=True, kw_only=True)
class FoundObject:
    """One object: number of its class, score, box in pixels (x2, y2 exclusive), mask bool [H, W] if there is one."""

    class_number: int
    score: float
    box: Box
    mask_HW: Tensor | None = None

    @property
    def name(self) -> str:
        """GenEval's name of the class."""
        return CLASSES[self.class_number]


class ObjectDetector(Protocol):
    """A frozen network from pictures to objects of COCO's 80 classes."""

    def detect(self, picture_HW3: Tensor) -> list[FoundObject]:
        """Objects of a uint8 picture [H, W, 3], best first."""
        ...


@dataclass(frozen=True, kw_only=True)
class DetectorSource:
    """How a detector's own file tells the registry (`eval.networks.detectors`) to find, describe and load it."""

    comparable: Comparable
    card: Callable[[Path], dict[str, str]]
    """What a protocol card says of a detector with these weights: name, their hash, settings; loads nothing."""
    load: Callable[[Path], ObjectDetector]
    """The detector with these weights; ConfigError if they are those of another network."""
    weights: str = ""
    """Entry of eval/weights.yaml."""
    find_folder: Callable[[str], Path] | None = None
    """For a detector named NAME:DIR instead, DIR to the folder of weights; ConfigError if they are not in it."""
