"""Experiment trackers beside TensorBoard: Weights & Biases (`train.wandb`), MLflow (`train.mlflow`).

Each works in a thread of its own, behind a queue: a slow, failing or unreachable server costs training nothing, and is
said once. The identity of a run there lies in RUN/trackers.json, so that a resumed run goes on with it, and the scores
of `eval.run` reach it, too.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import yaml

from trainer.errors import require, sentence_of
from trainer.files import read_json, write_json

logger = logging.getLogger("ec_dit")
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}  # by setting, `train.wandb` and `train.mlflow`
IDENTITIES = "trackers.json"
QUEUE_SIZE, CLOSE_SECONDS = 1000, 20.0


class Tracker(Protocol):
    """What a tracker can do with a run that it has opened; any of it may wait for a network, and fail."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step."""

    def picture(self, step: int, path: Path) -> None:
        """The sample grid of a step."""

    def attach(self, path: Path) -> None:
        """A file that belongs to the run, in place of an older one of its name."""

    def close(self) -> None:
        """Send what is left."""


class Identity:
    """What a tracker calls a run: read from the run's folder, or written there once it is known."""

    def __init__(self, run_dir: Path, kind: str) -> None:
        self.path, self.kind = run_dir / IDENTITIES, kind

    def read(self) -> str | None:
        """The name, None of a run that is new there."""
        return self._all().get(self.kind)

    def write(self, name: str) -> None:
        """Keep the name."""
        with _WRITING:  # the trackers' threads share the file
            write_json(self.path, self._all() | {self.kind: name})

    def _all(self) -> dict[str, str]:
        return read_json(self.path, "delete it: a new run begins there") if self.path.exists() else {}


_WRITING = threading.Lock()
Job = Callable[[Tracker], None]


class Sender:
    """A tracker behind its queue. Nothing that is called here waits, but `close`."""

    def __init__(self, setting: str, build: Callable[[], Tracker]) -> None:
        self.setting, self.build = setting, build
        self.jobs: queue.Queue[Job | None] = queue.Queue(QUEUE_SIZE)
        self.num_lost, self.has_failed = 0, False
        self.thread = threading.Thread(target=self._work, name=setting, daemon=True)
        self.thread.start()

    def send(self, job: Job) -> None:
        """Do this with the tracker when its turn comes; dropped, and counted, where it cannot keep up."""
        try:
            self.jobs.put_nowait(job)
        except queue.Full:
            self._failed("it cannot keep up")
            self.num_lost += 1

    def close(self, end: float) -> None:
        """Send what is left before `time.monotonic()` is `end`, and say how much was lost."""
        with suppress(queue.Full):
            self.jobs.put(None, timeout=max(0.0, end - time.monotonic()))
            self.thread.join(max(0.0, end - time.monotonic()))
        if self.thread.is_alive():
            self.num_lost += self.jobs.qsize()
            self._failed("it did not end in time")
        if self.num_lost:
            logger.warning("%s: %d reports were lost", self.setting, self.num_lost)

    def _work(self) -> None:
        tracker: Tracker | None = None
        try:
            tracker = self.build()
        except Exception as error:
            self._failed(sentence_of(error))
        while (job := self.jobs.get()) is not None:
            self._try(job, tracker)
        if tracker is not None:
            self._try(lambda found: found.close(), tracker)

    def _try(self, job: Job, tracker: Tracker | None) -> None:
        try:
            if tracker is not None:
                job(tracker)
                return
        except Exception as error:
            self._failed(sentence_of(error))
        self.num_lost += 1

    def _failed(self, why: str) -> None:
        """Say it, the first time."""
        if not self.has_failed:
            self.has_failed = True
            logger.warning("%s cannot be written, and training goes on without it: %s", self.setting, _line(why))


class Trackers:
    """All trackers that the settings of a run ask for, often none; of the main process."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        """`config` is the run's, as nested dicts."""
        wanted = {kind: str(config["train"].get(kind) or "") for kind in PACKAGES}
        self.senders = [
            Sender(f"train.{kind}={where}", partial(_build, kind, where, run_dir, config))
            for kind, where in wanted.items()
            if where
        ]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step."""
        self._send(lambda tracker: tracker.log(step, values))

    def picture(self, step: int, path: Path) -> None:
        """The sample grid of a step."""
        self._send(lambda tracker: tracker.picture(step, path))

    def attach(self, path: Path) -> None:
        """A file that belongs to the run."""
        self._send(lambda tracker: tracker.attach(path))

    def close(self) -> None:
        """Send what is left, or give it up after some time."""
        end = time.monotonic() + CLOSE_SECONDS
        for sender in self.senders:
            sender.close(end)

    def _send(self, job: Job) -> None:
        for sender in self.senders:
            sender.send(job)


def check_trackers(wandb: str, mlflow: str) -> None:
    """ConfigError where the settings name a tracker whose package is missing; imports nothing."""
    for kind, where in (("wandb", wandb), ("mlflow", mlflow)):
        there = not where or find_spec(kind) is not None
        require(there, f"train.{kind}={where} needs the package {PACKAGES[kind]}: run pip install {PACKAGES[kind]}")


def send_scores(run_dir: Path, step: int, numbers: Mapping[str, float], files: Sequence[Path]) -> None:
    """Log scores of a run's checkpoint where the run is logged, with files of the report; waits until they are sent."""
    path = run_dir / "config.yaml"
    if not (path.is_file() and (run_dir / IDENTITIES).is_file()):
        return
    trackers = Trackers(run_dir, yaml.safe_load(path.read_text(encoding="utf-8")))
    trackers.log(step, numbers)
    for file in files:
        trackers.attach(file)
    trackers.close()


def _build(kind: str, where: str, run_dir: Path, config: Mapping[str, Any]) -> Tracker:
    """Open the run there; what it takes is imported only now."""
    identity = Identity(run_dir, kind)
    if kind == "wandb":
        from trainer.telemetry.wandb_tracker import WandbTracker

        return WandbTracker(where, run_dir, config, known=identity.read(), keep=identity.write)
    from trainer.telemetry.mlflow_tracker import MlflowTracker

    return MlflowTracker(where, run_dir, config, known=identity.read(), keep=identity.write)


def _line(text: str) -> str:
    """The beginning of a message that may have many lines."""
    words = " ".join(text.split())
    return words if len(words) <= 300 else f"{words[:297]}..."
