"""The files of a checkpoint or an export, which anybody may have written: nothing outside the folder is read.

Names, JSON and its shape are checked before anything is done with them; what does not fit is one sentence.
"""

import stat
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import StringConstraints, TypeAdapter, ValidationError

from trainer.errors import ConfigError, require, sentence_of

T = TypeVar("T")
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=200)]
_MAX_JSON = 1 << 30  # bytes; the index of a model of a million tensors has a tenth of it


def member(folder: Path, name: str) -> Path:
    """The path of a file in a folder; ConfigError if it is missing, not a plain file, or a link out of the folder."""
    path = folder / name
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
        inside = path.resolve().parent == folder.resolve()
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    require(is_file and inside, f"{path} is not a plain file of this folder")
    return path


def read_json(folder: Path, name: str, shape: TypeAdapter[T]) -> T:
    """A small file of a folder in the types of `shape`; ConfigError naming the file and the first misfit."""
    path = member(folder, name)
    try:
        require(path.stat().st_size <= _MAX_JSON, f"{path} is damaged: it has more than {_MAX_JSON} bytes")
        return shape.validate_json(path.read_bytes(), strict=True)  # nothing is converted to another type
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {sentence_of(error)}") from error
    except ValidationError as error:
        raise ConfigError(f"{path} is damaged: {misfit(error)}") from error


def misfit(error: ValidationError) -> str:
    """The first thing that is wrong, with its place; printable and short, whatever is in the file."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    words = f"{place}: {first['msg']}" if place else first["msg"]
    return "".join(letter if letter.isprintable() else "?" for letter in words[:200])
