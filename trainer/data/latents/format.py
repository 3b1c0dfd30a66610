"""The format of a folder of latent shards, shared by its writer (encode.py) and its reader (dataset.py).

dataset.json            written last: what the data set is (`LatentInfo`), the list of its shards, a hash of itself;
                        "buckets" are the latent sizes [h, w], of which each shard has one
NAME.safetensors        latent [n, C, h, w] fp16, unscaled; with data.latent_std also latent_std of the same shape;
                        caption_id [n] int32; for the shard's distinct captions, unpadded one after the other,
                        text [sum of tokens, D] fp16, or with data.text_dtype=int8 [sum of tokens, R] int8 as in
                        packed_text.py (data.text=cache), or caption [sum of bytes] uint8 (online), with
                        text_offset [captions + 1] int64; latent_check [n] and text_check [captions] int64: CRC-32
NAME.json               counts, sums, hashes, fingerprints and code version of that shard
NAME.samples.json       keys, captions and labels of its samples
empty.safetensors       text of the empty caption, stored alike, for caption dropout (not when online)

Every byte is guarded: samples and captions by their CRC when they are read, all else of a shard by `index_sha256`
when it is opened, dataset.json by its own hash. Shards of format 1 have no checks and are read without.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import DataConfig
    from trainer.encoders.protocols import ImageCodec, TextEncoder

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
VALUES_VERSION = 1  # of what the values mean; stays when only the layout changes, so that runs can go on
CROP = "cover, centre, lanczos"
DATASET_NAME = "dataset.json"
# Of DataConfig: those that shape the latents. Of encoders the kind is compared; the fingerprint covers the rest.
SETTINGS = ("image_size", "buckets", "latent_std", "text", "text_dtype", "codec", "text_encoder")
INDEX_TENSORS = ("caption_id", "text_offset", "latent_check", "text_check")


def encoding_fingerprint(data: "DataConfig", codec: "ImageCodec", text_encoder: "TextEncoder | None") -> str:
    """Changes whenever the values of a shard would: encoders, their weights, resolution, crop, options.

    Without a text encoder (data.text=online) the shards do not depend on one.
    """
    parts: dict[str, Any] = {
        "format": VALUES_VERSION,
        "image_size": data.image_size,
        "crop": CROP,
        "codec": codec.fingerprint(),
        "text_encoder": text_encoder.fingerprint() if text_encoder else "online",
    }
    if data.latent_std:
        parts["latent_std"] = True
    if data.text_dtype != "fp16":
        parts["text_dtype"] = data.text_dtype
    if data.buckets:
        parts["buckets"] = data.buckets
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def check_of(*parts: bytes | bytearray | memoryview) -> int:
    """CRC-32 of some bytes: finds every flipped bit and every burst of up to 32 bits."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value


def index_digest(header: bytes, tensors: Mapping[str, bytes | bytearray]) -> str:
    """Hash of what describes a shard: its safetensors header and the tensors of INDEX_TENSORS, in that order."""
    return hashlib.sha256(b"".join([header, *(tensors.get(name, b"") for name in INDEX_TENSORS)])).hexdigest()


def signed_json(content: dict[str, Any]) -> bytes:
    """JSON whose second line is the hash of all that follows it."""
    _, _, body = json.dumps({"sha256": "", **content}, indent=1).encode().split(b"\n", 2)
    return b'{\n "sha256": "%s",\n%s\n' % (hashlib.sha256(body).hexdigest().encode(), body)


def is_signed(text: bytes) -> bool:
    """Whether `signed_json` wrote this, and nothing changed since."""
    first, _, rest = text.partition(b"\n")
    second, _, body = rest.partition(b"\n")
    digest = hashlib.sha256(body.removesuffix(b"\n")).hexdigest()
    return first == b"{" and second == b' "sha256": "%s",' % digest.encode()
