"""The format of a folder of latent shards, shared by its writer (encode.py) and its reader (dataset.py).

dataset.json            written last: what the data set is (`LatentInfo`), the list of its shards
NAME.safetensors        latent [n, C, h, w] fp16, unscaled; caption_id [n] int32; text [sum of tokens, D] fp16
                        of the shard's distinct captions, unpadded; text_offset [captions + 1] int64
NAME.json               counts, sums, sha256, keys, captions and labels of that shard
empty.safetensors       text [tokens, D] of the empty caption, for caption dropout and guidance
"""

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.encoders import ImageCodec, TextEncoder

FORMAT_VERSION = 1
DATASET_NAME = "dataset.json"
EMPTY_NAME = "empty.safetensors"
SETTINGS = ("image_size", "codec", "text_encoder")  # of DataConfig: those that shape the latents


def encoding_fingerprint(image_size: int, codec: "ImageCodec", text_encoder: "TextEncoder") -> str:
    """Changes whenever the values of a shard would: encoders, their weights, resolution, crop, format."""
    parts = {
        "format": FORMAT_VERSION,
        "image_size": image_size,
        "crop": "cover, centre, lanczos",
        "codec": codec.fingerprint(),
        "text_encoder": text_encoder.fingerprint(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
