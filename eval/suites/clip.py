"""CLIP score and R-precision of pictures and their captions. Shapes: N pictures, D features."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from eval.metrics.clip_score import clip_score, cosines, r_precision
from eval.networks.clip import ClipModel, find_clip, load_clip
from eval.pictures.prompts import Prompt, prompts_sha256
from eval.scoring.feature_store import SHARD_ROWS, FeatureStore
from eval.scoring.job import Result, ScoreConfig, ScoringJob, Suite, attempt
from trainer.config import require


def text_hash(text: str) -> str:
    """The key of a caption in the feature store."""
    return hashlib.sha256(text.encode()).hexdigest()


def text_features(store_folder: Path, clip: ClipModel, texts: Sequence[str]) -> Tensor:
    """Features of captions [N, D], each distinct one computed once and kept in the store."""
    key = {**clip.key, "preprocess": f"text-{clip.context}"}
    store = FeatureStore(store_folder, key, clip.dim)
    known = store.refresh()
    todo = {text_hash(text): text for text in texts}
    names = [name for name in todo if name not in known]
    for start in range(0, len(names), SHARD_ROWS):
        part = names[start : start + SHARD_ROWS]
        store.add(part, clip.encode_texts([todo[name] for name in part]))
    return store.matrix([text_hash(text) for text in texts])


def check(config: ScoreConfig, prompts: list[Prompt]) -> None:
    """The model must be here."""
    find_clip(config.clip)
    require(bool(prompts), "--suite clip needs --prompts: CLIP score compares pictures with their captions")


def prepare(job: ScoringJob) -> None:
    """Picture features on every rank, caption features on the first."""
    clip = load_clip(job.config.clip)
    job.add(clip, job.files)
    if job.world.is_main:
        text_features(job.config.out / "features", clip, [prompt.text for prompt in job.prompts])


def score(job: ScoringJob) -> Result:
    """CLIP score, R-precision, and how many captions were cut."""
    clip, captions = load_clip(job.config.clip), job.texts()
    images_ND = job.features(clip, job.files)
    texts_ND = text_features(job.config.out / "features", clip, captions)
    result: Result = {"skipped": {}}
    attempt(result, "score", lambda: clip_score(cosines(images_ND, texts_ND)))
    found = ("value", "distractors")
    attempt(result, "r_precision", lambda: dict(zip(found, r_precision(images_ND, texts_ND, captions), strict=True)))
    result["truncated_captions"] = sum(clip.is_truncated(prompt.text) for prompt in job.prompts)
    card = {"metric": "clip-score-1", "model": job.config.clip, **clip.key, "pictures": len(job.files),
            "score100": "mean of 100 max(cosine, 0); torchmetrics has 100 max(mean cosine, 0)",
            "prompts_sha256": prompts_sha256(job.prompts)}  # fmt: skip
    return {**result, "card": card}


SUITE = Suite(
    check=check,
    prepare=prepare,
    score=score,
    title="Agreement with the captions",
    names={
        "score/cosine": "CLIP cosine",
        "score/score100": "CLIP score, 100 x, each picture's at least 0",
        "r_precision/value": "R-precision",
        "truncated_captions": "captions longer than CLIP reads",
    },
    spreads={"score/cosine": "score/standard_error", "score/score100": "score/score100_standard_error"},
    headlines=("score/cosine",),
)
