"""Suites over pictures on disk: what each needs, what all ranks compute and keep, what the first one makes of it.

fid      Frechet distance, FID-infinity, KID, precision, recall, density, coverage, Inception score, memorisation
cmmd     CLIP-MMD          dino     Frechet distance and precision, recall in DINOv2's space
clip     CLIP score and R-precision against the prompts
geneval  GenEval with a detector        text    quoted text by OCR

`check` runs before anything is drawn or written; `prepare` on every rank, on its own share of the pictures, and may
be killed at any time; `score` on the first rank reads what is kept. A number that cannot be had is listed under
`skipped` with the reason. To add a suite, write a module with these three functions and name it in _MODULES.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from eval.feature_store import FeatureStore, add_picture_features, hash_files
from eval.metrics.geneval import Rules
from eval.networks.clip import CMMD_CLIP, DEFAULT_CLIP
from eval.networks.protocols import ImageEncoder
from eval.networks.resize import CONVENTIONS, check_convention
from eval.pictures.image_files import folder_files, open_npz, unpack_npz
from eval.pictures.prompts import Prompt
from eval.suites.detection_cache import FLOOR
from trainer.config import require


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What to score with. `reference` is an npz of statistics or pictures, or a folder of pictures."""

    suites: tuple[str, ...]
    out: Path
    num_samples: int = 1
    reference: Path | None = None
    convention: str = CONVENTIONS[0]
    clip: str = DEFAULT_CLIP
    cmmd_clip: str = CMMD_CLIP
    detector: str = "mask2former"
    colors: str = "clip"
    batch_size: int = 32
    num_neighbours: int = 5
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        for suite in self.suites:
            require(suite in SUITES, f"--suite {suite} is unknown: choose from {', '.join(SUITES)}")
        require(bool(self.suites), f"--suite is empty: choose from {', '.join(SUITES)}")
        check_convention(self.convention)
        require(self.colors in ("clip", "nearest"), f"--colors is {self.colors}: use clip or nearest")
        for name in ("num_samples", "batch_size", "num_neighbours"):
            flag = "--samples" if name == "num_samples" else f"--{name.replace('_', '-')}"
            require(getattr(self, name) >= 1, f"{flag} is {getattr(self, name)}: use 1 or more")
        for name in ("score", "counting_score"):
            value = getattr(self.rules, name)
            flag = "--min-score" if name == "score" else "--min-counting-score"
            require(FLOOR <= value < 1, f"{flag} is {value}: use {FLOOR} (what is kept of detections) to 1")


@dataclass(frozen=True, kw_only=True)
class ScoringJob:
    """Pictures in the order of the prompts, `num_samples` of each, and this process's share of the work."""

    config: ScoreConfig
    prompts: list[Prompt]
    files: list[Path]
    rank: int = 0
    world_size: int = 1
    progress: bool = False

    @cached_property
    def hashes(self) -> list[str]:
        """Hash of each picture's file."""
        return hash_files(self.files)

    @cached_property
    def reference_files(self) -> list[Path]:
        """The reference's pictures; empty for statistics."""
        path = self.config.reference
        if path is None or is_statistics(path):
            return []
        return unpack_npz(path, self.config.out / "reference") if path.suffix == ".npz" else folder_files(path)

    def texts(self) -> list[str]:
        """The caption of each picture."""
        return [self.prompts[i // self.config.num_samples].text for i in range(len(self.files))]

    def add(self, encoder: ImageEncoder) -> None:
        """Compute this rank's missing features of pictures and reference."""
        store = self.store(encoder)
        for files in (self.files, self.reference_files):
            add_picture_features(
                store, encoder, files, rank=self.rank, world_size=self.world_size,
                batch_size=self.config.batch_size, progress=self.progress,
            )  # fmt: skip

    def store(self, encoder: ImageEncoder) -> FeatureStore:
        """Where the encoder's features are kept."""
        return FeatureStore(self.config.out / "features", encoder.key, encoder.dim)


Result = dict[str, Any]


def is_statistics(path: Path) -> bool:
    """Whether the reference is an npz with moments; ADM's have pictures too, which are not read then."""
    if path.suffix != ".npz":
        return False
    with open_npz(path) as content:
        return "mu" in content or "arr_0" not in content


def needs_reference(config: ScoreConfig, *, pictures: bool) -> Path:
    path = config.reference
    require(path is not None, "--reference is missing: give the folder of real pictures, or an npz of their statistics")
    assert path is not None
    require(path.exists(), f"--reference {path} does not exist")
    require(
        not (pictures and is_statistics(path)),
        f"--reference {path} holds statistics of another feature space: give a folder of pictures, or leave out cmmd "
        "and dino",
    )
    return path


def attempt(result: Result, skipped: dict[str, str], name: str, compute: Callable[[], Any]) -> None:
    """Add a number, or the reason why these pictures have none."""
    try:
        found = compute()
    except ValueError as error:
        skipped[name] = str(error)
        return
    result[name] = asdict(found) if hasattr(found, "__dataclass_fields__") else found


@dataclass(frozen=True, kw_only=True)
class ScoreSuite:
    """The three steps of a suite."""

    check: Callable[[ScoreConfig, list[Prompt]], None]
    prepare: Callable[[ScoringJob], None]
    score: Callable[[ScoringJob], Result]


def _suite_of(module: str) -> ScoreSuite:
    """The suite whose steps are functions of a module, which is imported when it is used."""

    def step(name: str) -> Callable[..., Any]:
        return lambda *arguments: getattr(import_module(module), name)(*arguments)

    return ScoreSuite(check=step("check"), prepare=step("prepare"), score=step("score"))


_MODULES = {name: f"eval.suites.{name}" for name in ("fid", "cmmd", "dino", "clip")}
_MODULES |= {"geneval": "eval.suites.geneval", "text": "eval.suites.text"}
SUITES = {name: _suite_of(module) for name, module in _MODULES.items()}


def check_all(config: ScoreConfig, prompts: list[Prompt]) -> None:
    """Every suite's check; ConfigError for the first that cannot run."""
    for name in config.suites:
        SUITES[name].check(config, prompts)


def prepare_all(job: ScoringJob) -> None:
    """This rank's share of every suite's expensive part."""
    for name in job.config.suites:
        SUITES[name].prepare(job)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the next suite's network needs the room


def score_all(job: ScoringJob) -> dict[str, Result]:
    """Results of all suites, from what is kept."""
    return {name: SUITES[name].score(job) for name in job.config.suites}
