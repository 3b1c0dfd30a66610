"""Prompts to pictures on disk, in GenEval's folder layout.

`DIR/00000/metadata.jsonl` describes prompt 0 and `DIR/00000/samples/0000.png` is its first picture. The
seed of a picture is a hash of the prompt's id and the sample number, so neither the batch, the number of
ranks nor a restart changes it. What exists is not drawn again. Shapes: N pictures, H x W pixels.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from eval.pictures.image_files import is_whole, picture_path, write_picture
from eval.pictures.prompts import Prompt, metadata_lines, picture_seed
from eval.pictures.protocol import fingerprint, sampling_card
from trainer.distributed import World
from trainer.files import write_text
from trainer.formats.progress_bar import ProgressBar
from trainer.pipeline import Pipeline

Generator = Callable[[list[str], list[int]], Tensor]  # captions, seeds -> uint8 [N, H, W, 3]


def generate_pictures(
    prompts: Sequence[Prompt],
    folder: Path,
    generate: Generator,
    *,
    num_samples: int = 1,
    batch_size: int = 40,
    rank: int = 0,
    world_size: int = 1,
) -> int:
    """Draw this rank's missing pictures into `folder`; returns how many were drawn.

    Rank r takes prompts r, r + world_size, ...: shares differ by one at most and none is padded.
    """
    jobs = []
    for number in range(rank, len(prompts), world_size):
        line = json.dumps(prompts[number].metadata) + "\n"
        write_text(folder / f"{number:05d}" / "metadata.jsonl", line)
        jobs += [(number, s) for s in range(num_samples) if not is_whole(picture_path(folder, number, s))]
    with ProgressBar(desc="pictures", total=len(jobs), unit="image", shown=rank == 0) as bar:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            captions = [prompts[number].text for number, _ in batch]
            seeds = [picture_seed(prompts[number].id, sample) for number, sample in batch]
            for (number, sample), picture in zip(batch, generate(captions, seeds), strict=True):
                write_picture(picture_path(folder, number, sample), picture)
            bar.update(len(batch))
    return len(jobs)


def draw_set(
    pipeline: Pipeline, prompts: Sequence[Prompt], parent: Path, *, num_samples: int, batch_size: int, world: World
) -> tuple[Path, dict[str, Any]]:
    """Draw this rank's missing pictures below `parent`; returns the folder of all ranks' pictures, and its card.

    Pictures that were drawn otherwise lie in another folder, so none of them is taken for these.
    """
    card = sampling_card(pipeline.config, pipeline.step, pipeline.origin, prompts, num_samples)
    card["weights_digest"] = pipeline.weights_digest()  # another run of the same settings draws other pictures
    if pipeline.pictures_touch():
        card["drawn_together"] = batch_size  # tokens of these may compete
    folder = parent / f"{pipeline.origin.replace(' ', '_')}_{fingerprint(card)}"
    if world.is_main:
        write_text(folder / "evaluation_metadata.jsonl", metadata_lines(prompts))
        write_text(folder / "sampling.json", json.dumps(card, indent=2) + "\n")
    generate_pictures(
        prompts, folder, pipeline.generate,
        num_samples=num_samples, batch_size=batch_size, rank=world.rank, world_size=world.size,
    )  # fmt: skip
    return folder, card
