"""Damaged data is an error that names the file, or harmless: never silence, never a hang."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.config import ConfigError, DataConfig, TrainConfig
from trainer.data.dataset import open_dataset
from trainer.data.demo import scene_shards
from trainer.data.latents import encode_folder
from trainer.data.latents.format import signed_json
from trainer.data.latents.shard_file import DamagedShardError

NUM_IMAGES, SHARD_SIZE = 12, 5
SHARD, OTHER = "00001.safetensors", "00000.safetensors"


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve drawn scenes in three shards."""
    folder = tmp_path_factory.mktemp("data")
    sizes = ["--num-images", str(NUM_IMAGES), "--shard-size", str(SHARD_SIZE), "--image-size", "8"]
    scene_shards.main(["--out", str(folder / "images"), *sizes])
    assert encode_folder.encode(encode_folder.build_encoder(data_of(folder / "latents", str(folder / "images"))))
    return folder / "latents"


def data_of(latents: Path, images: str = "") -> DataConfig:
    return DataConfig(source="shards", images=images, latents=str(latents), image_size=8, codec="dct")


def everything(latents: Path) -> list[torch.Tensor]:
    """All that a run can read."""
    dataset = open_dataset(TrainConfig(data=data_of(latents)))
    samples = [dataset.read(number) for number in range(len(dataset))]
    found = [tensor for sample in samples for tensor in (sample.latent, sample.text)]
    return [tensor for tensor in (*found, dataset.empty_text, dataset.info.mean_C) if isinstance(tensor, torch.Tensor)]


def flip(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return path.name


def cut(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])
    return path.name


def cut_and_fill(path: Path, rng: random.Random) -> str:
    """As a file system does that lost its last writes: the size is right, the end is zeros."""
    content = path.read_bytes()
    size = rng.randrange(len(content) // 2, len(content) - 64)
    path.write_bytes(content[:size] + bytes(len(content) - size))
    return path.name


def overwrite_block(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content) - 16)
    content[start : start + 16] = rng.randbytes(16)
    path.write_bytes(content)
    return path.name


def append(path: Path, rng: random.Random) -> str:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 64)))
    return path.name


def other_dtype(path: Path, rng: random.Random) -> str:
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensors[name] = tensors[name].to(torch.bfloat16 if tensors[name].is_floating_point() else torch.int16)
    save_file(tensors, path, metadata={"fingerprint": fingerprint(path.parent)})
    return resized(path)


def other_fingerprint(path: Path, rng: random.Random) -> str:
    save_file(load_file(path), path, metadata={"fingerprint": f"{rng.getrandbits(64):016x}"})
    return path.name


def other_shape(path: Path, rng: random.Random) -> str:
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensors[name] = tensors[name][: rng.randrange(len(tensors[name]))].contiguous()
    save_file(tensors, path, metadata={"fingerprint": fingerprint(path.parent)})
    return resized(path)


def lost_tensor(path: Path, rng: random.Random) -> str:
    tensors = load_file(path)
    tensors.pop(rng.choice(sorted(tensors)))
    save_file(tensors, path, metadata={"fingerprint": fingerprint(path.parent)})
    return resized(path)


def repeated_name(path: Path, rng: random.Random) -> str:
    """The header names a tensor twice; parsers take the last."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    name = rng.choice(["latent", "text", "caption_id"])
    again = json.dumps({name: json.loads(header)[rng.choice(["latent", "text", "caption_id"])]})[1:-1].encode()
    header = header[:-1] + b", " + again + b"}"
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    return resized(path)


def swapped(path: Path, rng: random.Random) -> str:
    shutil.copy(path.with_name(OTHER), path)
    return resized(path)


def repeated_shard(path: Path, rng: random.Random) -> str:
    """dataset.json names a shard twice, in the place of another."""
    content = json.loads((path.parent / "dataset.json").read_text())
    content["shards"][0] = content["shards"][1]
    sign(path.parent, content)
    return "dataset.json"


def fingerprint(latents: Path) -> str:
    found: str = json.loads((latents / "dataset.json").read_text())["info"]["fingerprint"]
    return found


def sign(latents: Path, content: dict[str, object]) -> None:
    content.pop("sha256")
    (latents / "dataset.json").write_bytes(signed_json(content))


def resized(path: Path) -> str:
    """Make dataset.json agree with the file's size, so that a deeper check has to find the damage."""
    content = json.loads((path.parent / "dataset.json").read_text())
    content["shards"][1]["size"] = path.stat().st_size
    sign(path.parent, content)
    return path.name


IN_SHARD: list[Callable[[Path, random.Random], str]] = [
    flip, flip, flip, cut, cut_and_fill, overwrite_block, append, other_dtype, other_fingerprint, other_shape,
    lost_tensor, repeated_name, swapped, repeated_shard,
]  # fmt: skip


@pytest.mark.slow
def test_300_random_corruptions_are_found_or_harmless(latents: Path, tmp_path: Path) -> None:
    expected = everything(latents)
    outcomes: Counter[str] = Counter()
    for seed in range(300):
        rng = random.Random(seed)
        copy = tmp_path / str(seed)
        shutil.copytree(latents, copy)
        if seed < 240:
            named = IN_SHARD[seed % len(IN_SHARD)](copy / SHARD, rng)
        else:
            target = copy / rng.choice(["dataset.json", "empty.safetensors", "00001.samples.json", "00001.json"])
            named = rng.choice([flip, cut, overwrite_block])(target, rng)
        try:
            found = everything(copy)
        except (ConfigError, DamagedShardError) as error:
            assert named in str(error) and "\n" not in str(error), (seed, named, error)
            outcomes["error"] += 1
        else:
            assert len(found) == len(expected) and all(map(torch.equal, found, expected)), (seed, named)
            outcomes["harmless"] += 1
        shutil.rmtree(copy)
    # Sidecars and lists of samples are not read in training, and a flipped bit in JSON may be white space.
    assert outcomes.total() == 300 and 20 < outcomes["harmless"] < 60, outcomes


def test_damage_while_reading_names_file_and_key(latents: Path, tmp_path: Path) -> None:
    shutil.copytree(latents, tmp_path / "copy")
    dataset = open_dataset(TrainConfig(data=data_of(tmp_path / "copy")))
    path = tmp_path / "copy" / SHARD
    content = bytearray(path.read_bytes())
    tensors = load_file(path)
    place = content.index(tensors["latent"][3].numpy().tobytes())
    content[place + 7] ^= 4
    path.write_bytes(content)  # same file: the shard is open already
    dataset.read(7)
    with pytest.raises(DamagedShardError, match=r"00001\.safetensors has a damaged latent of sample 000010003: delete"):
        dataset.read(8)
    (tmp_path / "copy" / "00001.samples.json").unlink()
    with pytest.raises(DamagedShardError, match=r"damaged latent of sample in row 3"):
        dataset.read(8)
    with path.open("r+b") as file:
        file.truncate(place)
    with pytest.raises(DamagedShardError, match=r"00001\.safetensors ends too early"):
        dataset.read(8)


def test_shards_without_checks_can_still_be_read(latents: Path, tmp_path: Path) -> None:
    """Format 1 had neither hashes nor the newer settings."""
    expected = everything(latents)
    copy = tmp_path / "copy"
    shutil.copytree(latents, copy)
    content = json.loads((copy / "dataset.json").read_text())
    for shard in content["shards"]:
        path = copy / shard["file"]
        tensors = {name: value for name, value in load_file(path).items() if not name.endswith("_check")}
        save_file(tensors, path, metadata={"fingerprint": fingerprint(copy)})
        shard["size"] = path.stat().st_size
        del shard["index_sha256"]
    content["format_version"] = 1
    for old in ("empty_sha256", "sha256"):
        del content[old]
    for new in ("latent_std", "text", "text_dtype"):
        del content["settings"][new]
    for new in ("codec_shift", "codec_scale"):
        del content["info"][new]
    (copy / "dataset.json").write_text(json.dumps(content))
    assert all(map(torch.equal, everything(copy), expected))
