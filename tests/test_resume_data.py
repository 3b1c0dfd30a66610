"""Resuming with other data settings, on real folders of latents: what may change, what is refused, in which words."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_samples import TOPOLOGY, sample_config, write_sample

from trainer.checkpoint.resume import check_resumable
from trainer.config import ConfigError, DataConfig, TrainConfig
from trainer.data.dataset import open_dataset
from trainer.data.demo import scene_shards
from trainer.data.latents import encode_folder

Change = Callable[[Path], dict[str, Any]]
CHANGES: dict[str, tuple[Change, Change, str]] = {
    # name: settings before and after, as a function of the folder; what is said: a note, nothing, or "error: ..."
    "same mix": (lambda r: {"mix": mix(r, "ab")}, lambda r: {}, ""),
    "mix added": (
        lambda r: {"latents": f"{r}/a"}, lambda r: {"latents": "", "mix": mix(r, "ab")},
        r"error: data\.mix=\{.*\} is not the data set that .* trained on \(data.latents: .*/a -> ; data.mix: \{\} -> ",
    ),
    "mix removed": (
        lambda r: {"mix": mix(r, "ab")}, lambda r: {"mix": {}, "latents": f"{r}/a"},
        r"error: data\.latents=.*/a is not the data set that .* \(data.latents:  -> .*; data.mix: \{.*\} -> \{\}\)",
    ),
    "mix of one": (lambda r: {"latents": f"{r}/a"}, lambda r: {"latents": "", "mix": mix(r, "a")}, "data.mix: {} -> "),
    "weight": (
        lambda r: {"mix": mix(r, "ab")}, lambda r: {"mix": mix(r, "ab", 2.0)}, r"error: data\.mix=.* is not the data",
    ),
    "folder swapped": (
        lambda r: {"mix": mix(r, "ab")}, lambda r: {"mix": mix(r, "ac")}, r"error: data\.mix=.* has other samples than",
    ),
    "folders in another order": (
        lambda r: {"mix": mix(r, "ab")}, lambda r: {"mix": mix(r, "ba")}, r"error: .* or in another order, and its pos",
    ),
    "folder moved": (lambda r: {"mix": mix(r, "ab")}, lambda r: {"mix": mix(r, "xb")}, "data.mix: {"),
    "other pictures": (lambda r: {"latents": f"{r}/a"}, lambda r: {"latents": f"{r}/b"}, "error: .*/b has other sam"),
    "moved": (lambda r: {"latents": f"{r}/a"}, lambda r: {"latents": f"{r}/x"}, "data.latents: "),
    "bucket_block": (
        lambda r: {"mix": mix(r, "ab")}, lambda r: {"bucket_block": 16},
        r"error: .* is not the data set that .* \(data\.bucket_block: 8 -> 16\): restore it, or use a new run_dir",
    ),
    "unused bucket_block": (
        lambda r: {"latents": f"{r}/a"}, lambda r: {"bucket_block": 16}, "data.bucket_block: 8 -> 16",
    ),
    "caption_dropout": (
        lambda r: {"latents": f"{r}/a"}, lambda r: {"caption_dropout": 0.2},
        r"error: data\.caption_dropout is 0\.2 but .* was trained with 0\.1, and it is part of the objective",
    ),
    "shuffle_group": (
        lambda r: {"mix": mix(r, "ab")}, lambda r: {"shuffle_group": 1},
        r"error: data\.shuffle_group is 1 but .* was trained with 8, and it is part of the order of the data",
    ),
    "whitening": (
        lambda r: {"latents": f"{r}/a"}, lambda r: {"whitening": 0.5}, r"error: .* \(data\.whitening: 1\.0 -> 0\.5\)",
    ),
    "normalize": (
        lambda r: {"latents": f"{r}/a"}, lambda r: {"normalize": "codec"}, r"error: .*\(data\.normalize: measured -> c",
    ),
    "staging": (
        lambda r: {"latents": f"{r}/a"}, lambda r: {"stage_dir": f"{r}/s", "stage_gb": 0.001}, "data.stage_dir:  -> ",
    ),
    "workers": (lambda r: {"mix": mix(r, "ab")}, lambda r: {"num_workers": 2}, "data.num_workers: 0 -> 2"),
    "text_dtype": (
        lambda r: {"latents": f"{r}/a"}, lambda r: {"latents": f"{r}/a8", "text_dtype": "int8"},
        r"error: .*/a8 is not the data set that .* \(data\.latents: .*; data\.text_dtype: fp16 -> int8\)",
    ),
    "synthetic": (
        lambda r: {"latents": f"{r}/a"}, lambda r: {"source": "synthetic", "latents": ""},
        r"error: data is not the data set that .* trained on \(data.source: shards -> synthetic; data.latents",
    ),
    "size of synthetic ones": (
        lambda r: {"source": "synthetic"}, lambda r: {"image_size": 16}, r"error: .*\(data\.image_size: 8 -> 16\)",
    ),
}  # fmt: skip


def mix(root: Path, names: str, first: float = 1.0) -> dict[str, float]:
    return {f"{root}/{name}": first if name == names[0] else 1.0 for name in names}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders a, b, c of 16 drawn scenes each, x, a copy of a, and a8, its captions in 8 bits."""
    folder = tmp_path_factory.mktemp("resume_data")
    for seed, name in enumerate("abc"):
        sizes = ["--num-images", "16", "--shard-size", "8", "--image-size", "8", "--seed", str(seed)]
        scene_shards.main(["--out", str(folder / f"{name}_images"), *sizes])
        data = DataConfig(images=str(folder / f"{name}_images"), latents=str(folder / name), image_size=8)
        assert encode_folder.encode(encode_folder.build_encoder(data))
    data = DataConfig(images=f"{folder}/a_images", latents=f"{folder}/a8", image_size=8, text_dtype="int8")
    assert encode_folder.encode(encode_folder.build_encoder(data))
    shutil.copytree(folder / "a", folder / "x")
    return folder


def config_of(root: Path, **settings: Any) -> TrainConfig:
    data = DataConfig(**{"source": "shards", "image_size": 8, "bucket_block": 8, **settings})
    return replace(sample_config(root / "run"), data=data)


@pytest.mark.parametrize("name", CHANGES)
def test_changed_data_settings(root: Path, tmp_path: Path, name: str) -> None:
    old, new, said = CHANGES[name]
    before, after = config_of(root, **old(root)), config_of(root, **(old(root) | new(root)))
    path = write_sample(tmp_path, 10, config=before, info=open_dataset(before).info)
    assert check_resumable(path, before, TOPOLOGY, open_dataset(before).info) == []
    info = open_dataset(after).info
    if said.startswith("error: "):
        with pytest.raises(ConfigError, match=said.removeprefix("error: ")) as error:
            check_resumable(path, after, TOPOLOGY, info)
        assert "\n" not in str(error.value)
    else:
        notes = check_resumable(path, after, TOPOLOGY, info)
        assert any(note.startswith(said) for note in notes) if said else notes == []


def test_a_checkpoint_that_does_not_say_its_samples_goes_on(root: Path, tmp_path: Path) -> None:
    config = config_of(root, latents=f"{root}/a")
    info = open_dataset(config).info
    assert info.samples and info.samples != open_dataset(config_of(root, latents=f"{root}/b")).info.samples
    path = write_sample(tmp_path, 10, config=config, info=replace(info, samples=""))
    assert check_resumable(path, config, TOPOLOGY, info) == [] and asdict(info)["samples"]
