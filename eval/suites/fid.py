"""FID and what else the features of its network tell. Shapes: N generated and M real pictures, D features.

A closed set's FID comes with that of two controls: true pictures of the prompts, what a perfect model would get, and
the untrained model's pictures.
"""

from torch import Tensor

from eval.metrics.frechet import FrechetReference, fid_infinity, inception_score, moments_of
from eval.metrics.kernel import kid
from eval.metrics.neighbours import memorisation, neighbours
from eval.networks.inception import SLIM, InceptionEncoder, classifier_weight
from eval.pages.sections import number_section
from eval.pictures.prompts import Prompt
from eval.scoring.feature_store import FeatureStore, hash_files
from eval.scoring.job import Result, ScoreConfig, ScoringJob, Suite, attempt, is_statistics, needs_reference
from eval.suites.reference_statistics import read_statistics
from eval.weights import find_weights_file
from trainer.config import require
from trainer.formats.page import stat

FEW = 10_000  # pictures below which FID's bias is worth a note
MANY = 100_000  # pictures beyond which metrics of whole sets use a part: 800 MB of features
_SHOWN = 8  # closest pairs of the memorisation check


def check(config: ScoreConfig, prompts: list[Prompt]) -> None:
    """Weights and reference must be here, and of the same convention."""
    del prompts
    find_weights_file(SLIM)
    path = needs_reference(config, pictures=False)
    if is_statistics(path):
        read_statistics(path, config.convention)


def prepare(job: ScoringJob) -> None:
    """Inception features of the pictures, the reference and the controls."""
    sets = [job.files, job.reference_files, *job.control_files.values()]
    job.add(InceptionEncoder(job.config.convention), *sets)


def _fid_reference(job: ScoringJob, store: FeatureStore) -> tuple[FrechetReference, Tensor | None, int]:
    """The reference, its features if it is pictures, and their count (0: a file of statistics does not say)."""
    if job.reference_files:
        names = hash_files(job.reference_files)
        real_MD = store.matrix(_thinned(names))
        if len(names) > len(real_MD):
            return FrechetReference.from_moments(moments_of(store.read(names))), real_MD, len(names)
        return FrechetReference.from_rows(real_MD), real_MD, len(names)
    path = job.config.reference
    assert path is not None
    moments = read_statistics(path, job.config.convention).moments
    width = len(moments.mean_D)
    require(width == store.dim, f"--reference {path} has {width} features, the FID network has {store.dim}")
    return FrechetReference.from_moments(moments), None, moments.count


def score(job: ScoringJob) -> Result:
    """All numbers of the FID network's features; those that need real pictures only with a reference of pictures."""
    encoder, config = InceptionEncoder(job.config.convention), job.config
    store, names = job.store(encoder), hash_files(job.files)
    features_ND = store.matrix(_thinned(names))
    reference, real_MD, reference_count = _fid_reference(job, store)
    many = len(names) >= encoder.dim
    fid = reference.distance(moments_of(store.read(names))) if many else reference.distance_to_rows(features_ND)
    result: Result = {"fid": fid, "skipped": {}}
    if job.control_files:
        result["controls"] = {
            name: reference.distance_to_rows(job.features(encoder, files)) for name, files in job.control_files.items()
        }
    attempt(result, "fid_infinity", lambda: fid_infinity(features_ND, reference))
    if real_MD is None:
        result["skipped"]["kid, neighbours, memorisation"] = "the reference holds statistics, not pictures"
    else:
        real = real_MD
        attempt(result, "kid", lambda: kid(features_ND, real))
        attempt(result, "neighbours", lambda: neighbours(features_ND, real, k=config.num_neighbours))
        attempt(result, "memorisation", lambda: _memorisation(job, features_ND, real))
    weight = classifier_weight()
    if weight is None:
        how = "python -m eval.weights fetch inception-2015-12-05-full"
        result["skipped"]["inception_score"] = f"the classifier is not here: {how}"
    else:
        logits_NK = features_ND.double() @ weight.double().T
        attempt(result, "inception_score", lambda: inception_score(logits_NK))
    if len(names) < FEW:
        result["note"] = f"{len(names)} pictures bias FID upwards: compare it only with values of as many pictures"
    card = {
        "metric": "fid-2", "convention": config.convention, **encoder.key, "pictures": len(names),
        "reference": job.reference_name, "reference_pictures": reference_count or "not stated",
        "pictures_of_set_metrics": len(features_ND), "neighbours": config.num_neighbours,
        "kid": f"{result['kid']['subsets']} subsets of {result['kid']['subset_size']}" if "kid" in result else "none",
    }  # fmt: skip
    return {**result, "card": card}


def _thinned(names: list[str]) -> list[str]:
    """All names, or MANY evenly spaced ones: FID itself streams, the other numbers need their rows in memory."""
    if len(names) <= MANY:
        return names
    return [names[i * len(names) // MANY] for i in range(MANY)]


def _memorisation(job: ScoringJob, features_ND: Tensor, real_MD: Tensor) -> Result:
    found = memorisation(features_ND, real_MD)
    whole = len(features_ND) == len(job.files) and len(real_MD) == len(job.reference_files)  # else rows are no files
    closest = found.distance_N.argsort()[:_SHOWN].tolist() if whole else []
    pairs = [
        [str(job.files[i]), str(job.reference_files[int(found.nearest_N[i])]), round(float(found.distance_N[i]), 4)]
        for i in closest
    ]
    return {"share": found.share, "threshold": found.threshold, "quantile": found.quantile, "closest": pairs}


def _section(result: Result) -> list[str]:
    parts = number_section(SUITE.title, SUITE.names, SUITE.spreads, result)
    if "memorisation" in result:
        parts.insert(
            -1,
            '<p class="key">Memorised: share of pictures closer to a real picture than 99 % of the real ones are to '
            "each other.</p>",
        )
    if "controls" in result:
        parts.insert(
            1,
            "<p>Read the FID against that of true pictures, which a perfect model would reach, and of the model before "
            "its first step.</p>",
        )
    return parts


def _stat(result: Result) -> str:
    words = {"true": "true pictures reach", "untrained": "the untrained model"}
    note = ", ".join(f"{words[name]} {value:.1f}" for name, value in result.get("controls", {}).items())
    return stat("FID, lower is better", f"{result['fid']:.1f}", "", note or f"{result['card']['pictures']} pictures")


def _summary(result: Result) -> list[str]:
    values = {"generated": result["fid"], **result["controls"]}
    return ["fid " + "  ".join(f"{name} {value:.2f}" for name, value in values.items())]


SUITE = Suite(
    check=check,
    prepare=prepare,
    score=score,
    title="Distance to real pictures",
    names={
        "fid": "FID",
        "controls/true": "FID of true pictures of these captions",
        "controls/untrained": "FID of the untrained model",
        "fid_infinity/value": "FID extrapolated to infinitely many pictures",
        "kid/mean": "KID",
        "neighbours/precision": "precision",
        "neighbours/recall": "recall",
        "neighbours/density": "density",
        "neighbours/coverage": "coverage",
        "neighbours/k": "neighbours (k) of these four",
        "inception_score/mean": "Inception score",
        "memorisation/share": "memorised",
    },
    spreads={"kid/mean": "kid/std", "inception_score/mean": "inception_score/std"},
    headlines=("fid", "kid/mean"),
    section=_section,
    stat=_stat,
    summary=_summary,
)
