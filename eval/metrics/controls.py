"""Controls that a score is read against: what chance, an untrained model and true pictures reach.

`chance` judges true pictures by the other prompts of their tag: a perfect painter who cannot read.
`shuffled` does so with the scored pictures. Both average over every pair of a picture and another prompt,
so they are exact and need no seed.
"""

from collections.abc import Sequence

from eval.metrics.geneval import Detection, PictureVerdict, Rules, Summary, judge, summarize
from eval.pictures.prompts import Prompt


def judge_all(
    prompts: Sequence[Prompt], detections: Sequence[Sequence[Detection]], rules: Rules, num_samples: int = 1
) -> tuple[list[PictureVerdict], Summary]:
    """Verdicts and scores of pictures in the order of the prompts, `num_samples` of each."""
    owners = [prompt for prompt in prompts for _ in range(num_samples)]
    verdicts = [judge(owner.metadata, found, rules) for owner, found in zip(owners, detections, strict=True)]
    return verdicts, summarize([owner.tag for owner in owners], [owner.id for owner in owners], verdicts)


def permuted_scores(
    prompts: Sequence[Prompt], detections: Sequence[Sequence[Detection]], rules: Rules, num_samples: int = 1
) -> dict[str, float]:
    """Accuracy per tag when each picture is judged by every prompt of its tag that has another text.

    A tag whose prompts all say the same has no such pair and is left out.
    """
    flags: dict[str, list[bool]] = {}
    owners = [prompt for prompt in prompts for _ in range(num_samples)]
    for owner, found in zip(owners, detections, strict=True):
        for other in prompts:
            if other.tag == owner.tag and other.text != owner.text:
                flags.setdefault(owner.tag, []).append(judge(other.metadata, found, rules).correct)
    return {tag: sum(found) / len(found) for tag, found in flags.items()}


def with_overall(tags: dict[str, float]) -> dict[str, float]:
    """The same with `overall`, the unweighted mean over tags."""
    return {**tags, "overall": sum(tags.values()) / max(len(tags), 1)}
