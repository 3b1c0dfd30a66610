"""The readers: the same global batches for any topology and after any chain of resumes, with exact values."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.config import ConfigError, DataConfig, TrainConfig, load_config
from trainer.data.dataset import open_dataset
from trainer.data.demo import scene_shards, scenes
from trainer.data.latents import encode_folder
from trainer.data.latents.format import signed_json
from trainer.data.latents.samples import Batch, LatentDataset, Sample
from trainer.data.loader import build_loader
from trainer.data.order import EpochOrder, SampleLayout
from trainer.data.position import DataState
from trainer.encoders.build import build_text_encoder
from trainer.randomness import keyed_generator

SHARDS = [5, 1, 9, 4, 7, 3]
START = DataState(seed=3, epoch=0, consumed=0, samples_seen=0)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 drawn scenes in four latent shards."""
    folder = tmp_path_factory.mktemp("data")
    scene_shards.main(["--out", str(folder / "images"), "--num-images", "26", "--shard-size", "7", "--image-size", "8"])
    data = DataConfig(images=str(folder / "images"), latents=str(folder / "latents"), image_size=8)
    assert encode_folder.encode(encode_folder.build_encoder(data))
    return folder / "latents"


def config_for(latents: Path | None, micro: int = 4, accumulation: int = 1, *overrides: str) -> TrainConfig:
    data = [f"data.latents={latents}", "data.source=shards", "data.image_size=8"] if latents else []
    batch = [f"train.micro_batch_size={micro}", f"train.gradient_accumulation_steps={accumulation}"]
    return load_config("debug", [*data, *batch, "data.shuffle_group=2", *overrides])


@dataclass(frozen=True, kw_only=True)
class Padded:
    """A batch, its text padded."""

    latent_BCHW: Tensor
    text_BLD: Tensor
    text_mask_BL: Tensor
    index_B: Tensor


def join(batches: Sequence[Batch | Padded]) -> Padded:
    names = [f.name for f in fields(Padded)]
    return Padded(**{name: torch.cat([getattr(batch, name) for batch in batches]) for name in names})


def equal(a: Padded, b: Padded) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in vars(a))


def global_batches(
    dataset: LatentDataset, config: TrainConfig, state: DataState, steps: int, world_size: int = 1
) -> list[Padded]:
    """What all ranks together train on, in the order accumulation step, rank, row."""
    ranks = [build_loader(dataset, config, rank=r, world_size=world_size, state=state) for r in range(world_size)]
    count = config.train.gradient_accumulation_steps
    return [join([next(rank) for _ in range(count) for rank in ranks]) for _ in range(steps)]


def test_epoch_order_is_a_permutation_that_stays_within_groups_of_shards() -> None:
    first = np.cumsum([0, *SHARDS])
    shard_of = np.repeat(np.arange(len(SHARDS)), SHARDS)
    seen = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        order = EpochOrder(SampleLayout.of_shards(SHARDS).buckets[0][0], seed, epoch, group_size=2)
        samples = [order[i] for i in range(first[-1])]
        assert sorted(samples) == list(range(first[-1]))
        assert [order[i] for i in reversed(range(first[-1]))] == samples[::-1]  # any position, in any order
        groups = [order.groups[g].tolist() for g in range(3)]
        assert sorted(shard for group in groups for shard in group) == list(range(len(SHARDS)))
        position = 0
        for group in groups:
            size = sum(SHARDS[s] for s in group)
            assert {int(shard_of[s]) for s in samples[position : position + size]} == set(group)
            position += size
        seen.append(samples)
    assert seen[0] != seen[1] and seen[0] != seen[2]


def test_global_batches_follow_the_epoch_order_and_drop_its_tail() -> None:
    dataset = open_dataset(config_for(None))
    config = config_for(None, 12, 1, "data.caption_dropout=0")
    batches = global_batches(dataset, config, START, steps=12)
    expected: list[int] = []
    for epoch in range(3):
        order = dataset.layout.order(3, epoch, group_size=2)
        expected += [order[i] for i in range(60)]  # 64 samples, 5 batches of 12
    whole = join(batches)
    assert whole.index_B.tolist() == list(range(144)) and whole.index_B.dtype == torch.int64
    for row, sample in enumerate(expected[:144]):
        found = dataset.read(sample)
        latent, text = found.latent, found.text
        assert torch.equal(whole.latent_BCHW[row], latent)
        assert torch.equal(whole.text_BLD[row, : len(text)], text)
        assert whole.text_mask_BL[row].tolist() == [i < len(text) for i in range(dataset.info.max_tokens)]
        assert not whole.text_BLD[row, len(text) :].any()


@pytest.mark.parametrize(
    ("world_size", "micro", "accumulation"), [(2, 4, 1), (4, 2, 1), (1, 4, 2), (2, 2, 2), (1, 1, 8), (8, 1, 1)]
)
def test_global_batches_are_the_same_for_any_topology(
    latents: Path, world_size: int, micro: int, accumulation: int
) -> None:
    alone = config_for(latents, 8)
    dataset = open_dataset(alone)
    expected = global_batches(dataset, alone, START, steps=7)
    config = config_for(latents, micro, accumulation)
    found = global_batches(dataset, config, START, 7, world_size)
    assert all(map(equal, found, expected))


def test_chained_resumes_continue_exactly_across_epochs_and_topologies(latents: Path) -> None:
    alone = config_for(latents, 8)
    dataset = open_dataset(alone)
    expected = global_batches(dataset, alone, START, steps=10)  # three steps an epoch
    state, found = START, []
    for steps, world_size, micro, accumulation in (
        (1, 2, 4, 1),
        (1, 4, 1, 2),
        (3, 1, 8, 1),
        (2, 2, 2, 2),
        (3, 8, 1, 1),
    ):
        config = config_for(latents, micro, accumulation)
        found += global_batches(open_dataset(config), config, state, steps, world_size)
        for _ in range(steps):
            state = state.advance(8, len(dataset), 8)
        state = DataState(**json.loads(json.dumps(asdict(state))))
    assert all(map(equal, found, expected)) and len(found) == 10
    assert state == DataState(seed=3, epoch=3, consumed=8, samples_seen=80)


def test_another_global_batch_size_in_mid_epoch_repeats_no_sample(latents: Path) -> None:
    dataset = open_dataset(config_for(latents))
    state, seen = START, []
    for size in (4, 4, 6, 2, 4):  # from 8 on to 12, a multiple of 6
        config = config_for(latents, size, 1)
        seen.append(global_batches(dataset, config, state, 1)[0].latent_BCHW)
        state = state.advance(size, len(dataset), size)
    assert (state.epoch, state.consumed, state.samples_seen) == (0, 24, 20)
    assert len(torch.cat(seen).flatten(1).unique(dim=0)) == 20


def test_workers_change_nothing_not_even_the_global_generator(latents: Path) -> None:
    config = config_for(latents, 2, 2)
    dataset = open_dataset(config)
    expected = global_batches(dataset, config, START, steps=8)
    before = torch.get_rng_state()
    found = global_batches(dataset, config_for(latents, 2, 2, "data.num_workers=2"), START, steps=8)
    assert all(map(equal, found, expected))
    assert torch.equal(torch.get_rng_state(), before)


class CountingDataset:
    """A data set that counts its reads."""

    def __init__(self, inner: LatentDataset) -> None:
        self.info, self.layout, self.inner = inner.info, inner.layout, inner
        self.empty_text, self.online_encoder = inner.empty_text, inner.online_encoder
        self.num_reads = 0

    def __len__(self) -> int:
        return len(self.inner)

    def read(self, sample: int) -> Sample:
        self.num_reads += 1
        return self.inner.read(sample)


def test_resume_reads_nothing_that_came_before(latents: Path) -> None:
    config = config_for(latents, 4)
    dataset = CountingDataset(open_dataset(config))
    state = DataState(seed=3, epoch=10**6, consumed=16, samples_seen=24 * 10**6 + 16)
    batch = next(build_loader(dataset, config, rank=1, world_size=2, state=state))
    assert dataset.num_reads == 4 and batch.index_B.tolist() == [24 * 10**6 + 16 + i for i in range(4, 8)]


def test_latents_are_normalised_and_text_is_the_encoders(latents: Path) -> None:
    config = config_for(latents, 26, 1, "data.caption_dropout=0")
    dataset = open_dataset(config)
    (batch,) = global_batches(dataset, config, START, steps=1)  # all samples
    assert (batch.latent_BCHW.dtype, batch.text_BLD.dtype) == (torch.float32, torch.float16)
    torch.testing.assert_close(batch.latent_BCHW.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(batch.latent_BCHW.std((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-4, rtol=0)
    order = dataset.layout.order(3, 0, group_size=2)
    features = build_text_encoder("minilm").encode([scenes.training_scene(0, order[i]).caption for i in range(26)])
    for row, feature in enumerate(features):
        real = batch.text_BLD[row][batch.text_mask_BL[row]].float()
        torch.testing.assert_close(real, feature, atol=2e-3, rtol=1e-3)


def test_whitening_keeps_the_total_and_equalises_channels_by_degree(latents: Path) -> None:
    spreads, prints = [], set()
    for whitening in (0.0, 0.5, 1.0):
        dataset = open_dataset(config_for(latents, 4, 1, f"data.whitening={whitening}"))
        info = dataset.info
        raw = torch.stack([dataset.read(i).latent for i in range(len(dataset))])
        normal = (raw - info.mean_C.view(1, -1, 1, 1)) / info.std_C.view(1, -1, 1, 1)
        assert normal.square().mean().item() == pytest.approx(1, rel=1e-3)
        channel = normal.square().mean((0, 2, 3)).sqrt()
        spreads.append(float(channel.max() / channel.min()))
        prints.add(info.fingerprint)
    assert spreads[2] == pytest.approx(1, abs=1e-3) and spreads[1] == pytest.approx(spreads[0] ** 0.5, rel=1e-3)
    assert len(prints) == 3
    with pytest.raises(ConfigError, match=r"data\.whitening is 2"):
        config_for(latents, 4, 1, "data.whitening=2")


def test_caption_dropout_is_keyed_by_the_sample_index(latents: Path) -> None:
    config = config_for(latents, 8, 1, "data.caption_dropout=0.3", "seed=5")
    dataset = open_dataset(config)
    batch = join(global_batches(dataset, config, START, steps=30))
    (empty,) = build_text_encoder("minilm").encode([""])
    dropped = batch.text_mask_BL.sum(1) == len(empty)  # no caption is as short
    expected = [float(torch.rand((), generator=keyed_generator(5, i, "caption"))) < 0.3 for i in range(240)]
    assert dropped.tolist() == expected and 0.2 < sum(expected) / 240 < 0.4
    rows = batch.text_BLD[dropped][:, : len(empty)].float()
    torch.testing.assert_close(rows, empty.expand_as(rows), atol=2e-3, rtol=1e-3)


def test_synthetic_data_needs_no_files() -> None:
    config = config_for(None, 8)
    dataset = open_dataset(config)
    info = dataset.info
    assert (len(dataset), info.channels, info.text_dim, info.max_tokens) == (64, 3, 32, 8)
    (batch,) = global_batches(dataset, config, START, steps=1)
    assert batch.latent_BCHW.shape == (8, 3, info.height, info.width) and batch.text_BLD.shape == (8, 8, 32)
    assert batch.text_mask_BL[:, 0].all() and not batch.text_mask_BL.all()


def test_a_data_set_smaller_than_a_global_batch_is_refused(latents: Path) -> None:
    config = config_for(latents, 7, 2)
    with pytest.raises(ConfigError, match="26 samples, less than one global batch of 28"):
        build_loader(open_dataset(config), config, rank=0, world_size=2, state=START)


@pytest.fixture
def broken(latents: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy that a test may damage."""
    shutil.copytree(latents, tmp_path / "copy")
    yield tmp_path / "copy"


def edit(path: Path, change: str, value: object) -> None:
    content = json.loads(path.read_text())
    *parents, last = change.split(".")
    inner = content
    for name in parents:
        inner = inner[int(name)] if name.isdigit() else inner[name]
    inner[last] = value
    del content["sha256"]
    path.write_bytes(signed_json(content))


def refused(latents: Path, message: str, *overrides: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_dataset(config_for(latents, 4, 1, *overrides))
    assert "\n" not in str(caught.value) and str(latents) in str(caught.value)


def test_incomplete_data_is_refused(broken: Path) -> None:
    whole = (broken / "00002.safetensors").read_bytes()
    (broken / "00002.safetensors").write_bytes(whole[:-1])
    refused(broken, rf"00002\.safetensors has {len(whole) - 1} bytes instead of {len(whole)}: delete it and ")
    (broken / "00002.safetensors").write_bytes(bytes(len(whole)))
    refused(broken, r"00002\.safetensors cannot be read, it is no safetensors file: delete it and run python -m")
    (broken / "00002.safetensors").unlink()
    refused(broken, r"shard 00002\.safetensors is missing: run python -m trainer\.data\.encode again")
    (broken / "dataset.json").unlink()
    refused(broken, r"has no dataset\.json: run python -m trainer\.data\.encode")
    refused(broken / "nothing", r"has no dataset\.json")


def test_wrong_counts_are_refused(broken: Path) -> None:
    edit(broken / "dataset.json", "shards.1.num_samples", 6)
    refused(broken, r"00001\.safetensors holds 7 samples instead of 6")


def test_a_shard_of_another_data_set_is_refused(broken: Path) -> None:
    path = broken / "00001.safetensors"
    save_file(load_file(path), path, metadata={"fingerprint": "0123456789abcdef"})
    edit(broken / "dataset.json", "shards.1.size", path.stat().st_size)
    refused(broken, r"00001\.safetensors has fingerprint 0123456789abcdef, the data set ")


def test_stale_data_is_refused(broken: Path) -> None:
    refused(broken, r"data\.image_size is 16 but .* was encoded with 8", "data.image_size=16")
    edit(broken / "dataset.json", "info.fingerprint", "0123456789abcdef")
    refused(broken, r"is stale: its fingerprint is 0123456789abcdef but data\.codec=pixel")
    edit(broken / "dataset.json", "format_version", 0)
    refused(broken, r"has format 0 where 2 is needed")


def test_files_are_closed_again_when_there_are_many(latents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.latents.shard_dataset._MAX_OPEN_FILES", 2)
    config = config_for(latents, 26, 1)
    dataset = open_dataset(config)
    assert len(list(islice(build_loader(dataset, config, rank=0, world_size=1, state=START), 2))) == 2
    assert len(dataset.open_files) <= 2  # type: ignore[attr-defined]
