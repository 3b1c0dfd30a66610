"""Scores pictures that are already there: what `eval.score` does, as a function.

from eval import score_folder
results = score_folder("pictures", suite="fid", reference="real", out="scores")
results["fid"]["fid"]
"""

from pathlib import Path
from typing import Any

from eval.pictures.image_files import folder_files, geneval_files, left_out, unpack_npz
from eval.pictures.prompt_files import read_prompts
from eval.scoring.job import ScoreConfig, ScoringJob, check_all
from eval.scoring.options import split_names
from eval.scoring.score_and_report import ScoredSubject, score_and_report
from trainer.config import require
from trainer.distributed import detect_world, group_of_several


def score_folder(
    pictures: Path | str, *, suite: str, out: Path | str, reference: Path | str | None = None, prompts: str = "",
    samples: int = 1, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """The numbers of each suite, {"fid": {"fid": ..., "card": ...}}; ConfigError for what cannot be scored.

    `pictures` is a folder, or an npz with arr_0; with `prompts` (geneval[:SEED], or a file or folder of them) a folder
    in GenEval's layout with `samples` of each. `suite` is a comma list, `out` the folder of the report and of what is
    kept for the next call, `reference` a folder of real pictures or an npz of statistics. Other `options` are those of
    `eval.scoring.job.ScoreConfig`.
    """
    if reference is not None:
        options["reference"] = Path(reference)
    config = ScoreConfig(suites=split_names(suite), out=Path(out), num_samples=samples, **options)
    return score_pictures(Path(pictures), config, prompts)


def score_pictures(pictures: Path, config: ScoreConfig, prompt_set: str) -> dict[str, Any]:
    """The same with settings that are checked. Collective under a launcher; {} on all ranks but the first."""
    require(prompt_set != "demo", "--prompts demo belongs to eval.run: name a benchmark, or a file of prompts")
    prompts = read_prompts(prompt_set) if prompt_set else []
    check_all(config, prompts)
    unused: tuple[str, ...] = ()
    if prompts:
        files = geneval_files(pictures, len(prompts), config.num_samples)
    elif pictures.suffix == ".npz":
        files = unpack_npz(pictures, config.out / "unpacked")
    else:
        files, unused = folder_files(pictures), left_out(pictures)
    world = detect_world()
    job = ScoringJob(config=config, prompts=prompts, files=files, world=world)
    summary = f"{len(files)} pictures of {prompt_set or 'no prompts'}"
    subject = ScoredSubject(name=pictures.resolve().name, summary=summary, unused=unused)
    with group_of_several(world):
        report = score_and_report(job, subject)
    found: dict[str, Any] = report.get("results", {})
    return found
