"""Inspection: the numbers are those of the data, the sheet shows the samples, damage is found."""

import base64
import io
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.config import DataConfig
from trainer.data import inspect
from trainer.data.demo import scene_shards, scenes
from trainer.data.images.contact_sheet import Figure, contact_sheet
from trainer.data.latents import encode_folder

NUM_IMAGES = 18


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighteen drawn scenes in three shards, as pixels."""
    folder = tmp_path_factory.mktemp("inspect")
    sizes = ["--num-images", str(NUM_IMAGES), "--shard-size", "7", "--image-size", "16"]
    scene_shards.main(["--out", str(folder / "images"), *sizes])
    encode_folder.encode(encode_folder.build_encoder(data_for(folder)))
    return folder


def data_for(root: Path, **settings: Any) -> DataConfig:
    paths = {"images": str(root / "images"), "latents": str(root / "latents")}
    return replace(DataConfig(**paths, image_size=16), **settings)


def figures_of(path: Path) -> list[tuple[np.ndarray[Any, Any], str, str]]:
    """Pictures, captions and origins of a sheet."""
    pattern = r'base64,([^"]+)"><figcaption>([^<]*)<small>([^<]*)</small>'
    return [
        (np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), caption, origin)
        for data, caption, origin in re.findall(pattern, path.read_text())
    ]


def test_sheet_shows_the_samples_with_their_captions(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.html"
    inspect.main([str(root / "latents"), "--out", str(sheet), "--num-samples", "100"])
    printed = capsys.readouterr().out
    drawn = [scenes.training_scene(0, i) for i in range(NUM_IMAGES)]
    lengths = sorted(len(scene.caption) for scene in drawn)
    assert "18 samples in 3 shards" in printed and f"least / median / most: {lengths[0]} /" in printed
    assert re.search(r"16x16 +16x16 +18 +100\.0% +3 +0\n", printed)
    figures = figures_of(sheet)
    assert len(figures) == NUM_IMAGES and 'src="http' not in sheet.read_text()
    for i, ((picture, caption, origin), scene) in enumerate(zip(figures, drawn, strict=True)):
        assert caption == scene.caption and origin == f"{i // 7:05d}.safetensors, {i // 7:05d}{i % 7:04d}"
        assert np.abs(picture.astype(int) - scenes.render(scene, 16)).max() <= 1  # fp16
    inspect.main([str(root / "latents"), "--out", str(sheet), "--num-samples", "4", "--seed", "1"])
    first = figures_of(sheet)
    inspect.main([str(root / "latents"), "--out", str(sheet), "--num-samples", "4", "--seed", "2"])
    assert len(first) == 4 and [f[2] for f in first] != [f[2] for f in figures_of(sheet)]


def test_buckets_and_online_captions(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = data_for(root, latents=str(tmp_path / "latents"), text="online", buckets=["16x16", "8x16"], bucket_block=4)
    encode_folder.encode(encode_folder.build_encoder(data))
    inspect.main([data.latents, "--out", str(tmp_path / "sheet.html"), "--bucket-block", "4"])
    printed = capsys.readouterr().out
    assert "text encoder online, captions are stored" in printed and "tokens," not in printed
    assert re.search(r"16x16 +16x16 +18 +100\.0% +3 +2\n", printed) and re.search(r"8x16 +8x16 +0 .*empty\n", printed)
    assert len(figures_of(tmp_path / "sheet.html")) == NUM_IMAGES


def test_verify_finds_any_changed_byte(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "latents"
    shutil.copytree(root / "latents", copy)
    inspect.main([str(copy), "--num-samples", "0", "--verify"])
    assert "3 of 3 shards are whole" in capsys.readouterr().out
    content = bytearray((copy / "00001.safetensors").read_bytes())
    content[-3] ^= 1
    (copy / "00001.safetensors").write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        inspect.main([str(copy), "--num-samples", "0", "--verify"])
    printed = capsys.readouterr().out
    assert caught.value.code == 1 and "2 of 3 shards are whole" in printed
    assert f"{copy / '00001.safetensors'} has another hash" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere has neither dataset.json nor index.parquet: name a folder of latents"),
        (["latents", "--num-samples", "-1"], "--num-samples is -1: use 0 or more"),
        (["latents", "--codec", "dct"], "--codec dct is not the codec that latents was encoded with"),
    ],
)
def test_user_errors_exit_with_2(
    root: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    with pytest.raises(SystemExit) as caught:
        inspect.main(arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_image_shards_give_their_index(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect.main([str(root / "images")])
    assert "18  kept, from 3 tars" in capsys.readouterr().out


def test_captions_cannot_break_the_page(root: Path) -> None:
    picture = np.zeros((4, 4, 3), dtype=np.uint8)
    page = contact_sheet("a<b", "x & y", [Figure(picture=picture, caption='"<script>', origin="&")])
    assert "<script" not in page and "&lt;script&gt;" in page and "a&lt;b" in page and "x &amp; y" in page
