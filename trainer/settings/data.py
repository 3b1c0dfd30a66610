"""Settings of the data: where it is, what encodes it, in which order it is used."""

import re
from dataclasses import dataclass, field
from typing import Literal

from trainer.errors import require

_BUCKET = re.compile(r"([1-9]\d*)x([1-9]\d*)")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where latent shards come from and how they are read.

    `latents` is a folder that `trainer.data.encode` wrote. `images` is the folder of image shards it
    reads. `source: synthetic` needs neither: seeded random latents, made when the run starts.

    `text: online` stores captions only and encodes them while training, for data sets whose text would be too
    large. `latent_std` stores the standard deviation of the codec's latent too, to sample from while training.
    `normalize` sets what latents are shifted and scaled by: measured on the data set, or the codec's own values.
    `whitening` w divides each channel by its standard deviation to the power w, then all by one factor, so that their
    mean square is 1: 1 makes all channels equally loud, 0 keeps the loudness that they have in the picture.

    `buckets` are picture sizes "HEIGHTxWIDTH"; each picture goes to the one of the nearest aspect ratio (none: all
    are `image_size` squares). Each global batch is of one bucket: buckets take turns in blocks of `bucket_block`
    samples, a multiple of the global batch. `small_buckets` decides about buckets smaller than a block. `mix` reads
    several folders of latents instead of `latents`: {folder: weight}.

    `stage_dir` is a folder on a disk of this machine to which shards are copied before they are read, up to
    `stage_gb` gigabytes ("": they are read where they are).
    """

    source: Literal["shards", "synthetic"] = "synthetic"
    images: str = ""
    latents: str = ""
    image_size: int = 32
    codec: str = "pixel"
    text_encoder: str = "minilm"
    text: Literal["cache", "online"] = "cache"
    latent_std: bool = False
    normalize: Literal["measured", "codec"] = "measured"
    whitening: float = 1.0
    buckets: list[str] = field(default_factory=list)
    bucket_block: int = 0
    small_buckets: Literal["refuse", "drop"] = "refuse"
    mix: dict[str, float] = field(default_factory=dict)
    stage_dir: str = ""
    stage_gb: float = 100.0
    caption_dropout: float = 0.1
    shuffle_group: int = 8
    num_workers: int = 0

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
        require(
            0 <= self.caption_dropout < 1,
            f"data.caption_dropout is {self.caption_dropout}: use 0 to below 1",
        )
        require(self.shuffle_group >= 1, f"data.shuffle_group is {self.shuffle_group}: use 1 or more")
        require(self.num_workers >= 0, f"data.num_workers is {self.num_workers}: use 0 or more")

    def picture_sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels of each bucket, in the order of `buckets`."""
        if not self.buckets:
            return [(self.image_size, self.image_size)]
        sizes = [bucket.split("x") for bucket in self.buckets]
        return [(int(height), int(width)) for height, width in sizes]
