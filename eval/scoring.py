"""Suites over pictures on disk: what each needs, what all ranks compute and keep, what the first one makes of it.

fid      Frechet distance, FID-infinity, KID, precision, recall, density, coverage, Inception score, memorisation
cmmd     CLIP-MMD          dino     Frechet distance and precision, recall in DINOv2's space
clip     CLIP score and R-precision against the prompts
geneval  GenEval with a detector        text    quoted text by OCR

`check` runs before anything is drawn or written; `prepare` on every rank, on its own share of the pictures, and may
be killed at any time; `score` on the first rank reads what is kept. A number that cannot be had is listed under
`skipped` with the reason. Shapes: N pictures, D features.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.clip import CMMD_CLIP, DEFAULT_CLIP, find_clip, load_clip, text_features
from eval.encoders import SLIM, DinoEncoder, ImageEncoder, InceptionEncoder, classifier_weight
from eval.feature_store import FeatureStore, add_picture_features, hash_files
from eval.geneval import Rules
from eval.image_files import folder_files, open_npz, unpack_npz
from eval.metrics.clip_score import clip_score, cosines, r_precision
from eval.metrics.frechet import FrechetReference, fid_infinity, inception_score
from eval.metrics.kernel import cmmd, kid
from eval.metrics.neighbours import memorisation, neighbours
from eval.metrics.statistics import Statistics, moments_of, read_statistics
from eval.objects.cache import FLOOR
from eval.prompts import Prompt, prompts_sha256
from eval.resize import CONVENTIONS, check_convention
from eval.weights import find_weights_file
from trainer.config import require

FEW = 10_000  # pictures below which FID's bias is worth a note
MANY = 100_000  # pictures beyond which metrics of whole sets use a part: 800 MB of features
_SHOWN = 8  # closest pairs of the memorisation check


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
class Job:
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
        if path is None or _is_statistics(path):
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


def _is_statistics(path: Path) -> bool:
    """Whether the reference is an npz with moments; ADM's have pictures too, which are not read then."""
    if path.suffix != ".npz":
        return False
    with open_npz(path) as content:
        return "mu" in content or "arr_0" not in content


def _needs_reference(config: ScoreConfig, *, pictures: bool) -> Path:
    path = config.reference
    require(path is not None, "--reference is missing: give the folder of real pictures, or an npz of their statistics")
    assert path is not None
    require(path.exists(), f"--reference {path} does not exist")
    require(
        not (pictures and _is_statistics(path)),
        f"--reference {path} holds statistics of another feature space: give a folder of pictures, or leave out cmmd "
        "and dino",
    )
    return path


def _try(result: Result, skipped: dict[str, str], name: str, compute: Callable[[], Any]) -> None:
    """Add a number, or the reason why these pictures have none."""
    try:
        found = compute()
    except ValueError as error:
        skipped[name] = str(error)
        return
    result[name] = asdict(found) if hasattr(found, "__dataclass_fields__") else found


def check_fid(config: ScoreConfig, prompts: list[Prompt]) -> None:
    """Weights and reference must be here, and of the same convention."""
    del prompts
    find_weights_file(SLIM)
    path = _needs_reference(config, pictures=False)
    if _is_statistics(path):
        read_statistics(path, config.convention)


def prepare_fid(job: Job) -> None:
    """Inception features."""
    job.add(InceptionEncoder(job.config.convention))


def score_fid(job: Job) -> Result:
    """All numbers of the FID network's features; those that need real pictures only with a reference of pictures."""
    encoder, config = InceptionEncoder(job.config.convention), job.config
    store, names = job.store(encoder), job.hashes
    features_ND = store.matrix(_thinned(names))
    real_MD: Tensor | None = None
    if job.reference_files:
        real_names = hash_files(job.reference_files)
        real_MD = store.matrix(_thinned(real_names))
        statistics = Statistics(moments=moments_of(store.read(real_names)), convention=config.convention)
    else:
        assert config.reference is not None
        statistics = read_statistics(config.reference, config.convention)
        require(
            len(statistics.moments.mean_D) == encoder.dim,
            f"{config.reference} has {len(statistics.moments.mean_D)} features, the FID network {encoder.dim}",
        )
    reference = FrechetReference(statistics.moments)
    skipped: dict[str, str] = {}
    result: Result = {}
    streamed = len(names) >= encoder.dim
    result["fid"] = (
        reference.distance(moments_of(store.read(names))) if streamed else reference.distance_to_rows(features_ND)
    )
    _try(result, skipped, "fid_infinity", lambda: fid_infinity(features_ND, reference))
    if real_MD is None:
        skipped["kid, neighbours, memorisation"] = "the reference holds statistics, not pictures"
    else:
        real = real_MD
        _try(result, skipped, "kid", lambda: kid(features_ND, real))
        _try(result, skipped, "neighbours", lambda: neighbours(features_ND, real, k=config.num_neighbours))
        _try(result, skipped, "memorisation", lambda: _memorisation(job, features_ND, real))
    weight = classifier_weight()
    if weight is None:
        skipped["inception_score"] = (
            "the classifier is not here: python -m eval.weights fetch inception-2015-12-05-full"
        )
    else:
        logits_NK = features_ND.double() @ weight.double().T
        _try(result, skipped, "inception_score", lambda: inception_score(logits_NK))
    if len(names) < FEW:
        result["note"] = f"{len(names)} pictures bias FID upwards: compare it only with values of as many pictures"
    card = {
        "metric": "fid-2", "convention": config.convention, **encoder.key, "pictures": len(names),
        "reference": str(config.reference), "reference_pictures": statistics.moments.count or "not stated",
        "pictures_of_set_metrics": len(features_ND),
    }  # fmt: skip
    return {**result, "skipped": skipped, "card": card}


def _thinned(names: list[str]) -> list[str]:
    """All names, or MANY evenly spaced ones: FID itself streams, the other numbers need their rows in memory."""
    if len(names) <= MANY:
        return names
    return [names[i * len(names) // MANY] for i in range(MANY)]


def _memorisation(job: Job, features_ND: Tensor, real_MD: Tensor) -> Result:
    found = memorisation(features_ND, real_MD)
    if len(features_ND) < len(job.files) or len(real_MD) < len(job.reference_files):
        return {"share": found.share, "threshold": found.threshold, "quantile": found.quantile, "closest": []}
    closest = found.distance_N.argsort()[:_SHOWN].tolist()
    pairs = [
        [str(job.files[i]), str(job.reference_files[int(found.nearest_N[i])]), round(float(found.distance_N[i]), 4)]
        for i in closest
    ]
    return {"share": found.share, "threshold": found.threshold, "quantile": found.quantile, "closest": pairs}


def check_cmmd(config: ScoreConfig, prompts: list[Prompt]) -> None:
    """Model and reference pictures must be here."""
    del prompts
    find_clip(config.cmmd_clip)
    _needs_reference(config, pictures=True)


def prepare_cmmd(job: Job) -> None:
    """CLIP features of pictures and reference."""
    job.add(load_clip(job.config.cmmd_clip))


def score_cmmd(job: Job) -> Result:
    """CLIP-MMD."""
    clip = load_clip(job.config.cmmd_clip)
    store = job.store(clip)
    value = cmmd(store.matrix(job.hashes), store.matrix(hash_files(job.reference_files)))
    card = {"metric": "cmmd-1", **clip.key, "pictures": len(job.files), "reference": str(job.config.reference),
            "reference_pictures": len(job.reference_files), "sigma": 10, "scale": 1000}  # fmt: skip
    return {"cmmd": value, "skipped": {}, "card": card}


def check_dino(config: ScoreConfig, prompts: list[Prompt]) -> None:
    """Weights and reference pictures must be here."""
    del prompts
    find_weights_file("dinov2-vit-l-14")
    _needs_reference(config, pictures=True)


def prepare_dino(job: Job) -> None:
    """DINOv2 features of pictures and reference."""
    job.add(DinoEncoder())


def score_dino(job: Job) -> Result:
    """Frechet distance, precision and recall in DINOv2's space."""
    encoder = DinoEncoder()
    store = job.store(encoder)
    features_ND, real_MD = store.matrix(job.hashes), store.matrix(hash_files(job.reference_files))
    reference = FrechetReference(moments_of([real_MD]))
    skipped: dict[str, str] = {}
    result: Result = {"fd_dinov2": reference.distance_to_rows(features_ND)}
    _try(result, skipped, "neighbours", lambda: neighbours(features_ND, real_MD, k=job.config.num_neighbours))
    card = {"metric": "fd-dinov2-1", **encoder.key, "pictures": len(job.files), "reference": str(job.config.reference),
            "reference_pictures": len(job.reference_files)}  # fmt: skip
    return {**result, "skipped": skipped, "card": card}


def check_clip(config: ScoreConfig, prompts: list[Prompt]) -> None:
    """The model must be here."""
    find_clip(config.clip)
    require(bool(prompts), "--suite clip needs --prompts: CLIP score compares pictures with their captions")


def prepare_clip(job: Job) -> None:
    """Picture features on every rank, caption features on the first."""
    clip = load_clip(job.config.clip)
    add_picture_features(
        job.store(clip), clip, job.files, rank=job.rank, world_size=job.world_size,
        batch_size=job.config.batch_size, progress=job.progress,
    )  # fmt: skip
    if job.rank == 0:
        text_features(job.config.out / "features", clip, [prompt.text for prompt in job.prompts])


def score_clip(job: Job) -> Result:
    """CLIP score, R-precision, and how many captions were cut."""
    clip, captions = load_clip(job.config.clip), job.texts()
    images_ND = job.store(clip).matrix(job.hashes)
    texts_ND = text_features(job.config.out / "features", clip, captions)
    skipped: dict[str, str] = {}
    result: Result = {}
    _try(result, skipped, "score", lambda: clip_score(cosines(images_ND, texts_ND)))
    try:
        share, distractors = r_precision(images_ND, texts_ND, captions)
        result["r_precision"] = {"value": share, "distractors": distractors}
    except ValueError as error:
        skipped["r_precision"] = str(error)
    result["truncated_captions"] = sum(clip.is_truncated(prompt.text) for prompt in job.prompts)
    card = {"metric": "clip-score-1", "model": job.config.clip, **clip.key, "pictures": len(job.files),
            "prompts_sha256": prompts_sha256(job.prompts)}  # fmt: skip
    return {**result, "skipped": skipped, "card": card}


@dataclass(frozen=True, kw_only=True)
class ScoreSuite:
    """The three steps of a suite."""

    check: Callable[[ScoreConfig, list[Prompt]], None]
    prepare: Callable[[Job], None]
    score: Callable[[Job], Result]


def _suite_of(module: str) -> ScoreSuite:
    """The suite whose steps are functions of a module, which is imported when it is used."""

    def step(name: str) -> Callable[..., Any]:
        return lambda *arguments: getattr(import_module(module), name)(*arguments)

    return ScoreSuite(check=step("check"), prepare=step("prepare"), score=step("score"))


SUITES = {
    "fid": ScoreSuite(check=check_fid, prepare=prepare_fid, score=score_fid),
    "cmmd": ScoreSuite(check=check_cmmd, prepare=prepare_cmmd, score=score_cmmd),
    "dino": ScoreSuite(check=check_dino, prepare=prepare_dino, score=score_dino),
    "clip": ScoreSuite(check=check_clip, prepare=prepare_clip, score=score_clip),
    "geneval": _suite_of("eval.objects.suite"),
    "text": _suite_of("eval.text_rendering"),
}


def check_all(config: ScoreConfig, prompts: list[Prompt]) -> None:
    """Every suite's check; ConfigError for the first that cannot run."""
    for name in config.suites:
        SUITES[name].check(config, prompts)


def prepare_all(job: Job) -> None:
    """This rank's share of every suite's expensive part."""
    for name in job.config.suites:
        SUITES[name].prepare(job)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the next suite's network needs the room


def score_all(job: Job) -> dict[str, Result]:
    """Results of all suites, from what is kept."""
    return {name: SUITES[name].score(job) for name in job.config.suites}
