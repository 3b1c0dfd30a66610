"""Mask2Former Swin-S as GenEval's authors run it, in transformers: resize, network, objects.

Input: bilinear keep-ratio resize into 1333 x 800 (rounded to 8 bits, as OpenCV does), ImageNet scaling, zero padding
to multiples of 32. Output: softmax without the null class, the 100 best pairs of query and class, score = class
probability x mean mask probability inside the mask, mask where its logit at the picture's size is positive, box =
tight around it. Shapes: Q queries, K classes, H x W pixels of the picture, h x w of the network's input.
"""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eval.networks.mask2former_keys import convert_mask2former
from eval.networks.protocols import DetectorSource, FoundObject
from eval.pictures.geneval_names import CLASSES, Box
from eval.weights import file_sha256
from trainer.config import ConfigError, require
from trainer.encoders.pretrained import (
    encoder_device,
    files_digest,
    load_local,
    must_fit,
    require_package,
    weight_files,
)

_LONG, _SHORT, _MULTIPLE, _BEST = 1333, 800, 32, 100
_UNUSED = ("model.pixel_level_module.encoder.swin.layernorm.", "criterion.")
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def build_network(**swin: Any) -> Any:
    """Mask2Former with a Swin-S backbone and 80 classes, random weights; `swin` changes the backbone for tests."""
    require_package("--detector mask2former", "transformers")
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    settings: dict[str, Any] = {
        "depths": [2, 2, 18, 2],
        "embed_dim": 96,
        "num_heads": [3, 6, 12, 24],
        "window_size": 7,
        "image_size": 224,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    backbone = SwinConfig(**(settings | swin))
    configure: Any = Mask2FormerConfig
    model: Any = Mask2FormerForUniversalSegmentation
    return model(configure(backbone_config=backbone, num_labels=len(CLASSES)))


def _load_mmdet(path: Path) -> Any:
    """The network with an mmdet checkpoint; ConfigError unless every weight finds its place."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ConfigError(f"{path} holds more than weights ({str(error).splitlines()[0]}): fetch it again") from error
    try:
        state = convert_mask2former(content.get("state_dict", content))
    except KeyError as error:
        raise ConfigError(f"{path} is no Mask2Former-Swin checkpoint of mmdet: it has {error}") from error
    model = build_network()
    with must_fit(f"{path} does not hold the weights of this detector"):
        model.load_state_dict({**unused_weights(model), **state})
    return model


def unused_weights(model: Any) -> dict[str, Tensor]:
    """What transformers keeps in the state but no output depends on: the backbone's last norm, the loss."""
    return {name: value for name, value in model.state_dict().items() if name.startswith(_UNUSED)}


def _load_folder(folder: Path) -> Any:
    """The network with transformers' own checkpoint in a local folder."""
    setting = f"--detector mask2former-hf:{folder}"
    require_package(setting, "transformers")
    from transformers import Mask2FormerForUniversalSegmentation

    loader: Any = Mask2FormerForUniversalSegmentation
    model = load_local(setting, loader, folder)
    require(
        model.config.num_labels == len(CLASSES),
        f"{setting} knows {model.config.num_labels} classes, {len(CLASSES)} of COCO are needed: use "
        "facebook/mask2former-swin-small-coco-instance",
    )
    return model


def input_size(height: int, width: int, long: int = _LONG, short: int = _SHORT) -> tuple[int, int]:
    """Height and width of a picture resized to fit into long x short pixels, its sides' ratio kept."""
    scale = min(long / max(height, width), short / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def network_input(picture_HW3: Tensor, long: int = _LONG, short: int = _SHORT) -> tuple[Tensor, tuple[int, int]]:
    """A uint8 picture as padded input [1, 3, h, w], and the size of the part that is picture."""
    size = input_size(picture_HW3.shape[0], picture_HW3.shape[1], long, short)
    x_NCHW = picture_HW3.permute(2, 0, 1)[None].float()
    x_NCHW = functional.interpolate(x_NCHW, size, mode="bilinear", align_corners=False).round()
    mean, std = (torch.tensor(value, device=x_NCHW.device)[:, None, None] for value in (_MEAN, _STD))
    x_NCHW = (x_NCHW - mean) / std
    down, right = (-length % _MULTIPLE for length in size)
    return functional.pad(x_NCHW, (0, right, 0, down)), size


def masks_at_picture_size(mask_Qhw: Tensor, padded: tuple[int, int], size: tuple[int, int], picture: Any) -> Tensor:
    """Mask logits at a quarter of the input brought to the picture: padded size, cut, picture's size."""
    mask = functional.interpolate(mask_Qhw[None], padded, mode="bilinear", align_corners=False)
    mask = mask[..., : size[0], : size[1]]
    found: Tensor = functional.interpolate(mask, tuple(picture), mode="bilinear", align_corners=False)[0]
    return found


def mask_box(mask_HW: Tensor) -> Box:
    """The smallest box around a mask, x2 and y2 exclusive; zeros for an empty mask."""
    rows, columns = mask_HW.any(1).nonzero().flatten(), mask_HW.any(0).nonzero().flatten()
    if len(rows) == 0:
        return 0.0, 0.0, 0.0, 0.0
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def instances(class_QK: Tensor, mask_QHW: Tensor) -> list[FoundObject]:
    """Objects from class logits (the last class is none) and mask logits, best first."""
    scores_QK = class_QK.softmax(-1)[:, :-1]
    best = scores_QK.flatten().topk(min(_BEST, scores_QK.numel()))
    query, label = best.indices // scores_QK.shape[1], best.indices % scores_QK.shape[1]
    logits = mask_QHW[query]
    inside = logits > 0
    quality = (logits.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    score, masks = (best.values * quality).cpu(), inside.cpu()
    order = score.argsort(descending=True, stable=True).tolist()
    labels, values = label.tolist(), score.tolist()
    return [
        FoundObject(class_number=labels[i], score=values[i], box=mask_box(masks[i]), mask_HW=masks[i]) for i in order
    ]


class Mask2Former:
    """The detector on this process's device, fp32."""

    def __init__(self, model: Any, long: int = _LONG, short: int = _SHORT) -> None:
        self.long, self.short = long, short
        self.device = encoder_device()
        self.model = model.eval().requires_grad_(False).to(self.device)

    @torch.inference_mode()
    def detect(self, picture_HW3: Tensor) -> list[FoundObject]:
        """Objects, best first."""
        x_NCHW, size = network_input(picture_HW3.to(self.device), self.long, self.short)
        # transformers needs the hidden states of every layer, though only the last one's output is used.
        out = self.model(pixel_values=x_NCHW, output_hidden_states=True)
        padded = (x_NCHW.shape[2], x_NCHW.shape[3])
        masks = masks_at_picture_size(out.masks_queries_logits[0].float(), padded, size, picture_HW3.shape[:2])
        return instances(out.class_queries_logits[0].float(), masks)


def _card(name: str, weights_sha256: str) -> dict[str, str]:
    return {"detector": name, "weights_sha256": weights_sha256, "input": f"{_LONG}x{_SHORT}, pad {_MULTIPLE}"}


MASK2FORMER = DetectorSource(
    comparable="official",
    weights="mask2former-swin-s-coco",
    card=lambda path: _card("mask2former-swin-s-coco (GenEval's)", file_sha256(path)),
    load=lambda path: Mask2Former(_load_mmdet(path)),
)


def _find_folder(name: str) -> Path:
    require(
        (Path(name) / "config.json").is_file(),
        f"--detector mask2former-hf:{name}: {name} has no config.json, copy "
        "facebook/mask2former-swin-small-coco-instance to it",
    )
    return Path(name)


def _folder_card(folder: Path) -> dict[str, str]:
    name = f"mask2former-hf:{folder.name}"
    return _card(name, files_digest(weight_files(f"--detector mask2former-hf:{folder}", folder)))


MASK2FORMER_FOLDER = DetectorSource(
    comparable="approximate",
    find_folder=_find_folder,
    card=_folder_card,
    load=lambda folder: Mask2Former(_load_folder(folder)),
)
