"""What an export says of the run it comes from, so that it means the same elsewhere: no path of the machine it was on.

Of a file or folder the name stays. Codec and text encoder, which an export needs in order to draw, come with a digest
by which a copy of them can be told from another model; they are looked for in the export's folder `encoders`.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.data.latents.samples import LatentInfo
from trainer.encoders.build import build_codec, build_text_encoder
from trainer.encoders.places import paths_in, paths_made_here, placed_settings, short_names, short_settings
from trainer.encoders.protocols import ImageCodec, TextEncoder
from trainer.errors import ConfigError, require

ENCODERS = "encoders"  # folder within an export
_BUILDERS: dict[str, Callable[[str], ImageCodec | TextEncoder]] = {
    "codec": build_codec,
    "text_encoder": build_text_encoder,
}


def _name(path: str) -> str:
    return Path(os.path.abspath(path)).name if path else ""


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run with names in place of paths."""
    found = deepcopy(dict(config))
    for key in ("run_dir", "init_from"):
        found[key] = _name(found[key])
    data = found["data"]
    data["codec"], data["text_encoder"] = short_settings(data["codec"], data["text_encoder"])
    for key in ("images", "latents"):
        data[key] = _name(data[key])
    names = short_names(list(data["mix"]))
    data["mix"] = {names[path]: weight for path, weight in data["mix"].items()}
    data["stage_dir"] = ""
    found["train"] |= dict.fromkeys(found["train"].keys() & {"wandb", "mlflow"}, "")
    deepspeed = found["parallel"]["deepspeed_config"]
    found["parallel"]["deepspeed_config"] = _name(deepspeed) if os.path.isabs(deepspeed) else deepspeed
    return found


def portable_info(info: LatentInfo) -> LatentInfo:
    """The description of the data with names in place of its encoders' paths, and without what only a resume needs."""
    codec, text_encoder = short_settings(info.codec, info.text_encoder)
    return replace(info, codec=codec, text_encoder=text_encoder, samples="")


def describe_encoders(info: LatentInfo, folder: Path | None, *, digests: bool) -> dict[str, Any]:
    """For `config.json`: setting, digest and places in the export of codec and text encoder, which lie in `folder`.

    Synthetic data has none. ConfigError where one cannot be read; without `digests` none is.
    """
    if not info.text_encoder:
        return {}
    given, short = [info.codec, info.text_encoder], short_settings(info.codec, info.text_encoder)
    if folder is not None:
        given = placed_settings(given, folder, "the export")
    found = {}
    for name, setting, named in zip(_BUILDERS, given, short, strict=True):
        places = [f"{ENCODERS}/{path}" for path in paths_in(named)]
        try:
            digest = encoder_digest(name, setting) if digests else ""
        except ConfigError as error:
            raise ConfigError(
                f"{error}; name by --encoders the folder that has it, or leave out by --no-digests what tells a copy "
                "of it from another model"
            ) from error
        found[name] = {"setting": named, "digest": digest, "places": places}
    return found


def encoder_digest(name: str, setting: str) -> str:
    """The digest of a `codec` or `text_encoder` by its setting; ConfigError if it is not there."""
    return _BUILDERS[name](setting).fingerprint()


def copy_encoders(info: LatentInfo, folder: Path | None, export: Path) -> None:
    """Copy into an export the weights that this package trained and nobody else has; ConfigError if they are gone."""
    names = short_names([path for spec in (info.codec, info.text_encoder) for path in paths_in(spec)])
    for path in (path for spec in (info.codec, info.text_encoder) for path in paths_made_here(spec)):
        source, target = folder / names[path] if folder else Path(path), export / ENCODERS / names[path]
        require(source.is_file(), f"{path} is not there: name by --encoders the folder that has it")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
