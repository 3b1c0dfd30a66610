"""CMMD: kernel distance to real pictures in the space of a CLIP model."""

from eval.metrics.kernel import cmmd
from eval.networks.clip import find_clip, load_clip
from eval.pictures.prompts import Prompt
from eval.scoring.job import Result, ScoreConfig, ScoringJob, Suite, needs_reference


def check(config: ScoreConfig, prompts: list[Prompt]) -> None:
    """Model and reference pictures must be here."""
    del prompts
    find_clip(config.cmmd_clip)
    needs_reference(config, pictures=True)


def prepare(job: ScoringJob) -> None:
    """CLIP features of pictures and reference."""
    job.add(load_clip(job.config.cmmd_clip), job.files, job.reference_files)


def score(job: ScoringJob) -> Result:
    """CLIP-MMD."""
    clip = load_clip(job.config.cmmd_clip)
    value = cmmd(job.features(clip, job.files), job.features(clip, job.reference_files))
    card = {"metric": "cmmd-1", **clip.key, "pictures": len(job.files), "reference": job.reference_name,
            "reference_pictures": len(job.reference_files), "sigma": 10, "scale": 1000}  # fmt: skip
    return {"cmmd": value, "skipped": {}, "card": card}


SUITE = Suite(
    check=check,
    prepare=prepare,
    score=score,
    title="Distance in CLIP's space",
    names={"cmmd": "CMMD"},
    headlines=("cmmd",),
)
