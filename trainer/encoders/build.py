"""Builds the frozen encoders that `data.codec` and `data.text_encoder` name: one line registers one.

A module is imported when a setting names it, since some need optional packages.
"""

import re
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trainer.encoders.protocols import ImageCodec, TextEncoder
from trainer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Registered:
    """`pattern` is a regular expression of the whole setting, whose groups are the arguments of the class `path`.

    A group named `path` is a file or folder, which an export names without the folders above it (`places.py`);
    `is_made_here` where nobody else has it, so that the export holds a copy. `usage` is how to write it, for errors.
    """

    pattern: str
    path: str
    usage: str
    is_made_here: bool = False


CODECS = [
    Registered(pattern="pixel", path="trainer.encoders.pixel:PixelCodec", usage="pixel"),
    Registered(pattern="dct", path="trainer.encoders.dct:DctCodec", usage="dct"),
    Registered(
        pattern="vae:(?P<path>.*)", path="trainer.encoders.vae:VaeCodec", usage="vae:FILE", is_made_here=True
    ),
    Registered(
        pattern="diffusers:(?P<path>.*)", path="trainer.encoders.diffusers_codec:DiffusersCodec",
        usage="diffusers:DIR",
    ),
]  # fmt: skip
TEXT_ENCODERS = [
    Registered(pattern=r"minilm(?:@(\d+))?", path="trainer.encoders.minilm:MiniLm", usage="minilm, minilm@LAYER"),
    Registered(
        pattern="open_clip:(?:([^:]*):)?(?P<path>.*)", path="trainer.encoders.open_clip:OpenClipText",
        usage="open_clip:ARCH:FILE, open_clip:DIR",
    ),
    Registered(pattern=r"t5(?:@(\d+))?:(?P<path>.+)", path="trainer.encoders.t5:T5Text", usage="t5:DIR"),
]  # fmt: skip


def build_codec(spec: str, device: torch.device | None = None) -> ImageCodec:
    """The codec that `data.codec` names; ConfigError if there is none, or its files are not there.

    It computes on `device`; None: on this process's GPU, if there is one.
    """
    *others, last = (codec.usage for codec in CODECS)
    codec: ImageCodec = _build("data.codec", spec, CODECS, f"use {', '.join(others)} or {last} of a local model")
    codec.device = device
    return codec


def build_text_encoder(spec: str, device: torch.device | None = None) -> TextEncoder:
    """The text encoder that `data.text_encoder` names; `A+B` puts the tokens of several behind each other."""
    parts = split_chain(spec)
    if len(parts) > 1:
        return TextChain([build_text_encoder(part, device) for part in parts])
    remedy = f"use {', '.join(encoder.usage for encoder in TEXT_ENCODERS)}, or several of them joined by +"
    found: TextEncoder = _build("data.text_encoder", spec, TEXT_ENCODERS, remedy)
    found.device = device
    return found


def split_chain(spec: str) -> list[str]:
    """The single encoders of `A+B`."""
    names = "|".join(re.split(r"\W", encoder.usage)[0] for encoder in TEXT_ENCODERS)
    return re.split(rf"\+(?=(?:{names})(?:[@:+]|$))", spec)  # any other + belongs to a path


class TextChain:
    """Several text encoders at once, as SD3 has CLIP and T5: their tokens in a row, filled with zeros to the widest."""

    device: torch.device | None = None  # each of them has its own

    def __init__(self, encoders: list[TextEncoder]) -> None:
        self.encoders = encoders
        self.dim = max(encoder.dim for encoder in encoders)
        self.max_tokens = sum(encoder.max_tokens for encoder in encoders)

    def fingerprint(self) -> str:
        """All of the encoders', in order."""
        return "+".join(encoder.fingerprint() for encoder in self.encoders)

    def encode(self, captions: list[str]) -> list[Tensor]:
        """One fp32 [sum of n, dim] per caption."""
        parts = [encoder.encode(captions) for encoder in self.encoders]
        wide = [[functional.pad(text, (0, self.dim - text.shape[1])) for text in part] for part in parts]
        return [torch.cat(texts) for texts in zip(*wide, strict=True)]


def _build(setting: str, spec: str, registered: list[Registered], remedy: str) -> Any:
    for entry in registered:
        if matched := re.fullmatch(entry.pattern, spec):
            return resolve_name(entry.path)(*matched.groups())
    raise ConfigError(f"{setting}={spec} is not known: {remedy}")
