"""Frechet distance, precision and recall in the space of DINOv2. Shapes: N and M pictures, D features."""

from eval.metrics.frechet import FrechetReference
from eval.metrics.neighbours import neighbours
from eval.networks.dino import DINO_WEIGHTS, DinoEncoder
from eval.pictures.prompts import Prompt
from eval.scoring.job import Result, ScoreConfig, ScoringJob, Suite, attempt, needs_reference
from eval.weights import find_weights_file


def check(config: ScoreConfig, prompts: list[Prompt]) -> None:
    """Weights and reference pictures must be here."""
    del prompts
    find_weights_file(DINO_WEIGHTS)
    needs_reference(config, pictures=True)


def prepare(job: ScoringJob) -> None:
    """DINOv2 features of pictures and reference."""
    job.add(DinoEncoder(), job.files, job.reference_files)


def score(job: ScoringJob) -> Result:
    """Frechet distance, precision and recall in DINOv2's space."""
    encoder = DinoEncoder()
    features_ND, real_MD = job.features(encoder, job.files), job.features(encoder, job.reference_files)
    distance = FrechetReference.from_rows(real_MD).distance_to_rows(features_ND)
    result: Result = {"fd_dinov2": distance, "skipped": {}}
    attempt(result, "neighbours", lambda: neighbours(features_ND, real_MD, k=job.config.num_neighbours))
    card = {"metric": "fd-dinov2-1", **encoder.key, "pictures": len(job.files), "reference": job.reference_name,
            "reference_pictures": len(job.reference_files), "neighbours": job.config.num_neighbours}  # fmt: skip
    return {**result, "card": card}


SUITE = Suite(
    check=check,
    prepare=prepare,
    score=score,
    title="Distance in DINOv2's space",
    names={
        "fd_dinov2": "FD-DINOv2",
        "neighbours/precision": "precision",
        "neighbours/recall": "recall",
        "neighbours/density": "density",
        "neighbours/coverage": "coverage",
        "neighbours/k": "neighbours (k) of these four",
    },
    headlines=("fd_dinov2",),
)
