"""torchvision's Mask R-CNN ResNet-50 FPN v2 (arXiv 1703.06870): objects with masks. Shapes: H x W pixels."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.networks.protocols import DetectorSource, FoundObject
from eval.pictures.geneval_names import CATEGORY_NUMBERS
from eval.weights import file_sha256
from trainer.encoders.pretrained import encoder_device, must_fit


class MaskRcnn:
    """The detector on this process's device; masks are cut at probability 0.5."""

    def __init__(self, model: Any) -> None:
        self.device = encoder_device()
        self.model = model.eval().requires_grad_(False).to(self.device)

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


def build_maskrcnn() -> Any:
    """The network with random weights."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

    return maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=91)


def _load(path: Path) -> MaskRcnn:
    model = build_maskrcnn()
    state = torch.load(path, map_location="cpu", weights_only=True)
    with must_fit(f"{path} does not hold the weights of this detector"):
        model.load_state_dict(state)
    return MaskRcnn(model)


MASKRCNN = DetectorSource(
    comparable="approximate",
    weights="maskrcnn-resnet50-fpn-v2-coco",
    card=lambda path: {"detector": "maskrcnn-resnet50-fpn-v2", "weights_sha256": file_sha256(path)},
    load=_load,
)
