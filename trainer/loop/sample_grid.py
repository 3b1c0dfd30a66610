"""The picture grid of fixed prompts that training draws from the EMA, all ranks together."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from trainer.config import TrainConfig, require
from trainer.data.latents.samples import LatentInfo
from trainer.diffusion.model import ModelShape
from trainer.diffusion.sampling import draw, picture_grid, text_batch, to_pictures
from trainer.distributed import World
from trainer.encoders.build import build_codec, build_text_encoder


class GridSampler:
    """Draws `sample.prompts`, shared out over the ranks; empty and idle when `train.sample_every` is 0.

    Under ZeRO-3 and expert parallelism every rank must take part with the same number of pictures, so
    the prompts are repeated up to a multiple of the world size.
    """

    def __init__(self, config: TrainConfig, info: LatentInfo, world: World, device: torch.device) -> None:
        self.config, self.info, self.world, self.device = config, info, world, device
        if not config.train.sample_every:
            return
        prompts = config.sample.prompts
        per_rank = -(-len(prompts) // world.size)
        self.mine = [i % len(prompts) for i in range(world.rank * per_rank, (world.rank + 1) * per_rank)]
        encoder = build_text_encoder(info.text_encoder)
        tokens = encoder.encode([prompts[i] for i in self.mine])
        self.text = text_batch(tokens, encoder.encode([""])[0], info.max_tokens)
        self.codec = build_codec(info.codec)

    @staticmethod
    def check(config: TrainConfig) -> None:
        """Refuse a grid that could not be drawn."""
        if config.train.sample_every:
            require(bool(config.sample.prompts), "train.sample_every is on but sample.prompts is empty: list prompts")
            require(
                config.data.source == "shards",
                "train.sample_every needs data.source=shards: synthetic data has no text encoder",
            )

    @torch.no_grad()
    def draw(self, engine: Any) -> Tensor:
        """Sample all prompts with the engine's current weights: uint8 [H, W, 3] on every rank. Collective."""
        text, mask = (part.to(self.device) for part in self.text)
        engine.eval()
        latent = draw(
            lambda x, t, rows: engine(x, t, text[rows], mask[rows]),
            self.mine, ModelShape.of(self.info), self.config.diffusion, self.device,
        )  # fmt: skip
        engine.train()
        parts = [torch.empty_like(latent) for _ in range(self.world.size)]
        torch.distributed.all_gather(parts, latent.contiguous())
        latents = torch.cat(parts)[: len(self.config.sample.prompts)]
        pictures = to_pictures(latents, self.codec, self.info.mean_C, self.info.std_C)
        return picture_grid(pictures, columns=min(8, len(pictures)))

    @staticmethod
    def save(picture_HWC: Tensor, run_dir: Path, step: int) -> None:
        """Write `samples/step_XXXXXXXX.png`."""
        (run_dir / "samples").mkdir(exist_ok=True)
        Image.fromarray(picture_HWC.numpy()).save(run_dir / "samples" / f"step_{step:08d}.png")
