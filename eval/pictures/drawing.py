"""Draws a prompt set from a pipeline into a folder whose name says how it was drawn."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.pictures.generate import generate_pictures, write_text
from eval.pictures.prompts import Prompt, metadata_lines
from eval.pictures.protocol import fingerprint, sampling_card
from trainer.distributed import World
from trainer.pipeline import Pipeline


def draw_set(
    pipeline: Pipeline, prompts: Sequence[Prompt], parent: Path, *, num_samples: int, batch_size: int, world: World
) -> tuple[Path, dict[str, Any]]:
    """Draw this rank's missing pictures below `parent`; returns the folder of all ranks' pictures, and its card.

    Pictures that were drawn otherwise lie in another folder, so none of them is taken for these.
    """
    card = sampling_card(pipeline.config, pipeline.step, pipeline.origin, prompts, num_samples)
    folder = parent / f"{pipeline.origin.replace(' ', '_')}_{fingerprint(card)}"
    if world.is_main:
        write_text(folder / "evaluation_metadata.jsonl", metadata_lines(prompts))
        write_text(folder / "sampling.json", json.dumps(card, indent=2) + "\n")
    generate_pictures(
        prompts, folder, pipeline.generate,
        num_samples=num_samples, batch_size=batch_size, rank=world.rank, world_size=world.size,
    )  # fmt: skip
    return folder, card
