"""Runs img2dataset as a program of its own, on a clean module path.

It is never imported: its dependency `dataclasses` 0.6 shadows the standard library wherever PYTHONPATH or
`pip --target` put site-packages first, so the interpreter is isolated from PYTHONPATH and the user's site folder.
What it returns says little (it exits with 0 when nothing was downloaded): callers check counts.
"""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config import require

VERSION = "1.47.0"
DISTRIBUTORS = ("multiprocessing", "pyspark", "ray")
# Of DownloadSettings: what img2dataset calls otherwise; how tars are filled, not with what: these may change meanwhile.
_OPTIONS = {"samples_per_tar": "number_sample_per_shard", "processes": "processes_count", "threads": "thread_count"}
LIMITS = ("download_seconds", "tar_seconds")  # ours, see download_limits.py
_SETTINGS_OF_THE_WAY = ("processes", "threads", "timeout", "retries", "distributor", *LIMITS)
_ENDING = (signal.SIGTERM, signal.SIGINT)
_START = "from img2dataset.main import main; main()"
# Its processes get this path, last and so hiding nothing, and find the class there. On other machines, where ray and
# pyspark work, they may not.
_BOUNDED_START = """
import functools, json, sys
from img2dataset.main import main
folder, limits = sys.argv.pop(1), json.loads(sys.argv.pop(1))
sys.path.append(folder)
from download_limits import BoundedDownloader
sys.modules["img2dataset.main"].Downloader = functools.partial(BoundedDownloader, **limits)
main()
"""
_PROBE = """
import importlib.metadata, importlib.util, json, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
names = ("imghdr", "pyspark", "ray")
found = {name: importlib.util.find_spec(name) is not None for name in names}
print(json.dumps({**found, "img2dataset": version("img2dataset"), "python": sys.version.split()[0]}))
"""


@dataclass(frozen=True, kw_only=True)
class DownloadSettings:
    """What is asked of img2dataset.

    The first group decides what a tar holds, and must stay the same for the life of a folder. Pictures larger than
    `image_size` on their shorter side are reduced to it, never cropped, padded or enlarged. `timeout` bounds each read
    of a connection, `download_seconds` one try, `tar_seconds` all that goes into a tar.
    """

    image_size: int = 320
    min_image_size: int = 0
    max_aspect_ratio: float = 4.0
    encode_format: str = "jpg"
    encode_quality: int = 95
    samples_per_tar: int = 10_000

    processes: int = 1
    threads: int = 256
    timeout: int = 10
    retries: int = 2
    download_seconds: int = 60
    tar_seconds: int = 7200
    distributor: str = "multiprocessing"

    def of_content(self) -> dict[str, Any]:
        """The settings that decide what a tar holds."""
        return {name: value for name, value in asdict(self).items() if name not in _SETTINGS_OF_THE_WAY}


def check_environment(python: str, distributor: str) -> None:
    """ConfigError unless an interpreter has a usable img2dataset."""
    try:
        done = subprocess.run([python, "-I", "-c", _PROBE], capture_output=True, text=True, env=_environment(python))
        found = json.loads(done.stdout or "{}")
    except (OSError, ValueError):
        found = {}
    require(bool(found), f"--python {python} does not start: name the interpreter of an environment with img2dataset")
    require(
        found["img2dataset"] == VERSION,
        f"--python {python} has img2dataset {found['img2dataset']}: install img2dataset=={VERSION} there",
    )
    require(
        found["imghdr"],
        f"--python {python} is {found['python']}, which img2dataset {VERSION} cannot use (no module imghdr): "
        "use Python 3.12 or older, or install standard-imghdr there",
    )
    # Without ray it would end at once, with exit code 0 and nothing downloaded.
    require(
        distributor == "multiprocessing" or found.get(distributor, False),
        f"--distributor {distributor} needs the package {distributor} in the environment of --python {python}",
    )


def _environment(python: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # Else each of its processes asks the network for a newer albumentations; pyspark's workers need the interpreter.
    return kept | {"NO_ALBUMENTATIONS_UPDATE": "1", "PYSPARK_PYTHON": python, "PYSPARK_DRIVER_PYTHON": python}


def arguments(url_list: Path, folder: Path, settings: DownloadSettings, columns: list[str]) -> list[str]:
    """Program and command line of img2dataset for a parquet list with columns url, caption and further ones."""
    options = {
        "url_list": url_list.absolute(),  # it does not make paths absolute itself, and workers may be elsewhere
        "output_folder": folder.absolute(),
        "input_format": "parquet",
        "output_format": "webdataset",
        "url_col": columns[0],
        "caption_col": columns[1],
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        **{_OPTIONS.get(name, name): value for name, value in asdict(settings).items() if name not in LIMITS},
        "compute_hash": "sha256",
        "incremental_mode": "incremental",
        "enable_wandb": False,
    }
    if columns[2:]:
        options["save_additional_columns"] = json.dumps(columns[2:])
    start = [_START]
    if settings.distributor == "multiprocessing":
        limits = json.dumps({name: getattr(settings, name) for name in LIMITS})
        start = [_BOUNDED_START, str(Path(__file__).parent), limits]
    return [*start, *(f"--{name}={value}" for name, value in options.items())]


@contextmanager
def _signals_held() -> Iterator[Callable[[], None]]:
    """Keep SIGTERM and SIGINT back until the yielded function is called.

    A handler that raises while `Popen` has begun a process and not yet returned would leave that process behind.
    """
    received: list[int] = []
    previous = {number: signal.signal(number, lambda n, _: received.append(n)) for number in _ENDING}

    def release() -> None:
        while previous:
            signal.signal(*previous.popitem())
        while received:
            signal.raise_signal(received.pop())

    try:
        yield release
    finally:
        release()


def run(python: str, options: list[str], log: Path, lock: int, watch: Callable[[], bool]) -> None:
    """Run img2dataset until it ends or `watch`, asked every second, is no longer content; its output in a log file.

    It inherits the descriptor `lock`, so that a lock on it is held as long as either of us lives.
    """
    with log.open("a") as output, _signals_held() as release:
        process = subprocess.Popen(
            [python, "-I", "-c", *options],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=_environment(python), pass_fds=(lock,), start_new_session=True,
        )  # fmt: skip
        try:
            release()
            while True:
                try:
                    process.wait(timeout=1)
                    return
                except subprocess.TimeoutExpired:
                    if not watch():
                        return
        finally:
            if process.poll() is None:  # it stands still, or we are being ended: take its processes with us
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
