"""The table of pretrained weights in weights.yaml."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from omegaconf import OmegaConf


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One file of weights.

    `sha256` is the hash or its published beginning (empty: none is published). The source is `url`, or `package` (a pip
    requirement) whose `member` it is; `module` is the package's import name.
    """

    name: str
    sha256: str
    licence: str
    note: str
    url: str = ""
    package: str = ""
    module: str = ""
    member: str = ""

    @property
    def file(self) -> str:
        """Its name in the cache folder, as its publisher calls it."""
        return PurePosixPath(self.url or self.member).name

    def command(self) -> str:
        """What fetches it on a machine with internet."""
        return f"python -m eval.weights fetch {self.name}"


_ENTRIES: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("weights.yaml")), resolve=True)
TABLE = {name: Weights(name=name, **fields) for name, fields in _ENTRIES.items()}
