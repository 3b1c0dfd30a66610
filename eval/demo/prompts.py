"""Prompts of the built-in scenes that training never shows, their true pictures, and the training scenes' pictures.

Shapes: N pictures.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.pictures.image_files import picture_path, write_picture
from eval.pictures.prompts import Prompt
from trainer.data.demo.scenes import Scene, held_out_scenes, render, training_scene


def scene_clauses(scene: Scene) -> dict[str, Any]:
    """The `include` and `exclude` clauses that the scene's caption asks for.

    As in GenEval, colours count in the two colour tags only, a position's target comes first, and a
    counted class must not appear once more.
    """
    first = scene.objects[0]
    if scene.category == "counting":
        return {
            "include": [{"class": first.name, "count": scene.count}],
            "exclude": [{"class": first.name, "count": scene.count + 1}],
        }
    include: list[dict[str, Any]] = [{"class": item.name, "count": 1} for item in scene.objects]
    if scene.category in ("colors", "color_attr"):
        for clause, item in zip(include, scene.objects, strict=True):
            clause["color"] = item.background
    if scene.category == "position":
        include[0]["position"] = [scene.relation, 0]
        include.reverse()
    return {"include": include}


def demo_prompts(seed: int, per_category: int) -> list[Prompt]:
    """Prompts of the built-in scenes that training never shows, `per_category` for each of the six tags.

    A shorter list of the same seed is contained in a longer one, with the same ids.
    """
    prompts = []
    for i, scene in enumerate(held_out_scenes(seed, per_category)):
        clauses = scene_clauses(scene)
        metadata = {"tag": scene.category, **clauses, "prompt": scene.caption, "scene": scene.to_json()}
        name = f"{scene.category}/{seed}/{i % per_category:04d}"
        prompts.append(Prompt(id=name, text=scene.caption, tag=scene.category, metadata=metadata))
    return prompts


def render_prompts(prompts: Sequence[Prompt], size: int) -> Tensor:
    """The true pictures of built-in prompts, uint8 [N, size, size, 3]."""
    pictures = [render(Scene.from_json(prompt.metadata["scene"]), size) for prompt in prompts]
    return torch.from_numpy(np.stack(pictures))


def _write_missing(files: list[Path], scenes: Sequence[Scene], size: int) -> list[Path]:
    """Draw the scenes whose files are not there; all files."""
    for file, scene in zip(files, scenes, strict=True):
        if not file.is_file():
            write_picture(file, torch.from_numpy(render(scene, size)))
    return files


def write_true_pictures(folder: Path, prompts: Sequence[Prompt], size: int) -> list[Path]:
    """One true picture per prompt of the built-in scenes, as files in GenEval's layout."""
    scenes = [Scene.from_json(prompt.metadata["scene"]) for prompt in prompts]
    return _write_missing([picture_path(folder, number, 0) for number in range(len(prompts))], scenes, size)


def write_training_pictures(folder: Path, count: int, size: int) -> list[Path]:
    """The first `count` scenes of the built-in training data of seed 0 as picture files."""
    scenes = [training_scene(0, index) for index in range(count)]
    return _write_missing([folder / f"{index:06d}.png" for index in range(count)], scenes, size)
