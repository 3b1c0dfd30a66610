"""Seeded random latents and text tokens: the data of the debug recipe, nothing on disk."""

import torch
from torch import Tensor

from trainer.data.latents.samples import LatentInfo, Sample
from trainer.data.order import SampleLayout
from trainer.encoders.protocols import TextEncoder
from trainer.randomness import keyed_generator

NUM_SAMPLES, TEXT_DIM, MAX_TOKENS = 64, 32, 8


class SyntheticDataset:
    """64 samples in 4 shards; sample i is a function of (seed, i)."""

    online_encoder: TextEncoder | None = None

    def __init__(self, image_size: int, seed: int) -> None:
        self.seed, self.image_size = seed, image_size
        self.layout = SampleLayout.of_shards([NUM_SAMPLES // 4] * 4)
        self.empty_text: Tensor | str = torch.zeros(1, TEXT_DIM)
        self.info = LatentInfo(
            channels=3,
            height=image_size,
            width=image_size,
            text_dim=TEXT_DIM,
            max_tokens=MAX_TOKENS,
            codec="pixel",
            text_encoder="",
            fingerprint=f"synthetic-{image_size}-{seed}",
            mean=[0.0] * 3,
            std=[1.0] * 3,
        )

    def __len__(self) -> int:
        return NUM_SAMPLES

    def read(self, sample: int) -> Sample:
        """Latent [3, size, size] and 2 to 8 text tokens."""
        generator = keyed_generator(self.seed, "synthetic", sample)
        latent = torch.randn(3, self.image_size, self.image_size, generator=generator)
        text = torch.randn(2 + sample % (MAX_TOKENS - 1), TEXT_DIM, generator=generator)
        return Sample(latent=latent, text=text)
