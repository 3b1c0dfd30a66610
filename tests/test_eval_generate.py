"""Prompt sets and the resumable, rank-sharded generation of pictures."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.demo.prompts import demo_prompts, render_prompts, scene_clauses
from eval.pictures.generate import generate_pictures
from eval.pictures.image_files import geneval_files, picture_path, read_picture
from eval.pictures.prompts import metadata_lines, picture_seed, prompts_sha256
from trainer.config import ConfigError
from trainer.data.demo.scenes import CATEGORIES, Scene, held_out_scenes, render


def _draw(captions: list[str], seeds: list[int]) -> torch.Tensor:
    """A picture that is a function of caption and seed."""
    generators = [
        torch.Generator().manual_seed(seed ^ len(caption)) for caption, seed in zip(captions, seeds, strict=True)
    ]
    return torch.stack([torch.randint(0, 256, (8, 8, 3), generator=g, dtype=torch.uint8) for g in generators])


def _read(folder: Path) -> torch.Tensor:
    """Both pictures of all twelve prompts."""
    return torch.stack([read_picture(file) for file in geneval_files(folder, 12, 2)])


def test_six_tags_with_stable_ids() -> None:
    long, short = demo_prompts(0, 6), demo_prompts(0, 3)
    assert [prompt.tag for prompt in long] == [tag for tag in CATEGORIES for _ in range(6)]
    by_id = {prompt.id: prompt for prompt in long}
    assert len(by_id) == 36
    assert all(by_id[prompt.id] == prompt for prompt in short)
    assert prompts_sha256(long) != prompts_sha256(short)
    assert prompts_sha256(long) == prompts_sha256(demo_prompts(0, 6))
    assert all(json.loads(line)["prompt"] for line in metadata_lines(short).splitlines())


def test_clauses_follow_the_caption() -> None:
    for scene in held_out_scenes(2, 8):
        clauses = scene_clauses(scene)
        include = clauses["include"]
        names = {item.name for item in scene.objects}
        assert {clause["class"] for clause in include} == names
        assert ("exclude" in clauses) == (scene.category == "counting")
        assert any("color" in clause for clause in include) == (scene.category in ("colors", "color_attr"))
        if scene.category == "position":
            first, second = scene.objects
            assert include[1] == {"class": first.name, "count": 1, "position": [scene.relation, 0]}
            assert include[0] == {"class": second.name, "count": 1}
            assert scene.caption.index(first.name) < scene.caption.index(scene.relation)
        if scene.category == "color_attr":
            assert [clause["color"] for clause in include] == [item.background for item in scene.objects]


def test_true_pictures_come_from_the_prompts() -> None:
    prompts = demo_prompts(0, 1)
    pictures = render_prompts(prompts, 32)
    for prompt, picture in zip(prompts, pictures, strict=True):
        assert np.array_equal(render(Scene.from_json(prompt.metadata["scene"]), 32), picture.numpy())


def test_seed_is_pinned() -> None:
    assert picture_seed("counting/0/0001", 0) == 250486006192522982
    assert len({picture_seed(f"a/{i}", s) for i in range(50) for s in range(4)}) == 200


def test_layout_resume_and_ranks_give_one_result(tmp_path: Path) -> None:
    prompts = demo_prompts(0, 2)
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    assert generate_pictures(prompts, whole, _draw, num_samples=2, batch_size=5) == 24
    counts = [
        generate_pictures(prompts, sharded, _draw, num_samples=2, batch_size=3, rank=rank, world_size=5)
        for rank in random.Random(0).sample(range(5), 5)
    ]
    assert sum(counts) == 24
    assert max(counts) - min(counts) <= 2
    pairs = [(prompt, sample) for prompt in prompts for sample in range(2)]
    expected = torch.cat([_draw([prompt.text], [picture_seed(prompt.id, sample)]) for prompt, sample in pairs])
    assert torch.equal(_read(whole), expected) and torch.equal(_read(sharded), expected)
    assert generate_pictures(prompts, whole, _draw, num_samples=2) == 0
    picture_path(whole, 3, 1).unlink()
    with pytest.raises(ConfigError, match=r"00003/samples/0001\.png: draw the rest"):
        _read(whole)
    assert generate_pictures(prompts, whole, _draw, num_samples=2) == 1
    assert torch.equal(_read(whole), expected)
    stored = json.loads((whole / "00003" / "metadata.jsonl").read_text())
    assert stored == prompts[3].metadata
    assert not list(whole.rglob("*.tmp"))
