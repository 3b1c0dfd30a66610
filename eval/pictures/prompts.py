"""Prompt sets in GenEval's form: text, tag and the clauses that a picture of it must satisfy.

A set's hash is the sha256 of its `evaluation_metadata.jsonl`, one JSON object per prompt, so that two
scores can be told to be over the same prompts.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.demo.scenes import CATEGORIES, Scene, held_out_scenes, render


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt; `id` names it whatever the length of its set, `metadata` is what the judge reads."""

    id: str
    text: str
    tag: str
    metadata: dict[str, Any] = field(hash=False)


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
    scenes = held_out_scenes(seed, per_category)
    numbers = dict.fromkeys(CATEGORIES, 0)
    prompts = []
    for scene in scenes:
        clauses = scene_clauses(scene)
        metadata = {"tag": scene.category, **clauses, "prompt": scene.caption, "scene": scene.to_json()}
        name = f"{scene.category}/{seed}/{numbers[scene.category]:04d}"
        numbers[scene.category] += 1
        prompts.append(Prompt(id=name, text=scene.caption, tag=scene.category, metadata=metadata))
    return prompts


def metadata_lines(prompts: Sequence[Prompt]) -> str:
    """The set as the text of an `evaluation_metadata.jsonl`."""
    return "".join(json.dumps(prompt.metadata) + "\n" for prompt in prompts)


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """Hash of the set: order, texts and clauses."""
    return hashlib.sha256(metadata_lines(prompts).encode()).hexdigest()


def render_prompts(prompts: Sequence[Prompt], size: int) -> Tensor:
    """The true pictures of built-in prompts, uint8 [N, size, size, 3]."""
    pictures = [render(Scene.from_json(prompt.metadata["scene"]), size) for prompt in prompts]
    return torch.from_numpy(np.stack(pictures))
