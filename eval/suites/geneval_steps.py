"""What a detector and a judge of colours found, kept on disk: two steps that each continue after a kill.

Neither depends on the thresholds of GenEval's rules: those are applied to what is read back, which takes seconds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eval.metrics.geneval import Detection
from eval.networks.colors import ColorJudge
from eval.networks.protocols import ObjectDetector
from eval.pictures.geneval_names import COLORS
from eval.pictures.image_files import DECODING, read_picture
from eval.pictures.prompts import Prompt
from eval.scoring.detection_cache import FLOOR, Line, LineCache, from_line, to_line
from eval.scoring.feature_store import ALONE, hash_files
from trainer.config import require
from trainer.distributed import World
from trainer.formats.progress_bar import ProgressBar


def open_detections(folder: Path, detector_card: Mapping[str, str]) -> LineCache:
    """The cache of a detector."""
    return LineCache(folder / "detections", {**detector_card, "decoding": DECODING, "floor": FLOOR})


def detect_files(cache: LineCache, detector: ObjectDetector, files: Sequence[Path], world: World = ALONE) -> int:
    """Detect in this rank's pictures that the cache lacks; returns how many."""
    return cache.add(files, lambda name, picture: to_line(name, picture, detector.detect(picture)), "detections", world)


def asked_colors(metadata: Mapping[str, Any]) -> list[str]:
    """Classes whose colour a prompt asks for."""
    return sorted({clause["class"] for clause in metadata["include"] if "color" in clause})


def _color_id(identity: str, name: str) -> str:
    return f"{identity}/{name}"


def open_colors(folder: Path, color_card: Mapping[str, str], detections: LineCache) -> LineCache:
    """The cache of a colour judge for one detector's objects."""
    return LineCache(folder / "colors", {**color_card, "detections": detections.name})


def judge_colors(
    cache: LineCache,
    judge: ColorJudge,
    detections: LineCache,
    prompts: Sequence[Prompt],
    files: Sequence[Path],
    world: World = ALONE,
    *,
    every: Sequence[str] = (),
) -> int:
    """Judge the colours that prompts ask for, of this rank's pictures; returns how many pictures were judged.

    Every kept object of the class is judged, so that another threshold needs no further run; objects of the classes
    `every` are judged in all pictures, whatever the picture's own prompt asks for.
    """
    samples = len(files) // len(prompts)
    found, known, judged = detections.read(), cache.read(), 0
    mine = range(world.rank, len(files), world.size)
    jobs = [i for i in mine if every or asked_colors(prompts[i // samples].metadata)]
    names = hash_files([files[i] for i in jobs], shown=world.is_main)
    bar = ProgressBar(zip(jobs, names, strict=True), "colours", len(jobs), unit="image", shown=world.is_main)
    with cache.appending() as write:
        for i, identity in bar:
            classes = {item.name for item in from_line(found[identity])} & set(every)
            asked = [name for name in sorted({*asked_colors(prompts[i // samples].metadata), *classes})
                     if _color_id(identity, name) not in known]  # fmt: skip
            if asked:
                picture, objects = read_picture(files[i]), from_line(found[identity], masks=True)
                for name in asked:
                    numbers = [n for n, item in enumerate(objects) if item.name == name]
                    rows = judge.classify(picture, [objects[n] for n in numbers], name)
                    pairs = [[n, [round(p, 5) for p in row]] for n, row in zip(numbers, rows.tolist(), strict=True)]
                    write({"id": _color_id(identity, name), "colors": pairs})
                judged += 1
    return judged


def _with_colors(line: Line, asked: Sequence[str], every: Sequence[str], colors: Mapping[str, Line]) -> list[Detection]:
    """A picture's detections, with the most probable colour where it was asked for."""
    objects = from_line(line)
    named: dict[int, str] = {}
    for name in {*asked, *({item.name for item in objects} & set(every))}:
        key = _color_id(line["id"], name)
        require(key in colors, f"colours of {name} are missing for a picture: run the command again to judge them")
        for number, row in colors[key]["colors"]:
            named[number] = COLORS[int(torch.tensor(row).argmax())]
    return [
        Detection(name=item.name, score=item.score, box=item.box, color=named.get(n, ""))
        for n, item in enumerate(objects)
    ]


def read_detections(
    detections: LineCache,
    colors: LineCache | None,
    prompts: Sequence[Prompt],
    files: Sequence[Path],
    *,
    every: Sequence[str] = (),
) -> list[list[Detection]]:
    """What was found in each picture, with colours; ConfigError when a picture, a detection or a colour is missing."""
    samples = len(files) // len(prompts)
    require(samples * len(prompts) == len(files), f"{len(files)} pictures for {len(prompts)} prompts: draw the rest")
    found, judged = detections.read(), colors.read() if colors else {}
    names = hash_files(files)
    missing = sum(name not in found for name in names)
    require(missing == 0, f"{missing} of {len(files)} pictures have no detections: run the command again to add them")
    return [
        _with_colors(found[name], asked_colors(prompts[i // samples].metadata), every, judged)
        for i, name in enumerate(names)
    ]
