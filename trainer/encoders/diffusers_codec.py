"""Image codecs of the diffusers library, from a local folder: codec `diffusers:DIR`.

DIR holds config.json and the weights as `save_pretrained` writes them, or has them in its folder `vae` (a whole
pipeline). Classes: AutoencoderKL (SD, SDXL, SD3, FLUX), AutoencoderDC (Sana), AutoencoderTiny (TAESD).

Shapes: B pictures, 3 x H x W rgb in [-1, 1], C x h x w latent.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.config import require
from trainer.encoders.pretrained import (
    config_digest,
    encoder_device,
    files_digest,
    load_local,
    read_json,
    require_package,
    weight_files,
)
from trainer.encoders.protocols import ImageCodec

# Class -> the setting of its config that lists one entry per resolution.
_CLASSES = {
    "AutoencoderKL": "block_out_channels",
    "AutoencoderDC": "encoder_block_out_channels",
    "AutoencoderTiny": "encoder_block_out_channels",
}


class DiffusersCodec(ImageCodec):
    """A frozen autoencoder in fp32; weights are read at the first picture. Latents are unscaled."""

    def __init__(self, directory: str) -> None:
        folder = Path(directory)
        self.setting = f"data.codec=diffusers:{folder}"
        require_package(self.setting, "diffusers")
        require(folder.is_dir(), f"{self.setting}: {folder} is no folder, copy the model to it (nothing is downloaded)")
        in_pipeline = (folder / "vae/config.json").is_file() and not (folder / "config.json").is_file()
        self.folder = folder / "vae" if in_pipeline else folder
        self.config = read_json(self.setting, self.folder / "config.json", "model's config.json")
        self.class_name = str(self.config.get("_class_name"))
        require(self.class_name in _CLASSES, f"{self.setting} is a {self.class_name}: use one of {', '.join(_CLASSES)}")
        self.weights = weight_files(self.setting, self.folder)
        self.channels: int = self.config["latent_channels"]
        self.factor: int = 2 ** (len(self.config[_CLASSES[self.class_name]]) - 1)
        self.shift = float(self.config.get("shift_factor") or 0.0)
        self.scale = float(self.config.get("scaling_factor") or 1.0)
        self.has_std = self.class_name == "AutoencoderKL"

    def fingerprint(self) -> str:
        """Settings and weights."""
        return f"diffusers-{config_digest(self.config)}-{files_digest(self.weights)}"

    @cached_property
    def model(self) -> Any:
        """The autoencoder, read on first use."""
        import diffusers

        cls = getattr(diffusers, self.class_name)
        # low_cpu_mem_usage would need accelerate
        options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
        return load_local(self.setting, cls, self.folder, self.device, **options)

    @torch.no_grad()
    def posterior(self, rgb_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and, for AutoencoderKL, standard deviation of the latent, on the device of the input."""
        out = self.model.encode(rgb_BCHW.to(encoder_device(self.device)))
        if self.has_std:
            return out.latent_dist.mean.to(rgb_BCHW.device), out.latent_dist.std.to(rgb_BCHW.device)
        latent = out.latent if self.class_name == "AutoencoderDC" else out.latents
        return latent.to(rgb_BCHW.device), None

    @torch.no_grad()
    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W] in [-1, 1], on the device of the input."""
        rgb: Tensor = self.model.decode(latent_BCHW.to(encoder_device(self.device))).sample
        return rgb.clamp(-1, 1).to(latent_BCHW.device)
