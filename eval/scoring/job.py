"""Suites of metrics over pictures on disk: their settings, the parts of a suite, and the job that suites work on.

A suite's `check` runs before anything is drawn or written; `prepare` runs on every rank, on its own share of the
pictures, and may be killed at any time; `score` on the first rank turns what `prepare` has stored into numbers. A
number that these pictures cannot have is listed under `skipped` with the reason. The suites are named in
eval/scoring/options.py.

A closed set is one with a true picture for each prompt (`true_pictures`). Its scores come with controls, which a
score is read against: the true pictures themselves, and those that the model drew before its first step.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.demo.prompts import write_training_pictures, write_true_pictures
from eval.metrics.geneval import Rules
from eval.networks.clip import CMMD_CLIP, DEFAULT_CLIP
from eval.networks.protocols import ImageEncoder
from eval.networks.resize import CONVENTIONS, check_convention
from eval.pictures.image_files import folder_files, geneval_files, open_npz, read_picture, unpack_npz
from eval.pictures.prompts import Prompt
from eval.scoring.detection_cache import FLOOR
from eval.scoring.feature_store import ALONE, FeatureStore, add_picture_features, hash_files
from eval.scoring.options import EMBEDDED, SUITES
from trainer.config import require
from trainer.distributed import World
from trainer.files import check_writable

Result = dict[str, Any]
"""What a suite reports: nested numbers, `skipped` {name: reason}, `card` (the protocol), and what its section shows."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What to score with."""

    suites: tuple[str, ...]
    """Names of eval/scoring/options.py, at least one."""
    out: Path
    """Folder of the report, and of the features and detections that are kept for the next one."""
    num_samples: int = 1
    """Pictures per prompt; 1 or more."""
    reference: Path | None = None
    """Real pictures: a folder, an npz of statistics or of pictures, or `embedded` for as many training scenes."""
    true_pictures: Path | None = None
    """A true picture of each prompt, in GenEval's layout, or `embedded` for the built-in scenes; None: no controls."""
    convention: str = CONVENTIONS[0]
    """How pictures are resized for the FID network; one of eval/networks/resize.py."""
    clip: str = DEFAULT_CLIP
    """CLIP model of the CLIP score and of GenEval's colours, ARCH:TAG or ARCH:FILE."""
    cmmd_clip: str = CMMD_CLIP
    """CLIP model of CMMD, ARCH:TAG or ARCH:FILE."""
    detector: str = "mask2former"
    """Detector of GenEval: a name of eval/networks/detectors.py, or `embedded` for the one of the built-in scenes."""
    colors: str = "clip"
    """Judge of the colours of detected objects: clip, or nearest (no weights, for checks only)."""
    num_neighbours: int = 3
    """k of precision, recall, density and coverage; 1 or more. 3 is that of arXiv 1904.06991 and torch-fidelity."""
    rules: Rules = field(default_factory=Rules)
    """Thresholds of GenEval's judge."""

    def __post_init__(self) -> None:
        for suite in self.suites:
            require(suite in SUITES, f"--suite {suite} is unknown: choose from {', '.join(SUITES)}")
        require(bool(self.suites), f"--suite is empty: choose from {', '.join(SUITES)}")
        check_writable(self.out, f"--out {self.out}")
        check_convention(self.convention)
        require(self.colors in ("clip", "nearest"), f"--colors is {self.colors}: use clip or nearest")
        for name in ("num_samples", "num_neighbours"):
            flag = f"--{name.removeprefix('num_')}"
            require(getattr(self, name) >= 1, f"{flag} is {getattr(self, name)}: use 1 or more")
        for name in ("score", "counting_score"):
            value = getattr(self.rules, name)
            flag = "--min-score" if name == "score" else "--min-counting-score"
            require(FLOOR <= value < 1, f"{flag} is {value}: use {FLOOR} (what is kept of detections) to 1")


def score_config(given: argparse.Namespace, suites: tuple[str, ...], out: Path, num_samples: int) -> ScoreConfig:
    """Settings from the options of `eval.scoring.options`; what is not given keeps its default."""
    rules = {"score": given.min_score, "counting_score": given.min_counting_score}
    names = ("reference", "true_pictures", "convention", "clip", "cmmd_clip", "detector", "colors", "num_neighbours")
    return ScoreConfig(
        suites=suites,
        out=out,
        num_samples=num_samples,
        rules=Rules(**{name: value for name, value in rules.items() if value is not None}),
        **{name: getattr(given, name) for name in names if getattr(given, name) is not None},
    )


@dataclass(frozen=True, kw_only=True)
class ScoringJob:
    """Pictures in the order of the prompts, `num_samples` of each, and this process's share of the work.

    `folder` is what results.jsonl names pictures relative to; `untrained_files` are the untrained model's pictures of
    a closed set, in the same order.
    """

    config: ScoreConfig
    prompts: list[Prompt]
    files: list[Path]
    folder: Path | None = None
    untrained_files: list[Path] = field(default_factory=list)
    world: World = ALONE

    @cached_property
    def picture_size(self) -> int:
        """Height of the first picture, pixels."""
        return int(read_picture(self.files[0]).shape[0])

    @cached_property
    def reference_files(self) -> list[Path]:
        """The reference's pictures; empty for statistics."""
        path = self.config.reference
        if path is None or is_statistics(path):
            return []
        if path == Path(EMBEDDED):
            folder = self.config.out / "reference" / f"training_scenes_{self.picture_size}px"
            return write_training_pictures(folder, len(self.files), self.picture_size)
        return unpack_npz(path, self.config.out / "reference") if path.suffix == ".npz" else folder_files(path)

    @property
    def reference_name(self) -> str:
        """The reference for a protocol card."""
        if self.config.reference == Path(EMBEDDED):
            return f"training scenes 0 to {len(self.files) - 1} of seed 0, {self.picture_size} px, drawn anew"
        return str(self.config.reference)

    @cached_property
    def true_files(self) -> list[Path]:
        """The true picture of each prompt; empty unless the set is closed."""
        path = self.config.true_pictures
        if path is None:
            return []
        if path == Path(EMBEDDED):
            folder = self.config.out / "true" / f"{self.picture_size}px"
            return write_true_pictures(folder, self.prompts, self.picture_size)
        return geneval_files(path, len(self.prompts), 1)

    @property
    def control_files(self) -> dict[str, list[Path]]:
        """Pictures that scores are read against, those of them that there are: `true`, `untrained`."""
        found = {"true": self.true_files, "untrained": self.untrained_files}
        return {name: files for name, files in found.items() if files}

    def texts(self) -> list[str]:
        """The caption of each picture."""
        return [self.prompts[i // self.config.num_samples].text for i in range(len(self.files))]

    def store(self, encoder: ImageEncoder) -> FeatureStore:
        """Where the encoder's features are kept."""
        return FeatureStore(self.config.out / "features", encoder.key, encoder.dim)

    def add(self, encoder: ImageEncoder, *sets: list[Path]) -> None:
        """Compute this rank's missing features of sets of pictures."""
        store = self.store(encoder)
        for files in sets:
            add_picture_features(store, encoder, files, self.world)

    def features(self, encoder: ImageEncoder, files: list[Path]) -> Tensor:
        """What `add` has stored of pictures, fp32 [N, D]."""
        return self.store(encoder).matrix(hash_files(files))


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What a module of eval/suites defines as `SUITE`: three steps, and how its result is shown.

    The page has a table of the numbers in `names` (path in the result, as {"kid/mean": "KID"}; all numbers if empty)
    with their `spreads`, unless `section` returns other HTML; `stat` is a box for its head. The terminal gets the
    `headlines` (paths), or with controls what `summary` returns.
    """

    check: Callable[[ScoreConfig, list[Prompt]], None]
    prepare: Callable[[ScoringJob], None]
    score: Callable[[ScoringJob], Result]
    title: str
    names: Mapping[str, str] = field(default_factory=dict)
    spreads: Mapping[str, str] = field(default_factory=dict)
    headlines: tuple[str, ...] = ()
    section: Callable[[Result], list[str]] | None = None
    stat: Callable[[Result], str] | None = None
    summary: Callable[[Result], list[str]] | None = None


def find_suite(name: str) -> Suite:
    """The suite of a name in the registry."""
    found: Suite = import_module(SUITES[name]).SUITE
    return found


def is_statistics(path: Path) -> bool:
    """Whether the reference is an npz with moments; ADM's have pictures too, which are not read then."""
    if path.suffix != ".npz":
        return False
    with open_npz(path) as content:
        return "mu" in content or "arr_0" not in content


def needs_reference(config: ScoreConfig, *, pictures: bool) -> Path:
    """The reference; ConfigError if it is missing, or holds no pictures where `pictures` are needed."""
    path = config.reference
    require(path is not None, "--reference is missing: give the folder of real pictures, or an npz of their statistics")
    assert path is not None
    require(path == Path(EMBEDDED) or path.exists(), f"--reference {path} does not exist")
    require(
        not (pictures and is_statistics(path)),
        f"--reference {path} holds statistics of another feature space: give a folder of pictures, or leave out cmmd "
        "and dino",
    )
    return path


def attempt(result: Result, name: str, compute: Callable[[], Any]) -> None:
    """Add a number, or under `skipped` the reason why these pictures have none."""
    try:
        found = compute()
    except ValueError as error:
        result["skipped"][name] = str(error)
        return
    result[name] = asdict(found) if hasattr(found, "__dataclass_fields__") else found


def check_all(config: ScoreConfig, prompts: list[Prompt]) -> None:
    """Every suite's check; ConfigError for the first that cannot run."""
    path = config.true_pictures
    require(path is None or bool(prompts), "--true-pictures needs --prompts: each true picture belongs to one of a set")
    lacking = sum("scene" not in prompt.metadata for prompt in prompts) if path == Path(EMBEDDED) else 0
    require(
        lacking == 0, f"--true-pictures embedded: {lacking} prompts are no built-in scenes, give a folder of pictures"
    )
    require(path is None or path == Path(EMBEDDED) or path.is_dir(), f"--true-pictures {path} is not a folder")
    for name in config.suites:
        find_suite(name).check(config, prompts)


def prepare_all(job: ScoringJob) -> None:
    """This rank's share of every suite's expensive part."""
    for name in job.config.suites:
        find_suite(name).prepare(job)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the next suite's network needs the room


def score_all(job: ScoringJob) -> dict[str, Result]:
    """Results of all suites, from what is kept."""
    return {name: find_suite(name).score(job) for name in job.config.suites}
