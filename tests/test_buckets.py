"""Pictures of several aspect ratios, several data sets and staged shards, through the real writer and reader."""

import io
import json
import os
import shutil
import signal
import tarfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests_launcher import Launcher

from moe.config import MoeConfig
from trainer.config import ConfigError, DataConfig, DiffusionConfig, ModelConfig, TrainConfig, TrainLoopConfig
from trainer.data.dataset import open_dataset
from trainer.data.demo import scene_shards
from trainer.data.latents import encode_folder
from trainer.data.latents.dataset_file import read_dataset_file
from trainer.data.latents.samples import Batch
from trainer.data.latents.shard_file import DamagedShardError
from trainer.data.loader import build_loader
from trainer.data.position import DataState
from trainer.diffusion.flow import NoisedBatch, noise_batch

SHAPES = [(16, 16), (24, 12), (10, 20), (17, 16), (12, 23)]  # height, width
BUCKETS = ["8x8", "12x4", "4x12"]
NEAREST = [0, 1, 2, 0, 2]
START = DataState(seed=0, epoch=0, consumed=0, samples_seen=0)


def write_pictures(folder: Path, count: int, per_tar: int) -> None:
    """Tars as img2dataset writes them; picture i has shape i % 5 and says so in its caption."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, first in enumerate(range(0, count, per_tar)):
        members = range(first, min(first + per_tar, count))
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for i in members:
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (*SHAPES[i % 5], 3), dtype=np.uint8)).save(buffer, "png")
                for suffix, content in (("png", buffer.getvalue()), ("txt", f"shape {i % 5}, {i}".encode())):
                    member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        (folder / f"{number:05d}_stats.json").write_text(json.dumps({"successes": len(members)}))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 pictures of five shapes in three tars, encoded into three buckets."""
    folder = tmp_path_factory.mktemp("buckets")
    write_pictures(folder / "images", 120, 50)
    assert encode_folder.encode(encode_folder.build_encoder(data_for(folder)))
    return folder


def data_for(root: Path, **settings: Any) -> DataConfig:
    defaults = {
        "source": "shards",
        "images": str(root / "images"),
        "latents": str(root / "latents"),
        "image_size": 8,
        "buckets": BUCKETS,
        "bucket_block": 12,
    }
    return DataConfig(**{**defaults, **settings})


def config_for(data: DataConfig, micro: int = 12, accumulation: int = 1) -> TrainConfig:
    return TrainConfig(
        data=data, train=TrainLoopConfig(micro_batch_size=micro, gradient_accumulation_steps=accumulation)
    )


def test_each_picture_is_in_the_bucket_of_its_shape(root: Path) -> None:
    folder = read_dataset_file(root / "latents")
    assert folder.buckets == [(8, 8), (12, 4), (4, 12)] and folder.num_samples == 120
    assert [shard.file for shard in folder.shards[:3]] == [f"00000-{bucket}.safetensors" for bucket in BUCKETS]
    for shard in folder.shards:
        samples = json.loads((root / "latents" / shard.file).with_suffix(".samples.json").read_text())
        shapes = {int(caption.split(",")[0].removeprefix("shape ")) for caption in samples["captions"]}
        assert {NEAREST[shape] for shape in shapes} == {shard.bucket}
    dataset = open_dataset(config_for(data_for(root)))
    assert dataset.info.buckets == [[8, 8], [12, 4], [4, 12]] and len(dataset) == 48 + 24 + 48
    assert {tuple(dataset.read(i).latent.shape) for i in range(120)} == {(3, 8, 8), (3, 12, 4), (3, 4, 12)}


def noised(batch: Batch) -> NoisedBatch:
    return noise_batch(batch, DiffusionConfig(), seed=0, patch_size=2)


def global_batches(config: TrainConfig, state: DataState, steps: int, world: int) -> list[dict[str, torch.Tensor]]:
    """What all ranks train on, noise and timesteps included."""
    dataset = open_dataset(config)
    ranks = [build_loader(dataset, config, rank=rank, world_size=world, state=state) for rank in range(world)]
    found = []
    for _ in range(steps):
        parts = [next(rank) for _ in range(config.train.gradient_accumulation_steps) for rank in ranks]
        text = ("text_BLD", "text_mask_BL")
        whole = [
            {k: v for k, v in (vars(part) | vars(noised(part))).items() if k not in ("keep_BS", "text")}
            | {name: getattr(part, name) for name in text}
            for part in parts
        ]
        found.append({name: torch.cat([part[name] for part in whole]) for name in whole[0]})
    return found


@pytest.fixture(scope="module")
def expected(root: Path) -> list[dict[str, torch.Tensor]]:
    return global_batches(config_for(data_for(root)), START, 13, 1)


@pytest.mark.parametrize(
    ("world", "micro", "accumulation", "workers"),
    [(1, 12, 1, 3), (2, 6, 1, 0), (3, 4, 1, 1), (4, 3, 1, 0), (6, 2, 1, 0), (2, 3, 2, 2), (1, 6, 2, 0)],
)
def test_same_values_and_noise_for_any_topology_and_workers(
    root: Path, expected: list[dict[str, torch.Tensor]], world: int, micro: int, accumulation: int, workers: int
) -> None:
    config = config_for(data_for(root, num_workers=workers), micro, accumulation)
    found = global_batches(config, START, 13, world)
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)
    assert {tuple(batch["latent_BCHW"].shape[2:]) for batch in found} == {(8, 8), (12, 4), (4, 12)}


def test_five_chained_resumes_keep_values_and_noise(root: Path, expected: list[dict[str, torch.Tensor]]) -> None:
    state, found = START, []
    for steps, world, micro, accumulation in ((2, 2, 6, 1), (3, 3, 2, 2), (4, 6, 2, 1), (3, 1, 12, 1), (1, 4, 3, 1)):
        config = config_for(data_for(root), micro, accumulation)
        found += global_batches(config, state, steps, world)
        for _ in range(steps):
            state = state.advance(12, len(open_dataset(config)), 12)
        state = DataState(**json.loads(json.dumps(asdict(state))))
    assert state.epoch == 1
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


def test_settings_of_buckets_are_checked(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.buckets is 9x8: use multiples of 4, as data\.codec=dct needs"):
        encode_folder.build_encoder(data_for(root, codec="dct", buckets=["8x8", "9x8"]))
    with pytest.raises(ConfigError, match=r"data\.buckets names 8: write HEIGHTxWIDTH in pixels"):
        data_for(root, buckets=["8"])
    with pytest.raises(ConfigError, match=r"data\.bucket_block is 0, but data\.buckets or data\.mix names several"):
        data_for(root, bucket_block=0)
    with pytest.raises(ConfigError, match=r"data\.buckets is \['8x8', '12x4'\] but .* was encoded with \['8x8', "):
        open_dataset(config_for(data_for(root, buckets=BUCKETS[:2])))
    config = config_for(data_for(root), 5)
    with pytest.raises(ConfigError, match=r"data\.bucket_block=12 is not a multiple of the global batch of 5"):
        build_loader(open_dataset(config), config, rank=0, world_size=1, state=START)
    with pytest.raises(ConfigError, match=r"a bucket has 24 samples, too few for data\.bucket_block=30"):
        open_dataset(config_for(data_for(root, bucket_block=30)))
    with pytest.raises(ConfigError, match=r"model\.patch_size=8 does not divide the latent of 12 x 4 of data\.buckets"):
        open_dataset(replace(config_for(data_for(root)), model=ModelConfig(patch_size=8)))
    with pytest.raises(ConfigError, match=r"num_experts"):
        open_dataset(replace(config_for(data_for(root)), moe=MoeConfig(num_experts=64, capacity_factor=1.0)))
    dropped = open_dataset(config_for(data_for(root, bucket_block=30, small_buckets="drop")))
    assert len(dropped) == 60 and dropped.info.fingerprint != open_dataset(config_for(data_for(root))).info.fingerprint


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Drawn scenes of two seeds, to be mixed 1 to 3; what comes out is tests/test_mixes.py's."""
    folder = tmp_path_factory.mktemp("mixed")
    for seed, count in ((0, 40), (1, 25)):
        sizes = ["--num-images", str(count), "--shard-size", "15", "--image-size", "8", "--seed", str(seed)]
        scene_shards.main(["--out", str(folder / f"images{seed}"), *sizes])
        data = DataConfig(images=str(folder / f"images{seed}"), latents=str(folder / f"latents{seed}"), image_size=8)
        assert encode_folder.encode(encode_folder.build_encoder(data))
    return {str(folder / "latents0"): 1.0, str(folder / "latents1"): 3.0}


def mixed_data(mixed: dict[str, float], **settings: Any) -> DataConfig:
    return DataConfig(**{"source": "shards", "image_size": 8, "mix": mixed, "bucket_block": 16, **settings})


def test_mixes_that_do_not_fit_together_are_refused(root: Path, mixed: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"data\.buckets is \[\] but data\.latents=.* was encoded with \['8x8'"):
        open_dataset(config_for(mixed_data({**mixed, str(root / "latents"): 1.0})))
    with pytest.raises(ConfigError, match=r"gives x the weight -1\.0: use more than 0"):
        mixed_data({"x": -1.0})
    with pytest.raises(ConfigError, match=r"are both set: name the folder within data\.mix"):
        mixed_data(mixed, latents="x")


def test_staged_shards_give_the_same_and_stay_within_bounds(root: Path, tmp_path: Path) -> None:
    plain = open_dataset(config_for(data_for(root)))
    sizes = [(root / "latents" / shard.file).stat().st_size for shard in read_dataset_file(root / "latents").shards]
    limit = 2.5 * max(sizes)
    dataset = open_dataset(config_for(data_for(root, stage_dir=str(tmp_path / "stage"), stage_gb=limit / 1e9)))
    order = np.random.default_rng(0).permutation(120).tolist()
    for number in order:
        assert torch.equal(dataset.read(number).latent, plain.read(number).latent)
        staged = list((tmp_path / "stage").rglob("*.safetensors"))
        assert 0 < sum(path.stat().st_size for path in staged) <= limit
    (folder,) = (tmp_path / "stage").iterdir()
    old = folder / ".x.safetensors.1-ab.tmp"
    old.write_bytes(b"left by a kill")
    os.utime(old, (0, 0))
    config = config_for(data_for(root, stage_dir=str(tmp_path / "stage"), stage_gb=limit / 1e9))
    open_dataset(config).read(0)
    for path in folder.glob("*.safetensors"):  # a copy that was damaged since is noticed
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DamagedShardError, match=r"stage/.*: delete it, it is a copy of .*/latents/00000"):
        open_dataset(config).read(0)
    assert not old.exists()
    with pytest.raises(ConfigError, match=r"data\.stage_gb is 1000000000\.0, but data\.stage_dir=.* GB free: lower it"):
        open_dataset(config_for(data_for(root, stage_dir=str(tmp_path / "stage"), stage_gb=1e9)))


@pytest.mark.slow
def test_buckets_train_expert_parallel_and_a_kill_while_prefetching_changes_nothing(
    root: Path, tmp_path: Path, launcher: Launcher
) -> None:
    settings = [
        "data.source=shards", f"data.latents={root / 'latents'}", "data.image_size=8",
        f"data.buckets=[{','.join(BUCKETS)}]", "data.bucket_block=12", "data.num_workers=2", "parallel.ep_size=2",
        "train.micro_batch_size=6", "train.max_steps=14", "train.checkpoint_every=4",
    ]  # fmt: skip
    command = ("-m", "trainer.train", "debug", *settings)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = launcher.run(*command, f"run_dir={whole}", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    process = launcher.start(*command, f"run_dir={killed}", processes=2)
    end = time.monotonic() + 120
    while not (killed / "checkpoints" / "latest").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = launcher.run(*command, f"run_dir={killed}", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [
        [(line["step"], line["loss"], line["grad_norm"]) for line in map(json.loads, text.splitlines())]
        for text in ((run / "metrics.jsonl").read_text() for run in (whole, killed))
    ]
    assert losses[0] == losses[1] and [step for step, *_ in losses[0]] == list(range(1, 15))
    shutil.rmtree(killed)
