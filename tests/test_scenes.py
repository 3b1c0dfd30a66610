"""The embedded scenes: nothing held out is ever trained on, labels say what is drawn, bytes repeat."""

import io
import json
import tarfile
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from trainer.data.demo import scene_shards
from trainer.data.demo import scenes as s

TRAINING = [s.training_scene(0, i) for i in range(4000)] + [s.training_scene(7, i) for i in range(1000)]
HELD_OUT = s.held_out_scenes(0, 100)


def combinations_of(scene: s.Scene) -> tuple[set[tuple[str, str]], set[tuple[str, ...]]]:
    """Object-colour pairs and object-object pairs, straight from the labels."""
    names = sorted({item.name for item in scene.objects})
    return {(item.name, item.background) for item in scene.objects}, set(combinations(names, 2))


def uses_held_out(scene: s.Scene) -> bool:
    colors, pairs = combinations_of(scene)
    return bool(colors & s.HELD_OUT_COLORS or pairs & s.HELD_OUT_PAIRS)


def test_training_scenes_contain_nothing_held_out() -> None:
    for scene in TRAINING:
        colors, pairs = combinations_of(scene)
        assert not colors & s.HELD_OUT_COLORS and not pairs & s.HELD_OUT_PAIRS
        assert not uses_held_out(scene)


def test_held_out_scenes_are_new_in_one_way() -> None:
    for scene in HELD_OUT:
        colors, pairs = combinations_of(scene)
        by_pair = scene.category in ("two_object", "position", "color_attr")
        assert uses_held_out(scene)
        assert bool(pairs & s.HELD_OUT_PAIRS) == by_pair
        assert bool(colors & s.HELD_OUT_COLORS) != by_pair


def test_every_word_is_trained_and_a_fifth_is_held_out() -> None:
    seen = {pair for scene in TRAINING for pair in combinations_of(scene)[0]}
    assert {name for name, _ in seen} == set(s.OBJECTS) and {color for _, color in seen} == set(s.COLORS)
    assert len(seen) + len(s.HELD_OUT_COLORS) == len(s.OBJECTS) * len(s.COLORS)
    assert 0.15 < len(s.HELD_OUT_COLORS) / (len(s.OBJECTS) * len(s.COLORS)) < 0.25
    assert 0.15 < len(s.HELD_OUT_PAIRS) / len(list(combinations(s.OBJECTS, 2))) < 0.25


def test_held_out_captions_are_new_and_distinct() -> None:
    trained = {scene.caption for scene in TRAINING}
    assert not trained & {scene.caption for scene in HELD_OUT}
    for category in s.CATEGORIES:
        captions = [scene.caption for scene in HELD_OUT if scene.category == category]
        possible = 26 if category in ("single_object", "colors") else 100
        assert len(captions) == 100 and len(set(captions)) == possible


def test_scenes_are_functions_of_seed_and_index() -> None:
    assert s.training_scene(0, 3999) == TRAINING[3999]
    assert s.training_scene(1, 3999) != TRAINING[3999]
    assert s.held_out_scenes(0, 100) == HELD_OUT
    assert s.held_out_scenes(1, 100) != HELD_OUT
    # a value, so that the set cannot change unnoticed between versions
    assert s.training_scene(0, 0).caption == "a robot right of a frog on a blue background"


def test_json_round_trip() -> None:
    for scene in (*TRAINING[:50], *HELD_OUT):
        assert s.Scene.from_json(scene.to_json()) == scene


@pytest.mark.parametrize("category", s.CATEGORIES)
def test_labels_agree_with_caption_and_layout(category: str) -> None:
    for scene in (item for item in TRAINING if item.category == category):
        assert scene.count == len(scene.objects)
        for item in scene.objects:
            assert item.name in scene.caption and item.background in scene.caption
            assert item.size / 2 <= item.x + 0.02 and item.x - 0.02 <= 1 - item.size / 2
            assert item.size / 2 <= item.y + 0.02 and item.y - 0.02 <= 1 - item.size / 2
        first, last = scene.objects[0], scene.objects[-1]
        holds = {
            "left of": first.x < last.x,
            "right of": first.x > last.x,
            "above": first.y < last.y,
            "below": first.y > last.y,
        }
        assert (scene.relation != "") == (category == "position")
        assert scene.relation == "" or (holds[scene.relation] and f" {scene.relation} " in scene.caption)
        if category == "counting":
            assert scene.caption.startswith(s.NUMBER_WORDS[scene.count - 1] + " ")
        if category == "color_attr":
            assert first.x < 0.5 < last.x


def test_captions_by_category() -> None:
    by_category = {scene.category: scene.caption for scene in reversed(TRAINING)}
    assert by_category == {
        "single_object": "a burger on a black background",
        "two_object": "a ball and a rocket on a red background",
        "counting": "three fishes on a purple background",
        "colors": "a ghost on a blue background",
        "position": "a robot right of a frog on a blue background",
        "color_attr": "a ghost on a purple tile and a cat on a yellow tile",
    }


def test_rendered_background_and_objects() -> None:
    for scene in TRAINING[:40]:
        picture = s.render(scene, 32)
        assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
        colors = [s.COLORS[item.background] for item in scene.objects]
        halves = (picture[:, :16], picture[:, 16:])
        for half, color in zip(halves, (colors[0], colors[-1]), strict=True):
            share = (np.abs(half.astype(int) - color).max(-1) < 12).mean()
            assert 0.2 < share < 0.95  # some background, some object, in each half
    assert s.render(TRAINING[0], 48).shape == (48, 48, 3)


def test_shards_have_the_layout_of_img2dataset(tmp_path: Path) -> None:
    arguments = ["--num-images", "5", "--shard-size", "3", "--image-size", "16", "--seed", "4"]
    scene_shards.main(["--out", str(tmp_path / "a"), *arguments])
    scene_shards.main(["--out", str(tmp_path / "b"), *arguments])
    names = [f"{i:05d}{suffix}" for i in (0, 1) for suffix in (".parquet", ".tar", "_stats.json")]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(names)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "00001_stats.json").read_text())["successes"] == 2
    with tarfile.open(tmp_path / "a" / "00001.tar") as tar:
        content = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert sorted(content) == [f"0000100{i:02d}.{suffix}" for i in (0, 1) for suffix in ("json", "png", "txt")]
    scene = s.training_scene(4, 4)
    row = json.loads(content["000010001.json"])
    assert s.Scene.from_json(row["scene"]) == scene
    assert content["000010001.txt"].decode() == row["caption"] == scene.caption
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content["000010001.png"]))), s.render(scene, 16))
    assert pq.read_table(tmp_path / "a" / "00001.parquet").to_pylist()[1] == row


def test_bad_arguments_exit_with_2_and_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        scene_shards.main(["--out", str(tmp_path / "a"), "--num-images", "0"])
    assert caught.value.code == 2 and not (tmp_path / "a").exists()


def test_objects_lie_on_whole_pixels() -> None:
    for scene in (s.training_scene(5, i) for i in range(40)):
        for item in scene.objects:
            corners = [32 * (centre - item.size / 2) for centre in (item.x, item.y)]
            assert all(abs(corner - round(corner)) < 1e-9 for corner in (*corners, 32 * item.size))


def test_two_objects_stand_in_reading_order() -> None:
    for scene in s.held_out_scenes(3, 30):
        if scene.category == "two_object":
            first, second = scene.objects
            assert first.x < second.x - 0.3 or first.y < second.y - 0.3


def test_shards_are_the_same_whoever_draws_them(tmp_path: Path) -> None:
    for workers in ("0", "2"):
        given = ["--num-images", "7", "--shard-size", "3", "--image-size", "8", "--num-workers", workers]
        scene_shards.main(["--out", str(tmp_path / workers), *given])
    alone, together = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("0", "2"))
    assert len(alone) == 3 * 3 and together == alone
    with pytest.raises(SystemExit) as refused:
        scene_shards.main(["--out", str(tmp_path / "none"), "--num-workers", "-1"])
    assert refused.value.code == 2 and not (tmp_path / "none").exists()
