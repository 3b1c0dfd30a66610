"""What the detector of the built-in scenes tells the GenEval suite: objects with colours, and two further readings.

It needs no weights and takes a second per 100 pictures, so nothing is kept on disk.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.demo.background import background_score
from eval.demo.detector import RULES, VERSION, DetectorConfig, detect, detect_at
from eval.metrics.controls import judge_all
from eval.metrics.geneval import Detection
from eval.pictures.image_files import read_picture
from eval.scoring.job import Result, ScoringJob

OTHER_THRESHOLDS = (0.6, 0.65, 0.75, 0.8)


def _stack(files: Sequence[Path]) -> Tensor:
    """Pictures of one size, uint8 [N, H, W, 3]."""
    return torch.stack([read_picture(file) for file in files])


class EmbeddedObjects:
    """Objects of the built-in scenes; the detector names the colour behind an object itself."""

    comparable = "approximate"
    rules = RULES

    def __init__(self) -> None:
        self.card: dict[str, Any] = {
            "detector": f"{VERSION} (embedded; not comparable with published GenEval scores)",
            "detector_settings": asdict(DetectorConfig()),
            "colors": "by the detector",
        }

    def prepare(self, job: ScoringJob) -> None:
        """Nothing."""

    def detect(self, job: ScoringJob, files: Sequence[Path]) -> list[list[Detection]]:
        """Objects of each picture."""
        del job
        return detect(_stack(files))

    def extras(self, job: ScoringJob) -> Result:
        """Overall scores at other thresholds of the detector, and the share of backgrounds of the asked colour."""
        pictures, samples = _stack(job.files), job.config.num_samples
        found = detect_at(pictures, OTHER_THRESHOLDS)
        result: Result = {
            "thresholds": {
                str(threshold): judge_all(job.prompts, items, RULES, samples)[1].overall.value
                for threshold, items in zip(OTHER_THRESHOLDS, found, strict=True)
            }
        }
        if all("scene" in prompt.metadata for prompt in job.prompts):
            result["background"] = asdict(background_score(job.prompts, pictures, samples))
        return result
