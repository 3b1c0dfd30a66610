"""Tries an encoder on one picture or caption: whether its files are right, before hours of encoding."""

from pathlib import Path

import torch

from trainer.encoders.build import CODECS, TEXT_ENCODERS, build_codec, build_text_encoder
from trainer.encoders.pretrained import read_json
from trainer.errors import ConfigError, require

_CAPTION = "a cat on a blue background"
_PIXELS = 64  # a multiple of every codec's factor


def setting_of(given: str) -> str:
    """A setting as it is; for a folder the setting of what lies in it, ConfigError if that is unknown."""
    kinds = {entry.usage.split(":")[0].split(",")[0] for entry in (*CODECS, *TEXT_ENCODERS)}
    if given.split(":")[0].split("@")[0].split("+")[0] in kinds:
        return given
    folder = Path(given)
    require(
        folder.is_dir(), f"{given} is no folder, nor a setting of data.codec or data.text_encoder: name one of these"
    )
    if (folder / "open_clip_config.json").is_file():
        return f"open_clip:{folder}"
    inside = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    config = read_json(str(folder), inside / "config.json", "model's config.json, or open_clip_config.json")
    if "_class_name" in config:
        return f"diffusers:{folder}"
    if config.get("model_type") in ("t5", "umt5"):
        return f"t5:{folder}"
    raise ConfigError(f"{given} has a {config.get('model_type')} model, which is no codec or text encoder known here")


def check(given: str) -> list[str]:
    """Lines that say what an encoder is and gives; ConfigError, from its own checks, if it cannot be used."""
    setting = setting_of(given)
    is_codec = setting.split(":")[0] in {entry.usage.split(":")[0] for entry in CODECS}
    return [f"{'data.codec' if is_codec else 'data.text_encoder'}={setting}", *(_codec if is_codec else _text)(setting)]


def _codec(setting: str) -> list[str]:
    codec = build_codec(setting)
    ramp = torch.linspace(-0.8, 0.8, _PIXELS)
    rgb_BCHW = torch.stack([ramp.expand(_PIXELS, -1), ramp.expand(_PIXELS, -1).T, torch.zeros(_PIXELS, _PIXELS)])[None]
    latent_BCHW = codec.encode(rgb_BCHW)
    back_BCHW = codec.decode(latent_BCHW)
    side = _PIXELS // codec.factor
    fits = latent_BCHW.shape == (1, codec.channels, side, side) and back_BCHW.shape == rgb_BCHW.shape
    require(fits, f"data.codec={setting} gives a latent {tuple(latent_BCHW.shape)}: it is another model than it says")
    finite = bool(latent_BCHW.isfinite().all() and back_BCHW.isfinite().all())
    require(finite, f"data.codec={setting} gives values that are not finite: copy its weights again")
    error = float((back_BCHW - rgb_BCHW).square().mean()) / 4  # of values from 0 to 1
    return [
        f"{codec.channels} channels, factor {codec.factor}, digest {codec.fingerprint()}",
        f"a smooth picture comes back with a PSNR of {-10 * torch.tensor(max(error, 1e-12)).log10():.1f} dB "
        "(trained codecs: above 25)",
    ]


def _text(setting: str) -> list[str]:
    encoder = build_text_encoder(setting)
    empty_LD, text_LD = encoder.encode(["", _CAPTION])
    fits = text_LD.shape[1] == encoder.dim and 1 <= len(empty_LD) < len(text_LD) <= encoder.max_tokens
    require(fits, f"data.text_encoder={setting} gives {tuple(text_LD.shape)} values for {_CAPTION!r}: copy it again")
    finite = bool(text_LD.isfinite().all() and empty_LD.isfinite().all())
    require(finite, f"data.text_encoder={setting} gives values that are not finite: copy its weights again")
    return [
        f"{encoder.dim} values a token, at most {encoder.max_tokens} tokens, digest {encoder.fingerprint()}",
        f"{_CAPTION!r} has {len(text_LD)} tokens, the empty caption {len(empty_LD)}",
    ]
