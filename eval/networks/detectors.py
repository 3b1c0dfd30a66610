"""Detectors of COCO's 80 classes behind one interface, each with its word on comparability.

    mask2former          the checkpoint of GenEval's authors, in transformers through a key converter: official
    mask2former-hf:DIR   the COCO checkpoint of the transformers hub, another training run: approximate
    maskrcnn             torchvision's Mask R-CNN ResNet-50 FPN v2: approximate
    yolov3-tiny          small, without masks, offline from a package: approximate

Scores of an approximate detector must not be compared with published ones. Shapes: H x W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from eval.metrics.geneval import Box
from eval.pictures.geneval_names import CATEGORY_NUMBERS, CLASSES
from eval.weights import file_sha256, find_weights_file
from trainer.config import ConfigError, require
from trainer.encoders.pretrained import encoder_device

Comparable = Literal["official", "approximate"]


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
    """Pictures to objects. `card` is what a protocol card needs: detector, weights and their hash, settings."""

    comparable: Comparable
    card: dict[str, str]

    def detect(self, picture_HW3: Tensor) -> list[FoundObject]:
        """Objects of a uint8 picture [H, W, 3], best first."""
        ...


class MaskRcnn:
    """torchvision's Mask R-CNN v2; masks are cut at probability 0.5."""

    comparable: Comparable = "approximate"

    def __init__(self, model: Any = None, weights_sha256: str = "random") -> None:
        if model is None:
            path = find_weights_file("maskrcnn-resnet50-fpn-v2-coco")
            model, weights_sha256 = build_maskrcnn(), file_sha256(path)
            load_weights(model, torch.load(path, map_location="cpu", weights_only=True), path)
        self.device = encoder_device()
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.card = maskrcnn_card(weights_sha256)

    @torch.inference_mode()
    def detect(self, picture_HW3: Tensor) -> list[FoundObject]:
        """Objects, best first."""
        (found,) = self.model([picture_HW3.permute(2, 0, 1).to(self.device).float() / 255])
        masks = (found["masks"][:, 0] > 0.5).cpu()
        numbers = {number: i for i, number in enumerate(CATEGORY_NUMBERS)}
        rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), masks, strict=True)
        return [
            FoundObject(class_number=numbers[label], score=score, box=(box[0], box[1], box[2], box[3]), mask_HW=mask)
            for label, score, box, mask in rows
            if label in numbers
        ]


def maskrcnn_card(weights_sha256: str) -> dict[str, str]:
    """Its card."""
    return {"detector": "maskrcnn-resnet50-fpn-v2", "weights_sha256": weights_sha256}


def build_maskrcnn() -> Any:
    """The network with random weights."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

    return maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=91)


def load_weights(model: Any, state: dict[str, Tensor], path: Path) -> None:
    """Load strictly; a wrong pair of weights and network must not give wrong scores silently."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{path} does not hold the weights of this detector: {reason}") from error


_OFFICIAL = "mask2former-swin-s-coco (GenEval's)"


def _official() -> ObjectDetector:
    from eval.networks.mask2former import Mask2Former, load_official

    path = find_weights_file("mask2former-swin-s-coco")
    return Mask2Former(load_official(path), _OFFICIAL, file_sha256(path), "official")


def _yolo() -> ObjectDetector:
    from eval.networks.yolo import YoloDetector

    return YoloDetector()


def _hub(folder: Path) -> ObjectDetector:
    from eval.networks.mask2former import Mask2Former, load_folder

    model, sha256 = load_folder(folder)
    return Mask2Former(model, f"{HUB_PREFIX}{folder.name}", sha256, "approximate")


_DETECTORS: dict[str, Callable[[], ObjectDetector]] = {
    "mask2former": _official,
    "maskrcnn": MaskRcnn,
    "yolov3-tiny": _yolo,
}
HUB_PREFIX = "mask2former-hf:"
_WEIGHTS = {
    "mask2former": "mask2former-swin-s-coco",
    "maskrcnn": "maskrcnn-resnet50-fpn-v2-coco",
    "yolov3-tiny": "yolov3-tiny",
}


def check_detector(spec: str) -> None:
    """ConfigError when a detector is unknown or its weights are not here; loads nothing."""
    if spec.startswith(HUB_PREFIX):
        folder = Path(spec.removeprefix(HUB_PREFIX))
        require(
            (folder / "config.json").is_file(),
            f"--detector {spec}: {folder} has no config.json, copy facebook/mask2former-swin-small-coco-instance to it",
        )
        return
    require(spec in _DETECTORS, f"--detector {spec} is unknown: choose from {', '.join(_DETECTORS)} or {HUB_PREFIX}DIR")
    find_weights_file(_WEIGHTS[spec])


def build_detector(spec: str) -> ObjectDetector:
    """The detector that --detector names; ConfigError when it is unknown or its weights are not here."""
    check_detector(spec)
    if spec.startswith(HUB_PREFIX):
        return _hub(Path(spec.removeprefix(HUB_PREFIX)))
    return _DETECTORS[spec]()


def describe_detector(spec: str) -> tuple[Comparable, dict[str, str]]:
    """`comparable` and `card` of the detector that --detector names, without loading it."""
    from eval.networks.mask2former import folder_digest, mask2former_card
    from eval.networks.yolo import yolo_card

    check_detector(spec)
    if spec.startswith(HUB_PREFIX):
        folder = Path(spec.removeprefix(HUB_PREFIX))
        return "approximate", mask2former_card(f"{HUB_PREFIX}{folder.name}", folder_digest(folder))
    sha256 = file_sha256(find_weights_file(_WEIGHTS[spec]))
    if spec == "mask2former":
        return "official", mask2former_card(_OFFICIAL, sha256)
    return "approximate", maskrcnn_card(sha256) if spec == "maskrcnn" else yolo_card(sha256)
