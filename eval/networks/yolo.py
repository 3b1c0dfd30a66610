"""YOLOv3-tiny (arXiv 1804.02767) from darknet's own file of weights: a small detector without masks.

Good enough to check the whole way from pictures to scores with real weights on any machine; never comparable.
Shapes: N pictures, H x W grid cells, 3 anchors of 85 numbers (x, y, w, h, objectness, 80 classes).
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import batched_nms

from eval.networks.protocols import DetectorSource, FoundObject
from eval.weights import file_sha256
from trainer.config import require
from trainer.encoders.pretrained import encoder_device

_ANCHORS = ((10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319))
_HEADER = 20  # bytes: three int32 of the version, one int64 of pictures seen
_SIZE, _OVERLAP, _FLOOR = 416, 0.45, 0.05


def _layer(channels: int, out: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, 1, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.LeakyReLU(0.1))


class YoloV3Tiny(nn.Module):
    """[N, 3, S, S] in [0, 1] -> candidates [N, P, 85]: corners in input pixels, objectness, class probabilities."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64, 128, 256, 512)
        self.body = nn.ModuleList([_layer(widths[i], widths[i + 1], 3) for i in range(6)])
        self.deep, self.neck = _layer(512, 1024, 3), _layer(1024, 256, 1)
        self.coarse, self.coarse_head = _layer(256, 512, 3), nn.Conv2d(512, 255, 1)
        self.up, self.fine = _layer(256, 128, 1), _layer(384, 256, 3)
        self.fine_head = nn.Conv2d(256, 255, 1)
        self.eval().requires_grad_(False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Candidates of the coarse and the fine grid, one after the other."""
        route = x_NCHW
        for i, layer in enumerate(self.body):
            x_NCHW = layer(x_NCHW)
            route = x_NCHW if i == 4 else route
            if i < 5:
                x_NCHW = functional.max_pool2d(x_NCHW, 2, 2)
            else:  # darknet's pool of stride 1 keeps the size
                x_NCHW = functional.max_pool2d(functional.pad(x_NCHW, (0, 1, 0, 1), value=-torch.inf), 2, 1)
        neck = self.neck(self.deep(x_NCHW))
        coarse = self.coarse_head(self.coarse(neck))
        joined = torch.cat([functional.interpolate(self.up(neck), scale_factor=2.0, mode="nearest"), route], 1)
        fine = self.fine_head(self.fine(joined))
        return torch.cat([_decode(coarse, 32, _ANCHORS[3:]), _decode(fine, 16, _ANCHORS[:3])], 1)

    def load_darknet(self, path: Path) -> "YoloV3Tiny":
        """Read the weights from a darknet file; ConfigError if it does not have as many numbers as the network."""
        values = torch.from_numpy(np.fromfile(path, np.float32, offset=_HEADER))
        targets: list[Tensor] = []
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                targets += [part for part in (module.bias, module.weight) if part is not None]
            elif isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                # In the file they stand before the kernel of their convolution.
                targets[-1:-1] = [module.bias, module.weight, module.running_mean, module.running_var]
        count = sum(target.numel() for target in targets)
        require(len(values) == count, f"{path} holds {len(values)} numbers, YOLOv3-tiny has {count}: fetch it again")
        for target, part in zip(targets, values.split([t.numel() for t in targets]), strict=True):
            target.copy_(part.view_as(target))
        return self


def _decode(out_NCHW: Tensor, stride: int, anchors: tuple[tuple[int, int], ...]) -> Tensor:
    count, _, height, width = out_NCHW.shape
    x = out_NCHW.view(count, 3, 85, height, width).permute(0, 1, 3, 4, 2)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack([columns, rows], -1).to(x)
    centre = (x[..., :2].sigmoid() + grid) * stride
    half = x[..., 2:4].exp() * torch.tensor(anchors).to(x)[None, :, None, None] / 2
    return torch.cat([centre - half, centre + half, x[..., 4:].sigmoid()], -1).reshape(count, -1, 85)


class YoloDetector:
    """The detector on this process's device: letterboxed to 416, overlaps above 0.45 suppressed per class."""

    def __init__(self, path: Path) -> None:
        self.device = encoder_device()
        self.net = YoloV3Tiny().load_darknet(path).to(self.device)

    @torch.inference_mode()
    def detect(self, picture_HW3: Tensor) -> list[FoundObject]:
        """Objects, best first, without masks."""
        height, width = picture_HW3.shape[:2]
        ratio = _SIZE / max(height, width)
        size = (round(height * ratio), round(width * ratio))
        x = picture_HW3.permute(2, 0, 1)[None].to(self.device).float() / 255
        x = functional.interpolate(x, size, mode="bilinear", antialias=True)
        top, left = (_SIZE - size[0]) // 2, (_SIZE - size[1]) // 2
        x = functional.pad(x, (left, _SIZE - size[1] - left, top, _SIZE - size[0] - top), value=0.5)
        found_P85 = self.net(x)[0].cpu()
        score_PK = found_P85[:, 4:5] * found_P85[:, 5:]
        place, label = (score_PK > _FLOOR).nonzero(as_tuple=True)
        boxes = (found_P85[place, :4] - torch.tensor([left, top, left, top])) / ratio
        boxes = torch.minimum(boxes.clamp_min(0), torch.tensor([width, height, width, height]).float())
        scores = score_PK[place, label]
        kept = batched_nms(boxes, scores, label, _OVERLAP).tolist()
        return [
            FoundObject(class_number=int(label[i]), score=float(scores[i]), box=(x1, y1, x2, y2))
            for i in kept
            for x1, y1, x2, y2 in [boxes[i].tolist()]
        ]


YOLOV3_TINY = DetectorSource(
    comparable="approximate",
    weights="yolov3-tiny",
    card=lambda path: {"detector": "yolov3-tiny", "weights_sha256": file_sha256(path), "input": f"letterbox {_SIZE}"},
    load=YoloDetector,
)
