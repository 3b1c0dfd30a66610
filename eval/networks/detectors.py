"""Detectors of COCO's 80 classes by name, each with its word on comparability.

    mask2former          the checkpoint of GenEval's authors, in transformers through a key converter: official
    maskrcnn             torchvision's Mask R-CNN ResNet-50 FPN v2: approximate
    yolov3-tiny          small, without masks, offline from a package: approximate
    mask2former-hf:DIR   the COCO checkpoint of the transformers hub, another training run: approximate

Scores of an approximate detector must not be compared with published ones. A further detector is a file that defines
its `DetectorSource`, and a line in DETECTORS.
"""

from pathlib import Path

from eval.networks.mask2former import MASK2FORMER, MASK2FORMER_FOLDER
from eval.networks.maskrcnn import MASKRCNN
from eval.networks.protocols import Comparable, DetectorSource, ObjectDetector
from eval.networks.yolo import YOLOV3_TINY
from eval.weights import find_weights_file
from trainer.config import ConfigError

DETECTORS = {
    "mask2former": MASK2FORMER,
    "maskrcnn": MASKRCNN,
    "yolov3-tiny": YOLOV3_TINY,
    "mask2former-hf": MASK2FORMER_FOLDER,
}


def _find(spec: str) -> tuple[DetectorSource, Path]:
    """Source and weights of the detector that `spec` names; ConfigError if it is unknown or they are not here."""
    name, colon, folder = spec.partition(":")
    *names, last = (f"{known}:DIR" if source.find_folder else known for known, source in DETECTORS.items())
    source = DETECTORS.get(name)
    if source is None or bool(source.find_folder) != bool(colon):
        raise ConfigError(f"--detector {spec} is unknown: choose from {', '.join(names)} or {last}")
    return source, source.find_folder(folder) if source.find_folder else find_weights_file(source.weights)


def check_detector(spec: str) -> None:
    """ConfigError when a detector is unknown or its weights are not here; loads nothing."""
    _find(spec)


def build_detector(spec: str) -> ObjectDetector:
    """The detector that --detector names; ConfigError when it is unknown or its weights are not here."""
    source, path = _find(spec)
    return source.load(path)


def describe_detector(spec: str) -> tuple[Comparable, dict[str, str]]:
    """`comparable` and `card` of the detector that --detector names, without loading it."""
    source, path = _find(spec)
    return source.comparable, source.card(path)
