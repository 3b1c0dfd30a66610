"""Captions packed, stored in 8 bits and padded again: against padding one by one, and against the error's bound."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.config import ConfigError, DataConfig, TrainConfig, TrainLoopConfig
from trainer.data import inspect
from trainer.data.dataset import open_dataset
from trainer.data.demo import scene_shards, scenes
from trainer.data.latents.encode_folder import build_encoder, encode
from trainer.data.latents.packed_text import pack_text, relative_errors, restored, stored_width, to_int8
from trainer.data.latents.samples import pad_text
from trainer.data.latents.shard_file import DamagedShardError
from trainer.data.loader import build_loader
from trainer.data.position import DataState
from trainer.encoders.build import build_text_encoder

NUM_IMAGES = 8


def captions(*lengths: int, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, 12, generator=generator).to(dtype) for length in lengths]


@pytest.mark.parametrize(
    ("lengths", "dtype"), [((3, 7, 1, 7), torch.float16), ((2, 0, 11), torch.float32), ((0, 0), torch.float16)]
)
def test_packed_captions_are_those_padded_one_by_one(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens = captions(*lengths, dtype=dtype)
    expected_BLD, expected_mask_BL = pad_text(tokens, 8, dtype)
    packed = pack_text(tokens, 8)
    assert packed.token_TR.shape == (sum(lengths) + 1, 12), "only one token of padding is sent"
    for found in (packed, packed.each(Tensor.clone)):
        assert torch.equal(found.padded_BLD(), expected_BLD) and found.padded_BLD().dtype == dtype
        assert torch.equal(found.mask_BL(), expected_mask_BL)


def test_captions_of_two_precisions_become_fp32() -> None:
    tokens = [*captions(2), *captions(3, dtype=torch.float32)]
    assert torch.equal(pack_text(tokens, 4).padded_BLD(), pad_text(tokens, 4)[0])


@pytest.mark.parametrize("dim", [48, 128, 300])
def test_8_bits_are_off_by_half_a_step_at_most(dim: int) -> None:
    text_TD = torch.randn(64, dim, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 4, 64)[:, None]
    text_TD[3] = 0
    text_TD[5, 7] = 40 * text_TD[5].abs().max()
    row_TR = to_int8(text_TD)
    assert (row_TR.shape, row_TR.dtype) == ((64, stored_width(dim, "int8")), torch.int8)
    steps = [part.abs().amax(1, keepdim=True).expand_as(part) / 127 for part in text_TD.double().split(128, dim=1)]
    step_TD = torch.cat(steps, dim=1)
    value_TD = row_TR[:, :dim].double() * step_TD
    assert ((value_TD - text_TD).abs() <= 0.5001 * step_TD).all() and row_TR[:, :dim].abs().amax(1)[5] == 127
    found = restored(row_TR)
    assert found.dtype == torch.float16 and not found[3].any()
    torch.testing.assert_close(found.double(), value_TD, rtol=2**-10, atol=2**-24)
    error_T = relative_errors(text_TD, row_TR)[20:]  # tokens of usual size: below, fp16 is the coarser
    expected = (value_TD - text_TD).norm(dim=1)[20:] / text_TD.double().norm(dim=1)[20:]
    torch.testing.assert_close(error_T, expected, rtol=0.05, atol=0)
    packed = pack_text(list(row_TR.split([10, 30, 24])), 32)
    assert torch.equal(packed.padded_BLD(), pad_text(found.split([10, 30, 24]), 32, torch.float16)[0])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same drawn scenes with their captions in fp16 and in int8."""
    folder = tmp_path_factory.mktemp("text")
    sizes = ["--num-images", str(NUM_IMAGES), "--shard-size", "4", "--image-size", "8"]
    scene_shards.main(["--out", str(folder / "images"), *sizes])
    for text_dtype in ("fp16", "int8"):
        assert encode(build_encoder(data_of(folder, text_dtype)))
    return folder


def data_of(root: Path, text_dtype: Any, **settings: Any) -> DataConfig:
    paths = {"images": str(root / "images"), "latents": str(root / text_dtype)}
    return replace(DataConfig(**paths, source="shards", image_size=8, text_dtype=text_dtype), **settings)


def test_batches_of_both_differ_by_what_8_bits_lose(root: Path) -> None:
    found = []
    for text_dtype in ("fp16", "int8"):
        data = data_of(root, text_dtype, caption_dropout=0.5)
        config = TrainConfig(data=data, train=TrainLoopConfig(micro_batch_size=NUM_IMAGES))
        dataset, start = open_dataset(config), DataState(seed=0, epoch=0, consumed=0, samples_seen=0)
        found.append(next(build_loader(dataset, config, rank=0, world_size=1, state=start)))
    wide, narrow = found
    assert torch.equal(wide.latent_BCHW, narrow.latent_BCHW) and torch.equal(wide.text_mask_BL, narrow.text_mask_BL)
    mask_BL, sizes = wide.text_mask_BL, [batch.text.token_TR.nbytes for batch in (wide, narrow)]
    assert sizes[1] == sizes[0] * (384 + 12) / (2 * 384)
    assert narrow.text_BLD.dtype == torch.float16 and not narrow.text_BLD[~mask_BL].any()
    error = (narrow.text_BLD - wide.text_BLD)[mask_BL].float().norm(dim=1) / wide.text_BLD[mask_BL].float().norm(dim=1)
    assert 0.001 < error.max() < 0.03


def scene_of(number: int) -> scenes.Scene:
    return scenes.training_scene(0, number)


def test_the_description_says_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect.main([str(root / "int8"), "--num-samples", "0"])
    printed = capsys.readouterr().out
    text, bytes_ = (load_file(root / "int8" / "00000.safetensors")[name] for name in ("text", "text_check"))
    assert text.dtype == torch.int8 and text.shape[1] == 396 and len(bytes_) <= 4
    worst = float(printed.partition("stored in int8 with an error of at most ")[2].partition("%")[0])
    tokens = build_text_encoder("minilm").encode([scene.caption for scene in map(scene_of, range(NUM_IMAGES))])
    assert worst == pytest.approx(100 * max(float(relative_errors(t, to_int8(t)).max()) for t in tokens), rel=0.01)
    inspect.main([str(root / "fp16"), "--num-samples", "0"])
    assert "int8" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: data_of(root, "int8", latents=f"{root}/fp16"), "data.text_dtype is int8 but .* with fp16"),
        (lambda root: data_of(root, "fp16", latents=f"{root}/int8"), "data.text_dtype is fp16 but .* with int8"),
        (
            lambda root: data_of(root, "int8", text="online"),
            "data.text_dtype=int8 is about stored captions, but data.t",
        ),
    ],
)
def test_what_does_not_fit_is_refused(root: Path, change: Callable[[Path], DataConfig], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_dataset(TrainConfig(data=change(root)))


def test_both_cannot_share_a_folder_or_a_run(root: Path) -> None:
    with pytest.raises(ConfigError, match="holds shards made with other encoders or settings"):
        encode(build_encoder(data_of(root, "int8", latents=f"{root}/fp16")))
    prints = {open_dataset(TrainConfig(data=data_of(root, name))).info.fingerprint for name in ("fp16", "int8")}
    assert len(prints) == 2


def test_a_damaged_scale_is_found(root: Path, tmp_path: Path) -> None:
    data = data_of(root, "int8", latents=str(tmp_path / "latents"))
    assert encode(build_encoder(data))
    dataset = open_dataset(TrainConfig(data=data))
    path = tmp_path / "latents" / "00001.safetensors"
    content = bytearray(path.read_bytes())
    scale = content.index(load_file(path)["text"][0].numpy().tobytes()) + 390
    content[scale] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedShardError, match=r"00001\.safetensors has a damaged caption of sample"):
        [dataset.read(number) for number in range(NUM_IMAGES)]
