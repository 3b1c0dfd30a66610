"""Encoding: shards hold what the encoders give, reruns change nothing, and only what is missing is done again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trainer.config import ConfigError, DataConfig
from trainer.data import encode as e
from trainer.data import scenes
from trainer.data.index import build_index
from trainer.encoders import build_text_encoder

NUM_IMAGES, SHARD_SIZE, IMAGE_SIZE = 20, 8, 16


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes 0 to 19 in three tars, indexed."""
    folder = tmp_path_factory.mktemp("images")
    sizes = ["--num-images", str(NUM_IMAGES), "--shard-size", str(SHARD_SIZE), "--image-size", str(IMAGE_SIZE)]
    scenes.main(["--out", str(folder), *sizes])
    build_index(folder)
    return folder


def encoder_for(images: Path, latents: Path, image_size: int = IMAGE_SIZE) -> e.Encoder:
    return e.build_encoder(DataConfig(images=str(images), latents=str(latents), image_size=image_size))


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def latents(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "latents"
    assert e.encode(encoder_for(images, folder))
    return folder


def test_shards_hold_what_the_encoders_give(latents: Path) -> None:
    expected_names = {"dataset.json", "empty.safetensors"}
    all_latents = []
    for shard, start in enumerate(range(0, NUM_IMAGES, SHARD_SIZE)):
        name = f"{shard:05d}"
        expected_names |= {f"{name}.safetensors", f"{name}.json", f"{name}.samples.json"}
        tensors = load_file(latents / f"{name}.safetensors")
        samples = json.loads((latents / f"{name}.samples.json").read_text())
        drawn = [scenes.training_scene(0, i) for i in range(start, min(start + SHARD_SIZE, NUM_IMAGES))]
        pictures = np.stack([scenes.render(scene, IMAGE_SIZE) for scene in drawn])
        rgb_BCHW = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        assert tensors["latent"].dtype == torch.float16 and torch.equal(tensors["latent"], rgb_BCHW.half())
        all_latents.append(tensors["latent"].double())
        assert samples["captions"] == sorted({scene.caption for scene in drawn})
        assert [scenes.Scene.from_json(text) for text in samples["scenes"]] == drawn
        assert samples["keys"] == [f"{name}{i:04d}" for i in range(len(drawn))]
        offset = tensors["text_offset"].tolist()
        for scene, number in zip(drawn, tensors["caption_id"].tolist(), strict=True):
            text = tensors["text"][offset[number] : offset[number + 1]]
            expected = build_text_encoder("minilm").encode([scene.caption])[0]
            torch.testing.assert_close(text.float(), expected, atol=2e-3, rtol=1e-3)
        assert offset[-1] == len(tensors["text"])
    assert {path.name for path in latents.iterdir()} == expected_names
    dataset = json.loads((latents / "dataset.json").read_text())
    values = torch.cat(all_latents)
    assert dataset["num_samples"] == NUM_IMAGES
    assert dataset["info"]["mean"] == pytest.approx(values.mean((0, 2, 3)).tolist(), rel=1e-9)
    assert dataset["info"]["std"] == pytest.approx(values.std((0, 2, 3), unbiased=False).tolist(), rel=1e-9)
    assert (dataset["info"]["max_tokens"], dataset["info"]["text_dim"]) == (16, 384)


def test_rerun_does_nothing_and_a_killed_run_is_completed(images: Path, latents: Path, tmp_path: Path) -> None:
    before = files_in(latents)
    copy = tmp_path / "latents"
    shutil.copytree(latents, copy)
    times = {path.name: path.stat().st_mtime_ns for path in copy.glob("0*")}
    assert e.encode(encoder_for(images, copy))
    assert {path.name: path.stat().st_mtime_ns for path in copy.glob("0*")} == times
    # killed between tensors and sidecar, half-way through another file, and before the last shard
    (copy / "00001.json").unlink()
    (copy / "00000.safetensors").write_bytes(before["00000.safetensors"][:1000])
    for path in (*copy.glob("00002*"), copy / "dataset.json"):
        path.unlink()
    assert e.encode(encoder_for(images, copy))
    assert files_in(copy) == before


def test_ranks_share_the_shards(images: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    overrides = [f"data.images={images}", f"data.latents={tmp_path}", f"data.image_size={IMAGE_SIZE}"]
    monkeypatch.setenv("RANK", "1")
    e.main(["debug", *overrides])
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["00001.safetensors"]
    monkeypatch.setenv("RANK", "0")
    e.main(["debug", *overrides])
    assert files_in(tmp_path) == files_in(latents)


def test_changed_pictures_are_encoded_again(images: Path, latents: Path, tmp_path: Path) -> None:
    pictures, made = tmp_path / "images", tmp_path / "latents"
    shutil.copytree(images, pictures)
    shutil.copytree(latents, made)
    (pictures / "00001.tar").unlink()
    with pytest.raises(ConfigError, match="made from other tars"):
        e.encode(encoder_for(pictures, made))
    scenes.main(
        ["--out", str(pictures), "--num-images", "20", "--shard-size", "8", "--image-size", "16", "--seed", "1"]
    )
    build_index(pictures)
    assert e.encode(encoder_for(pictures, made))
    assert not files_in(made).keys() - files_in(latents).keys()
    assert files_in(made)["00001.safetensors"] != files_in(latents)["00001.safetensors"]


def test_other_settings_are_refused_before_anything_is_written(images: Path, latents: Path) -> None:
    before = files_in(latents)
    with pytest.raises(ConfigError, match="shards made with other encoders or another"):
        e.encode(encoder_for(images, latents, image_size=8))
    assert files_in(latents) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.latents=somewhere"], "data.images is empty"),
        (["data.images=nowhere", "data.latents=x"], "data.images=nowhere is not a folder"),
        (["data.codec=jpeg", "data.images=x", "data.latents=y"], "data.codec=jpeg is not known"),
    ],
)
def test_user_errors_exit_with_2(
    overrides: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        e.main(["debug", *overrides])
    assert caught.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_larger_pictures_are_resized_and_cropped(images: Path, tmp_path: Path) -> None:
    assert e.encode(encoder_for(images, tmp_path, image_size=8))
    latent = load_file(tmp_path / "00000.safetensors")["latent"]
    assert latent.shape == (SHARD_SIZE, 3, 8, 8)
    drawn = torch.tensor(scenes.render(scenes.training_scene(0, 0), IMAGE_SIZE)).permute(2, 0, 1).float()
    mean = torch.nn.functional.avg_pool2d(drawn / 127.5 - 1, 2)  # what any antialiased filter comes near
    assert (latent[0].float() - mean).abs().mean() < 0.1
