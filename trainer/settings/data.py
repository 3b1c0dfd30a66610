"""Settings of the data: where it is, what encodes it, in which order it is used."""

import re
from dataclasses import dataclass, field
from typing import Literal

from moe.ranges import MOST, at_least, between, check_ranges, from_to_below, more_than
from trainer.errors import ConfigError, require

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
    image_size: int = field(default=32, metadata=at_least(1))
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
    text_dtype: Literal["fp16", "int8"] = "fp16"
    """How encoded captions are stored: in 16 bits a value, or in 8 with a scale for every 128 (docs/data.md has the
    error), half of what is read and sent; only with `text` cache."""
    latent_std: bool = False
    """Store the standard deviation of the codec's latents too, and draw from their distribution in training; needs a
    codec that has one."""
    normalize: Literal["measured", "codec"] = "measured"
    """Shift and scale latents by the mean and deviation measured on the data, per channel, or by the codec's own."""
    whitening: float = field(default=1.0, metadata=between(0, 1))
    """Exponent w of measured scaling: each channel is divided by deviation^w, then all by one factor to a mean square
    of 1. At 1 all channels are equally loud, at 0 as loud as in the picture; 0 to 1, below 1 only where measured."""
    buckets: list[str] = field(default_factory=list)
    """Picture sizes HEIGHTxWIDTH in pixels, each once; a picture goes to the nearest aspect ratio. None: squares."""
    enlarge_up_to: float = field(default=1.0, metadata=at_least(1))
    """How many times as large as it is a picture may be made to cover its crop; 1 (none is enlarged) or more. Encoding
    leaves out, and counts, those that need more: enlarged they show nothing more, and blur is what a model learns."""
    bucket_block: int = field(default=0, metadata=at_least(0))
    """Samples in a row of one bucket, from all folders by weight; with several buckets or folders a multiple of the
    global batch, otherwise unused; 0 or more."""
    small_buckets: Literal["refuse", "drop"] = "refuse"
    """What to do when a bucket has too few samples for one block: end with an error, or leave the bucket out."""
    mix: dict[str, float] = field(default_factory=dict)
    """Folders of latents to train on together, {folder: weight}, instead of `latents`; weights are relative shares of
    the samples, more than 0."""
    stage_dir: str = ""
    """Folder on a disk of this machine to which shards are copied before they are read; empty reads them in place."""
    stage_gb: float = field(default=100.0, metadata=more_than(0))
    """Gigabytes (10^9 bytes) of copies in `stage_dir`, where the longest unused are removed first; more than 0."""
    caption_dropout: float = field(default=0.1, metadata=from_to_below(0, 1))
    """Share of captions replaced by the empty one, which guidance needs; 0 to below 1."""
    shuffle_group: int = field(default=8, metadata=at_least(1))
    """Shards whose samples are shuffled with each other: more mix better, fewer keep reads local; 1 or more."""
    num_workers: int = field(default=0, metadata=at_least(0))
    """Processes per training process that read and noise its batches; 0 (it does so itself) or more."""

    def __post_init__(self) -> None:
        check_ranges(self, "data.", ConfigError)
        if self.source == "shards":
            require(
                bool(self.latents) != bool(self.mix),
                "data.latents is empty: name the folder that trainer.data.encode wrote"
                if not self.latents
                else f"data.latents={self.latents} and data.mix are both set: name the folder within data.mix",
            )
        for bucket in self.buckets:
            require(
                bool(_BUCKET.fullmatch(bucket)),
                f"data.buckets names {bucket}: write HEIGHTxWIDTH in pixels, such as 256x192",
            )
        require(len(set(self.buckets)) == len(self.buckets), f"data.buckets={self.buckets} names one twice")
        for folder, weight in self.mix.items():
            require(
                0 < weight <= MOST,
                f"data.mix gives {folder} the weight {weight}: use more than 0, at most {MOST}, or leave it out",
            )
        require(
            self.bucket_block > 0 or (len(self.buckets) < 2 and len(self.mix) < 2),
            "data.bucket_block is 0, but data.buckets or data.mix names several: "
            "set it to the global batch size or a multiple of it",
        )
        require(
            self.text == "cache" or self.text_dtype == "fp16",
            f"data.text_dtype={self.text_dtype} is about stored captions, but data.text=online stores none encoded: "
            "use data.text_dtype=fp16 or data.text=cache",
        )
        require(
            self.whitening == 1 or self.normalize == "measured",
            f"data.whitening={self.whitening} needs measured statistics, but data.normalize is {self.normalize}: "
            "use data.normalize=measured or data.whitening=1",
        )

    def picture_sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels of each bucket, in the order of `buckets`."""
        if not self.buckets:
            return [(self.image_size, self.image_size)]
        return [(int(height), int(width)) for height, width in (bucket.split("x") for bucket in self.buckets)]
