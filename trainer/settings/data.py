"""Settings of the data: where it is, what encodes it, in which order it is used."""

import re
from dataclasses import dataclass, field
from typing import Literal

from trainer.errors import require

_BUCKET = re.compile(r"([1-9]\d*)x([1-9]\d*)")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where latents come from, what encodes pictures and captions, and in which order samples are used.

    `python -m trainer.data.encode` reads `images` and writes `latents`; training reads `latents` or `mix`. Each global
    batch is of one bucket (picture size): buckets take turns in blocks of `bucket_block` samples.
    """

    source: Literal["shards", "synthetic"] = "synthetic"
    """Latent shards from disk, or 64 seeded random samples, made when the run starts."""
    images: str = ""
    """Folder of image shards to encode; training does not read it."""
    latents: str = ""
    """Folder of latent shards that encoding writes and training reads; empty where training reads `mix`."""
    image_size: int = 32
    """Side in pixels of the square that pictures are cropped to, if there are no `buckets`; 1 or more, a multiple of
    the codec's factor times `model.patch_size`."""
    codec: str = "pixel"
    """Turns pictures into latents and back: pixel (as they are), dct, vae:FILE (trainer.data.train_vae)
    or diffusers:DIR."""
    text_encoder: str = "minilm"
    """Turns captions into tokens: minilm, minilm@LAYER (1 to 6), open_clip:ARCH:FILE, open_clip:DIR, t5:DIR,
    t5@MAX_TOKENS:DIR, or several joined by +, whose tokens follow each other."""
    text: Literal["cache", "online"] = "cache"
    """Store the encoded captions, or the captions alone, which are then encoded while training (for large data)."""
    latent_std: bool = False
    """Store the standard deviation of the codec's latents too, and draw from their distribution in training; needs a
    codec that has one."""
    normalize: Literal["measured", "codec"] = "measured"
    """Shift and scale latents by the mean and deviation measured on the data, per channel, or by the codec's own."""
    whitening: float = 1.0
    """Exponent w of measured scaling: each channel is divided by deviation^w, then all by one factor to a mean square
    of 1. At 1 all channels are equally loud, at 0 as loud as in the picture; 0 to 1, below 1 only where measured."""
    buckets: list[str] = field(default_factory=list)
    """Picture sizes HEIGHTxWIDTH in pixels, each once; a picture goes to the nearest aspect ratio. None: squares."""
    enlarge_up_to: float = 1.5
    """How many times as large as it is the middle one of the pictures may be made to cover its crop; 1 or more.
    Encoding refuses more: pictures smaller than their crop show nothing more when enlarged."""
    bucket_block: int = 0
    """Samples in a row of one bucket, from all folders by weight; with several buckets or folders a multiple of the
    global batch, otherwise unused; 0 or more."""
    small_buckets: Literal["refuse", "drop"] = "refuse"
    """What to do when a bucket has too few samples for one block: end with an error, or leave the bucket out."""
    mix: dict[str, float] = field(default_factory=dict)
    """Folders of latents to train on together, {folder: weight}, instead of `latents`; weights are relative shares of
    the samples, more than 0."""
    stage_dir: str = ""
    """Folder on a disk of this machine to which shards are copied before they are read; empty reads them in place."""
    stage_gb: float = 100.0
    """Gigabytes (10^9 bytes) of copies in `stage_dir`, where the longest unused are removed first; more than 0."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty one, which guidance needs; 0 to below 1."""
    shuffle_group: int = 8
    """Shards whose samples are shuffled with each other: more mix better, fewer keep reads local; 1 or more."""
    num_workers: int = 0
    """Processes per training process that read and noise its batches; 0 (it does so itself) or more."""

    def __post_init__(self) -> None:
        if self.source == "shards":
            require(
                bool(self.latents) != bool(self.mix),
                "data.latents is empty: name the folder that trainer.data.encode wrote"
                if not self.latents
                else f"data.latents={self.latents} and data.mix are both set: name the folder within data.mix",
            )
        require(self.image_size >= 1, f"data.image_size is {self.image_size}: use 1 or more")
        for bucket in self.buckets:
            require(
                bool(_BUCKET.fullmatch(bucket)),
                f"data.buckets names {bucket}: write HEIGHTxWIDTH in pixels, such as 256x192",
            )
        require(len(set(self.buckets)) == len(self.buckets), f"data.buckets={self.buckets} names one twice")
        for folder, weight in self.mix.items():
            require(weight > 0, f"data.mix gives {folder} the weight {weight}: use more than 0, or leave it out")
        require(self.enlarge_up_to >= 1, f"data.enlarge_up_to is {self.enlarge_up_to}: use 1 or more")
        require(self.bucket_block >= 0, f"data.bucket_block is {self.bucket_block}: use 0 or more")
        require(
            self.bucket_block > 0 or (len(self.buckets) < 2 and len(self.mix) < 2),
            "data.bucket_block is 0, but data.buckets or data.mix names several: "
            "set it to the global batch size or a multiple of it",
        )
        require(0 <= self.whitening <= 1, f"data.whitening is {self.whitening}: use 0 to 1")
        require(
            self.whitening == 1 or self.normalize == "measured",
            f"data.whitening={self.whitening} needs measured statistics, but data.normalize is {self.normalize}: "
            "use data.normalize=measured or data.whitening=1",
        )
        require(self.stage_gb > 0, f"data.stage_gb is {self.stage_gb}: use more than 0")
        require(0 <= self.caption_dropout < 1, f"data.caption_dropout is {self.caption_dropout}: use 0 to below 1")
        require(self.shuffle_group >= 1, f"data.shuffle_group is {self.shuffle_group}: use 1 or more")
        require(self.num_workers >= 0, f"data.num_workers is {self.num_workers}: use 0 or more")

    def picture_sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels of each bucket, in the order of `buckets`."""
        if not self.buckets:
            return [(self.image_size, self.image_size)]
        return [(int(height), int(width)) for height, width in (bucket.split("x") for bucket in self.buckets)]
