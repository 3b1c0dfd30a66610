"""CLIP score and R-precision of pictures and their captions. Shapes: N pictures, D features."""

from eval.feature_store import add_picture_features
from eval.metrics.clip_score import clip_score, cosines, r_precision
from eval.networks.clip import find_clip, load_clip, text_features
from eval.pictures.prompts import Prompt, prompts_sha256
from eval.scoring import Result, ScoreConfig, ScoringJob, Suite, attempt
from trainer.config import require


def check(config: ScoreConfig, prompts: list[Prompt]) -> None:
    """The model must be here."""
    find_clip(config.clip)
    require(bool(prompts), "--suite clip needs --prompts: CLIP score compares pictures with their captions")


def prepare(job: ScoringJob) -> None:
    """Picture features on every rank, caption features on the first."""
    clip = load_clip(job.config.clip)
    add_picture_features(
        job.store(clip), clip, job.files, rank=job.rank, world_size=job.world_size,
        batch_size=job.config.batch_size, progress=job.progress,
    )  # fmt: skip
    if job.rank == 0:
        text_features(job.config.out / "features", clip, [prompt.text for prompt in job.prompts])


def score(job: ScoringJob) -> Result:
    """CLIP score, R-precision, and how many captions were cut."""
    clip, captions = load_clip(job.config.clip), job.texts()
    images_ND = job.store(clip).matrix(job.hashes)
    texts_ND = text_features(job.config.out / "features", clip, captions)
    skipped: dict[str, str] = {}
    result: Result = {}
    attempt(result, skipped, "score", lambda: clip_score(cosines(images_ND, texts_ND)))
    try:
        share, distractors = r_precision(images_ND, texts_ND, captions)
        result["r_precision"] = {"value": share, "distractors": distractors}
    except ValueError as error:
        skipped["r_precision"] = str(error)
    result["truncated_captions"] = sum(clip.is_truncated(prompt.text) for prompt in job.prompts)
    card = {"metric": "clip-score-1", "model": job.config.clip, **clip.key, "pictures": len(job.files),
            "prompts_sha256": prompts_sha256(job.prompts)}  # fmt: skip
    return {**result, "skipped": skipped, "card": card}


SUITE = Suite(
    check=check,
    prepare=prepare,
    score=score,
    title="Agreement with the captions",
    names={
        "score/cosine": "CLIP cosine",
        "score/score100": "CLIP score, 100 x",
        "r_precision/value": "R-precision",
        "truncated_captions": "captions longer than CLIP reads",
    },
    spreads={
        "score/cosine": "score/standard_error",
        "score/score100": "score/score100_standard_error",
    },
    headlines=("score/cosine",),
)
