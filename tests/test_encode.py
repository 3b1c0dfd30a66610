"""Encoding: shards hold what the encoders give, reruns change nothing, and only what is missing is done again."""

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests_launcher import Launcher

from trainer.config import ConfigError, DataConfig, TrainConfig, TrainLoopConfig
from trainer.data.dataset import open_dataset
from trainer.data.demo import scene_shards, scenes
from trainer.data.encode import main
from trainer.data.index import build_index
from trainer.data.latents.dataset_file import read_dataset_file
from trainer.data.latents.describe import describe
from trainer.data.latents.encode_folder import build_encoder, encode
from trainer.data.latents.samples import Batch
from trainer.data.latents.shard_writer import Encoder
from trainer.data.loader import RawBatch, build_loader, encode_captions
from trainer.data.position import DataState
from trainer.data.vae_training import load_pictures
from trainer.encoders.build import build_codec, build_text_encoder
from trainer.encoders.pixel import PixelCodec
from trainer.encoders.vae import SmallVae
from trainer.randomness import keyed_generator

NUM_IMAGES, SHARD_SIZE, IMAGE_SIZE = 20, 8, 16


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes 0 to 19 in three tars, indexed."""
    folder = tmp_path_factory.mktemp("images")
    sizes = ["--num-images", str(NUM_IMAGES), "--shard-size", str(SHARD_SIZE), "--image-size", str(IMAGE_SIZE)]
    scene_shards.main(["--out", str(folder), *sizes])
    build_index(folder)
    return folder


def data_for(images: Path, latents: Path, **settings: Any) -> DataConfig:
    return DataConfig(
        **{"source": "shards", "images": str(images), "latents": str(latents), "image_size": IMAGE_SIZE, **settings}
    )


def encoder_for(images: Path, latents: Path, image_size: int = IMAGE_SIZE) -> Encoder:
    return build_encoder(data_for(images, latents, image_size=image_size))


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def latents(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "latents"
    assert encode(encoder_for(images, folder))
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
    assert encode(encoder_for(images, copy))
    assert {path.name: path.stat().st_mtime_ns for path in copy.glob("0*")} == times
    # killed between tensors and sidecar, half-way through another file, and before the last shard
    (copy / "00001.json").unlink()
    (copy / "00000.safetensors").write_bytes(before["00000.safetensors"][:1000])
    for path in (*copy.glob("00002*"), copy / "dataset.json"):
        path.unlink()
    assert encode(encoder_for(images, copy))
    assert files_in(copy) == before


@pytest.mark.slow
def test_killed_at_any_time_and_rerun_gives_the_same_bytes(tmp_path: Path, launcher: Launcher) -> None:
    sizes = ["--num-images", "240", "--shard-size", "20", "--image-size", "16"]
    scene_shards.main(["--out", str(tmp_path / "images"), *sizes])
    assert encode(encoder_for(tmp_path / "images", tmp_path / "whole"))
    made = tmp_path / "made"
    arguments = [f"data.images={tmp_path / 'images'}", f"data.latents={made}", f"data.image_size={IMAGE_SIZE}"]
    for count, delay in ((2, 0.0), (4, 0.003), (7, 0.01)):
        process = launcher.start("-m", "trainer.data.encode", "debug", *arguments)
        wait_for(lambda count=count: len(list(made.glob("*[0-9].json"))) >= count)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (made / "dataset.json").exists()
    (made / ".00011.safetensors.1-ab.tmp").write_bytes(b"left by a kill")
    done = launcher.run("-m", "trainer.data.encode", "debug", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert files_in(made) == files_in(tmp_path / "whole")


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_large_tars_become_several_shards(
    images: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.latents.shard_writer.MAX_SHARD_BYTES", 3 * (2 * 3 * 16 * 16 + 2 * 384 * 20))
    assert encode(encoder_for(images, tmp_path))
    names = [path.name for path in sorted(tmp_path.glob("*.safetensors"))][:-1]
    counts = {"00000": 3, "00001": 3, "00002": 2}  # of 8, 8 and 4 samples at 3 a shard
    assert names == [f"{tar}-{i:03d}.safetensors" for tar, count in counts.items() for i in range(count)]
    whole = [open_dataset(TrainConfig(data=data_for(images, folder))) for folder in (latents, tmp_path)]
    for number in range(NUM_IMAGES):
        a, b = (dataset.read(number) for dataset in whole)
        assert torch.equal(a.latent, b.latent)
        torch.testing.assert_close(a.text, b.text, atol=2e-3, rtol=1e-3)
    means = [torch.tensor(dataset.info.mean) for dataset in whole]
    torch.testing.assert_close(*means, atol=1e-6, rtol=0)


def test_threads_change_nothing(images: Path, latents: Path, tmp_path: Path) -> None:
    assert encode(build_encoder(data_for(images, tmp_path), num_threads=3))
    assert files_in(tmp_path) == files_in(latents)


def small_vae(path: Path) -> str:
    torch.manual_seed(0)
    save_file(SmallVae().state_dict(), path)
    return f"vae:{path}"


def test_latents_are_drawn_from_a_stored_posterior(images: Path, tmp_path: Path) -> None:
    codec = small_vae(tmp_path / "vae.safetensors")
    data = data_for(images, tmp_path / "latents", codec=codec, latent_std=True, caption_dropout=0.0)
    assert encode(build_encoder(data))
    config = TrainConfig(data=data, seed=3, train=TrainLoopConfig(micro_batch_size=NUM_IMAGES))
    dataset = open_dataset(config)
    pictures = np.stack([scenes.render(scenes.training_scene(0, i), IMAGE_SIZE) for i in range(NUM_IMAGES)])
    rgb_BCHW = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    mean, std = build_codec(codec).posterior(rgb_BCHW)
    assert std is not None
    samples = [dataset.read(i) for i in range(NUM_IMAGES)]
    torch.testing.assert_close(torch.stack([s.latent for s in samples]), mean, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(torch.stack([s.latent_std for s in samples]), std, atol=2e-3, rtol=2e-3)
    spread = (mean.double().square() + std.double().square()).mean((0, 2, 3)) - mean.double().mean((0, 2, 3)).square()
    assert dataset.info.std == pytest.approx(spread.sqrt().tolist(), rel=1e-3)

    def batch_at(samples_seen: int) -> Batch:
        state = DataState(seed=3, epoch=0, consumed=0, samples_seen=samples_seen)
        return next(build_loader(dataset, config, rank=0, world_size=1, state=state))

    order = dataset.layout.order(3, 0, config.data.shuffle_group)
    rows = [order[i] for i in range(NUM_IMAGES)]
    noise = torch.stack(
        [torch.randn(mean[0].shape, generator=keyed_generator(3, 100 + i, "posterior")) for i in range(NUM_IMAGES)]
    )
    drawn = batch_at(100).latent_BCHW * dataset.info.std_C.view(1, -1, 1, 1) + dataset.info.mean_C.view(1, -1, 1, 1)
    torch.testing.assert_close(drawn, mean[rows] + std[rows] * noise, atol=5e-3, rtol=5e-3)
    assert torch.equal(batch_at(100).latent_BCHW, batch_at(100).latent_BCHW)
    assert not torch.equal(batch_at(100).latent_BCHW, batch_at(120).latent_BCHW)
    with pytest.raises(
        ConfigError, match=r"data\.latent_std is true, but data\.codec=pixel gives no standard deviation"
    ):
        build_encoder(data_for(images, tmp_path, latent_std=True))
    with pytest.raises(ConfigError, match=r"data\.latent_std is False but .* was encoded with True"):
        open_dataset(TrainConfig(data=replace(data, latent_std=False)))


def test_online_text_is_what_cached_text_is(images: Path, latents: Path, tmp_path: Path) -> None:
    online = data_for(images, tmp_path / "latents", text="online", caption_dropout=0.4)
    assert encode(build_encoder(online))
    assert not (tmp_path / "latents" / "empty.safetensors").exists()
    configs = [
        TrainConfig(data=data, train=TrainLoopConfig(micro_batch_size=10), seed=1)
        for data in (online, replace(online, num_workers=1), data_for(images, latents, caption_dropout=0.4))
    ]
    state = DataState(seed=1, epoch=0, consumed=0, samples_seen=0)
    datasets = [open_dataset(config) for config in configs]
    loaders = [
        build_loader(dataset, config, rank=0, world_size=1, state=state)
        for dataset, config in zip(datasets, configs, strict=True)
    ]
    for _ in range(4):
        batch, in_workers, cached = (next(loader) for loader in loaders)
        names = ("latent_BCHW", "text_BLD", "text_mask_BL", "index_B")
        assert all(torch.equal(getattr(batch, name), getattr(in_workers, name)) for name in names)
        length = cached.text_BLD.shape[1]
        assert torch.equal(batch.latent_BCHW, cached.latent_BCHW) and torch.equal(batch.index_B, cached.index_B)
        assert torch.equal(batch.text_mask_BL[:, :length], cached.text_mask_BL) and batch.text_BLD.shape[1] == 64
        assert not batch.text_mask_BL[:, length:].any()
        torch.testing.assert_close(batch.text_BLD[:, :length], cached.text_BLD.float(), atol=2e-3, rtol=1e-3)
    assert datasets[0].info.fingerprint != datasets[2].info.fingerprint
    assert (datasets[0].info.text_dim, datasets[0].info.max_tokens) == (384, 64)
    with pytest.raises(ConfigError, match=r"data\.text is cache but .* was encoded with online"):
        open_dataset(TrainConfig(data=replace(online, text="cache")))


def test_online_captions_are_encoded_once_per_batch() -> None:
    seen: list[list[str]] = []

    class Spy:
        dim, max_tokens = 2, 4

        def fingerprint(self) -> str:
            return "spy"

        def encode(self, captions: list[str]) -> list[torch.Tensor]:
            seen.append(captions)
            return [torch.full((len(caption), 2), float(len(caption))) for caption in captions]

    raw = RawBatch(latent_BCHW=torch.zeros(4, 1, 1, 1), texts=["bb", "", "bb", "a"], index_B=torch.arange(4))
    texts = encode_captions(Spy(), raw).texts
    assert seen == [["", "a", "bb"]] and [len(text) for text in texts] == [2, 0, 2, 1]


def test_codecs_own_normalisation(images: Path, tmp_path: Path) -> None:
    data = data_for(images, tmp_path, normalize="codec")
    codec = PixelCodec()
    codec.shift, codec.scale = 0.25, 4.0
    assert encode(replace(build_encoder(data), codec=codec))
    info = open_dataset(TrainConfig(data=data)).info
    assert info.mean == [0.25] * 3 and info.std == [0.25] * 3
    measured = open_dataset(TrainConfig(data=data_for(images, tmp_path))).info
    assert measured.mean != info.mean and measured.fingerprint != info.fingerprint


def test_sidecars_say_what_made_a_shard(latents: Path) -> None:
    sidecar = json.loads((latents / "00001.json").read_text())
    assert sidecar["codec_fingerprint"] == "pixel-1" and sidecar["text_fingerprint"].startswith("minilm-")
    assert (sidecar["picture_sizes"], sidecar["crop"], sidecar["tar"]) == (
        [[16, 16]],
        "cover, centre, lanczos",
        "00001.tar",
    )
    assert sidecar["code_version"].startswith("0.1.0")
    (shard,) = sidecar["shards"]
    content = (latents / "00001.safetensors").read_bytes()
    assert shard["sha256"] == hashlib.sha256(content).hexdigest() and shard["size"] == len(content)
    assert (shard["num_samples"], shard["latent_shape"]) == (SHARD_SIZE, [3, 16, 16])


def test_tars_that_would_give_the_same_shard_are_refused(tmp_path: Path) -> None:
    for folder in ("a/b__c", "a__b/c"):
        scene_shards.main(["--out", str(tmp_path / folder), "--num-images", "2", "--image-size", "16"])
    with pytest.raises(ConfigError, match=r"a/b__c/00000\.tar and a__b/c/00000\.tar would both give shard"):
        encode(encoder_for(tmp_path, tmp_path / "latents"))


def test_ranks_share_the_shards(images: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    overrides = [f"data.images={images}", f"data.latents={tmp_path}", f"data.image_size={IMAGE_SIZE}"]
    monkeypatch.setenv("RANK", "1")
    main(["debug", *overrides])
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["00001.safetensors"]
    monkeypatch.setenv("RANK", "0")
    main(["debug", *overrides])
    assert files_in(tmp_path) == files_in(latents)


def test_changed_pictures_are_encoded_again(images: Path, latents: Path, tmp_path: Path) -> None:
    pictures, made = tmp_path / "images", tmp_path / "latents"
    shutil.copytree(images, pictures)
    shutil.copytree(latents, made)
    (pictures / "00001.tar").unlink()
    with pytest.raises(ConfigError, match="made from other tars"):
        encode(encoder_for(pictures, made))
    scene_shards.main(
        ["--out", str(pictures), "--num-images", "20", "--shard-size", "8", "--image-size", "16", "--seed", "1"]
    )
    build_index(pictures)
    assert encode(encoder_for(pictures, made))
    assert not files_in(made).keys() - files_in(latents).keys()
    assert files_in(made)["00001.safetensors"] != files_in(latents)["00001.safetensors"]


def test_other_settings_are_refused_before_anything_is_written(images: Path, latents: Path) -> None:
    before = files_in(latents)
    with pytest.raises(ConfigError, match="shards made with other encoders or settings"):
        encode(encoder_for(images, latents, image_size=8))
    assert files_in(latents) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.latents=somewhere"], "data.images is empty"),
        (["data.images=nowhere", "data.latents=x"], "data.images=nowhere is not a folder"),
        (["data.codec=jpeg", "data.images=x", "data.latents=y"], "data.codec=jpeg is not known"),
        (["data.images=x", "data.latents=./x"], "data.latents=./x is the folder of data.images"),
        (["data.images=x", "data.latents=/proc/1/x"], "data.latents=/proc/1/x: /proc/1 may not be written to"),
        (["data.images=x", "data.latents=y", "data.enlarge_up_to=0.5"], "data.enlarge_up_to is 0.5: use 1 or more"),
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
        main(["debug", *overrides])
    assert caught.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_larger_pictures_are_resized_and_cropped(images: Path, tmp_path: Path) -> None:
    assert encode(encoder_for(images, tmp_path, image_size=8))
    latent = load_file(tmp_path / "00000.safetensors")["latent"]
    assert latent.shape == (SHARD_SIZE, 3, 8, 8)
    drawn = torch.tensor(scenes.render(scenes.training_scene(0, 0), IMAGE_SIZE)).permute(2, 0, 1).float()
    mean = torch.nn.functional.avg_pool2d(drawn / 127.5 - 1, 2)  # what any antialiased filter comes near
    assert (latent[0].float() - mean).abs().mean() < 0.1


def test_pictures_are_not_enlarged_without_a_word(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.image_size=64 would enlarge the pictures of .* largest 4 times: .* 1$"
    ):
        encode(encoder_for(images, tmp_path / "latents", image_size=64))
    with pytest.raises(ConfigError, match=r"data\.buckets=\['32x24'\] would enlarge"):
        encode(build_encoder(data_for(images, tmp_path / "latents", buckets=["32x24"])))
    assert not list(tmp_path.iterdir())
    assert encode(build_encoder(data_for(images, tmp_path, image_size=32, enlarge_up_to=2.0)))
    assert f"00000: {SHARD_SIZE} pictures ({SHARD_SIZE} enlarged)" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"data\.image_size=64 would enlarge"):
        load_pictures(data_for(images, tmp_path, image_size=64, buckets=["16x16"]))


def test_pictures_that_are_too_small_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """5 of 24 pixels, 8 of 20 and 3 of 16: the last are a tar that gives no shard."""
    pictures, made = tmp_path / "images", tmp_path / "latents"
    for size, count in ((24, 5), (20, 8), (16, 3)):
        sizes = ["--num-images", str(count), "--image-size", str(size)]
        scene_shards.main(["--out", str(pictures / f"of-{size}"), *sizes])
    build_index(pictures)
    capsys.readouterr()
    assert encode(encoder_for(pictures, made, image_size=20))
    said = capsys.readouterr().out
    assert "of-16__00000: 0 pictures (0 enlarged), 3 left out as too small, 0 captions" in said
    assert "dataset.json: 13 samples; 3 pictures left out as smaller than their crop (data.enlarge_up_to)" in said
    data = data_for(pictures, made, image_size=20)
    assert len(open_dataset(TrainConfig(data=data))) == 13
    assert "a sample; 3 pictures left out as smaller" in describe(read_dataset_file(made), 1, 0)
    assert len(load_pictures(data)) == 13
    with pytest.raises(ConfigError, match=r"data\.enlarge_up_to is 1\.25 but .* holds shards made with 1\.0: restore"):
        encode(build_encoder(replace(data, enlarge_up_to=1.25)))
    with_small = replace(data, latents=str(tmp_path / "with_small"), enlarge_up_to=1.25)
    assert encode(build_encoder(with_small)) and len(open_dataset(TrainConfig(data=with_small))) == 16
