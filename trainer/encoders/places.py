"""Files and folders within the settings of encoders: by which names an export calls them, where they lie elsewhere.

`diffusers:/models/sd3/vae` is called `diffusers:vae`: the last part of the path, or as many as tell two paths apart.
Who has the files in another folder names that folder, and they are looked for there by these names.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.encoders.build import CODECS, TEXT_ENCODERS, Registered, split_chain
from trainer.errors import require


def _match(part: str) -> tuple[Registered, re.Match[str]] | None:
    for entry in (*CODECS, *TEXT_ENCODERS):
        found = re.fullmatch(entry.pattern, part)
        if found and found.groupdict().get("path"):
            return entry, found
    return None


def paths_in(spec: str) -> list[str]:
    """The paths within a setting, in order; a codec has one at most."""
    return [found["path"] for _, found in filter(None, map(_match, split_chain(spec)))]


def paths_made_here(spec: str) -> list[str]:
    """Those of them that nobody else has: weights that were trained by this package."""
    return [found["path"] for entry, found in filter(None, map(_match, split_chain(spec))) if entry.is_made_here]


def with_paths(spec: str, place: Callable[[str], str]) -> str:
    """The setting with each of its paths replaced by what `place` says."""
    parts = []
    for part in split_chain(spec):
        matched = _match(part)
        if matched is not None:
            start, end = matched[1].span("path")
            part = part[:start] + place(part[start:end]) + part[end:]
        parts.append(part)
    return "+".join(parts)


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The shortest endings, of equally many parts, that tell paths apart; short ones stay as they are."""
    parts = {path: Path(os.path.abspath(path)).parts[1:] for path in paths}
    depth = 1
    while len({ends[-depth:] for ends in parts.values()}) < len(set(parts.values())):
        depth += 1
    return {path: "/".join(ends[-depth:]) for path, ends in parts.items()}


def short_settings(*specs: str) -> list[str]:
    """Settings of encoders that belong together, with short names in place of their paths."""
    names = short_names([path for spec in specs for path in paths_in(spec)])
    return [with_paths(spec, names.__getitem__) for spec in specs]


def placed_settings(specs: Sequence[str], folder: Path, whose: str) -> list[str]:
    """The same with files in `folder`, where they have their short names; ConfigError naming `whose` is not there."""
    names = short_names([path for spec in specs for path in paths_in(spec)])

    def place(path: str) -> str:
        found = folder / names[path]
        setting = next(spec for spec in specs if path in paths_in(spec))
        require(
            found.exists(),
            f"{whose} needs {setting}, but {found} is not there: copy it there, or name by --encoders the folder that "
            "has it",
        )
        return str(found)

    return [with_paths(spec, place) for spec in specs]
