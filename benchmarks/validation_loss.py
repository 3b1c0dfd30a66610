"""Loss of a trained model at fixed timesteps on scenes held out of training: the same noise for every model.

Shapes: N scenes, C x H x W latent.
"""

import torch
from torch import Tensor

from trainer.data.demo.scenes import held_out_scenes, render
from trainer.data.latents.samples import pad_text
from trainer.diffusion.flow import interpolate
from trainer.pipeline import Pipeline
from trainer.randomness import keyed_generator

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
SEED = 20_000  # of the scenes; the suites of eval.run draw theirs from seed 0 on


def held_out_latents(pipeline: Pipeline, per_category: int) -> tuple[Tensor, list[str]]:
    """Normalised latents [N, C, H, W] and captions of held-out scenes."""
    scenes = held_out_scenes(SEED, per_category)
    size = pipeline.config.data.image_size
    rgb = torch.stack([torch.from_numpy(render(scene, size)) for scene in scenes])
    latent = pipeline.codec.encode(rgb.permute(0, 3, 1, 2).float() / 127.5 - 1)
    mean, std = (value.view(1, -1, 1, 1) for value in (pipeline.info.mean_C, pipeline.info.std_C))
    return (latent - mean) / std, [scene.caption for scene in scenes]


@torch.inference_mode()
def validation_loss(pipeline: Pipeline, *, per_category: int = 32, batch_size: int = 64) -> dict[str, float]:
    """Mean squared error of the velocity at each of `TIMES`: {"0.1": ..., ...}; sampling's routing, EMA weights."""
    latent_NCHW, captions = held_out_latents(pipeline, per_category)
    noise = torch.stack(
        [torch.randn(latent_NCHW.shape[1:], generator=keyed_generator(SEED, n)) for n in range(len(captions))]
    )
    tokens = pipeline.text_encoder.encode(captions)
    totals = dict.fromkeys(map(str, TIMES), 0.0)
    for start in range(0, len(captions), batch_size):
        rows = slice(start, start + batch_size)
        text, mask = (part.to(pipeline.device) for part in pad_text(tokens[rows], pipeline.info.max_tokens))
        x0, x1 = latent_NCHW[rows].to(pipeline.device), noise[rows].to(pipeline.device)
        for time in TIMES:
            t_B = torch.full((len(x0),), time, device=pipeline.device)
            velocity, _ = pipeline.model(interpolate(x0, x1, t_B), t_B, text, mask)
            totals[str(time)] += float((velocity - (x1 - x0)).square().mean()) * len(x0) / len(captions)
    return totals
