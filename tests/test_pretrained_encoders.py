"""Encoders of other libraries, on tiny randomly initialised models saved in the libraries' own formats."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.networks.clip import load_clip
from trainer.config import ConfigError, DataConfig, TrainConfig
from trainer.data.dataset import open_dataset
from trainer.data.demo import scene_shards, scenes
from trainer.data.latents import encode_folder
from trainer.encoders.build import build_codec, build_text_encoder
from trainer.encoders.check import check
from trainer.encoders.pretrained import files_digest

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")

CAPTIONS = ["", "a cat on a blue background", "two dogs", "word " * 200, "two dogs"]


def tiny_autoencoder(name: str) -> Any:
    """A few thousand random weights; factors 4, 4 and 8."""
    torch.manual_seed(0)
    if name == "AutoencoderKL":
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
        widths = {"block_out_channels": (4, 8, 8), "norm_num_groups": 2, "latent_channels": 5}
        return diffusers.AutoencoderKL(**blocks, **widths, shift_factor=0.06, scaling_factor=1.5)
    if name == "AutoencoderDC":
        layers = {"encoder_layers_per_block": (1,) * 3, "decoder_layers_per_block": (1,) * 3}
        widths = {"encoder_block_out_channels": (8, 8, 16), "decoder_block_out_channels": (8, 8, 16)}
        scales = {"encoder_qkv_multiscales": ((),) * 3, "decoder_qkv_multiscales": ((),) * 3}
        return diffusers.AutoencoderDC(**layers, **widths, **scales, latent_channels=8, scaling_factor=0.4)
    widths = {"encoder_block_out_channels": (4,) * 4, "decoder_block_out_channels": (4,) * 4}
    return diffusers.AutoencoderTiny(**widths, latent_channels=7)


@pytest.mark.parametrize(
    ("name", "channels", "factor"), [("AutoencoderKL", 5, 4), ("AutoencoderDC", 8, 4), ("AutoencoderTiny", 7, 8)]
)
def test_diffusers_codec_equals_the_library(name: str, channels: int, factor: int, tmp_path: Path) -> None:
    model = tiny_autoencoder(name).eval()
    model.save_pretrained(tmp_path / "vae")
    codec = build_codec(f"diffusers:{tmp_path / 'vae'}")
    assert (codec.channels, codec.factor) == (channels, factor)
    assert (codec.shift, codec.scale) == {"AutoencoderKL": (0.06, 1.5), "AutoencoderDC": (0, 0.4)}.get(name, (0, 1))
    rgb_BCHW = torch.rand(2, 3, 16, 24) * 2 - 1
    mean, std = codec.posterior(rgb_BCHW)
    assert mean.shape == (2, channels, 16 // factor, 24 // factor)
    with torch.inference_mode():
        out = model.encode(rgb_BCHW)
        expected = {
            "AutoencoderKL": lambda: out.latent_dist.mean,
            "AutoencoderDC": lambda: out.latent,
            "AutoencoderTiny": lambda: out.latents,
        }[name]()
        torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(codec.encode(rgb_BCHW), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(codec.decode(mean), model.decode(mean).sample.clamp(-1, 1), atol=1e-5, rtol=1e-5)
    assert codec.has_std == (std is not None) == (name == "AutoencoderKL")
    if std is not None:
        torch.testing.assert_close(std, out.latent_dist.std, atol=1e-5, rtol=1e-5)
    whole = build_codec(f"diffusers:{tmp_path}")  # a pipeline's folder
    assert whole.fingerprint() == codec.fingerprint()
    assert f"{channels} channels, factor {factor}, digest {codec.fingerprint()}" in check(str(tmp_path))
    notes = tmp_path / "vae" / "config.json"
    notes.write_text(json.dumps({**json.loads(notes.read_text()), "_name_or_path": "elsewhere"}))
    assert build_codec(f"diffusers:{tmp_path}").fingerprint() == codec.fingerprint()
    notes.write_text(json.dumps({**json.loads(notes.read_text()), "scaling_factor": 3}))
    assert build_codec(f"diffusers:{tmp_path}").fingerprint() != codec.fingerprint()


def test_diffusers_errors_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            build_codec(f"diffusers:{tmp_path / 'vae'}").encode(torch.zeros(1, 3, 8, 8))
        assert "\n" not in str(caught.value) and str(caught.value).startswith("data.codec=diffusers:")

    refused("is no folder, copy the model to it")
    tiny_autoencoder("AutoencoderTiny").save_pretrained(tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    key = next(iter(whole))
    save_file({name: value for name, value in whole.items() if name != key}, weights)
    refused(f"lacks 1 weights, first {key}: copy it again")
    weights.write_bytes(weights.read_bytes()[:-5])
    refused("cannot be loaded, copy the folder again")
    weights.unlink()
    refused(r"holds no \.safetensors file")
    config = tmp_path / "vae" / "config.json"
    config.write_text('{"_class_name": "VQModel"}')
    refused("is a VQModel: use one of AutoencoderKL, AutoencoderDC, AutoencoderTiny")
    config.write_text("{")
    refused(r"config\.json is no JSON file")
    config.unlink()
    refused(r"config\.json is not there, copy the model's config\.json to it")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(r"needs the package diffusers: run pip install '\.\[encoders\]'")


TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 24, "heads": 3, "layers": 3},
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as on the model hub: open_clip_config.json and the weights of both towers."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(**{**TINY_CLIP, "quick_gelu": True})
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, folder / "model.pt")
    config = {"model_cfg": {**TINY_CLIP, "quick_gelu": True}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def test_open_clip_gives_the_penultimate_tokens_of_the_library(clip: Path) -> None:
    encoder = build_text_encoder(f"open_clip:{clip}")
    (clip / "open_clip_model.safetensors").symlink_to(clip / "model.safetensors")  # the name open_clip looks for
    model = open_clip.create_model(f"local-dir:{clip}", require_pretrained=True).eval()
    (clip / "open_clip_model.safetensors").unlink()
    ids = open_clip.get_tokenizer(f"local-dir:{clip}")(CAPTIONS)
    with torch.inference_mode():
        out = model.forward_intermediates(text=ids, text_indices=[-2], intermediates_only=True)
    features = encoder.encode(CAPTIONS)
    assert (encoder.dim, encoder.max_tokens) == (24, 20)
    lengths = (ids == ids.max()).int().argmax(1) + 1  # the end token has the largest number
    assert [len(feature) for feature in features] == lengths.tolist() and lengths.max() == 20
    for feature, full, length in zip(features, out["text_intermediates"][0], lengths, strict=True):
        torch.testing.assert_close(feature, full[:length], atol=1e-5, rtol=1e-5)
    assert encoder.encode([]) == []


def test_open_clip_takes_an_architecture_and_a_checkpoint(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny-test-clip.json").write_text(json.dumps({**TINY_CLIP, "quick_gelu": True}))
    open_clip.add_model_config(tmp_path / "tiny-test-clip.json")
    found = build_text_encoder(f"open_clip:tiny-test-clip:{clip / 'model.pt'}")
    for a, b in zip(found.encode(CAPTIONS), build_text_encoder(f"open_clip:{clip}").encode(CAPTIONS), strict=True):
        assert torch.equal(a, b)


def test_open_clip_takes_an_archive_as_openai_published_it(clip: Path, tmp_path: Path) -> None:
    """A TorchScript archive in half precision, with numbers beside the weights."""
    archive = torch.nn.Module()
    for name, value in load_file(clip / "model.safetensors").items():
        *path, last = name.split(".")
        owner = archive
        for part in path:
            if part not in dict(owner.named_children()):
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        owner.register_buffer(last, value.half())
    archive.register_buffer("context_length", torch.tensor(20))
    torch.jit.script(archive).save(tmp_path / "archive.pt")
    (tmp_path / "archived-clip.json").write_text(json.dumps({**TINY_CLIP, "quick_gelu": True}))
    open_clip.add_model_config(tmp_path / "archived-clip.json")
    found = build_text_encoder(f"open_clip:archived-clip:{tmp_path / 'archive.pt'}").encode(CAPTIONS)
    for a, b in zip(found, build_text_encoder(f"open_clip:{clip}").encode(CAPTIONS), strict=True):
        torch.testing.assert_close(a, b, atol=5e-3, rtol=5e-3)
    assert load_clip(f"archived-clip:{tmp_path / 'archive.pt'}").dim == 16


def test_open_clip_errors_are_one_sentence(clip: Path, tmp_path: Path) -> None:
    def refused(spec: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            build_text_encoder(f"open_clip:{spec}").encode(["a dog"])
        assert "\n" not in str(caught.value) and str(caught.value).startswith("data.text_encoder=open_clip:")

    refused(f"ViT-L-14:{tmp_path}/no.pt", r"no\.pt is not there, copy the weights of ViT-L-14 to it")
    refused(f"ViT-X:{tmp_path}/no.pt", r"open_clip knows no ViT-X, see open_clip\.list_models")
    refused(str(tmp_path), r"open_clip_config\.json is not there")
    refused(f"xlm-roberta-base-ViT-B-32:{clip / 'model.pt'}", "use an architecture with CLIP's own causal text tower")
    refused(f"ViT-S-32-alt:{clip / 'model.pt'}", "holds other weights than needed")
    shutil.copytree(clip, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"nothing")
    refused(str(tmp_path / "copy"), "holds other weights than needed")


def write_tokenizer(path: Path, captions: list[str]) -> None:
    """A small Unigram tokenizer as T5 has, trained on the captions."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(path))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "text_encoder_3"
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 60}
    config = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu")
    transformers.T5EncoderModel(config).save_pretrained(folder)
    (folder.parent / "tokenizer_3").mkdir()
    write_tokenizer(folder.parent / "tokenizer_3" / "tokenizer.json", CAPTIONS + ["a dog and a cat"] * 3)
    return folder


def test_t5_equals_the_library_padded_and_masked(t5: Path) -> None:
    encoder = build_text_encoder(f"t5@12:{t5}")
    assert (encoder.dim, encoder.max_tokens) == (16, 12)
    features = encoder.encode(CAPTIONS)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(t5.parent / "tokenizer_3" / "tokenizer.json"), pad_token="<pad>"
    )
    tokens = tokenizer(CAPTIONS, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    model = transformers.T5EncoderModel.from_pretrained(t5).eval()
    with torch.inference_mode():
        padded = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    lengths = tokens.attention_mask.sum(1).tolist()
    assert [len(feature) for feature in features] == lengths and lengths[0] == 1 and max(lengths) == 12
    for feature, full, length in zip(features, padded, lengths, strict=True):
        torch.testing.assert_close(feature, full[:length], atol=1e-5, rtol=1e-5)
    assert build_text_encoder(f"t5:{t5}").fingerprint() != encoder.fingerprint()
    assert check(str(t5))[1].startswith("16 values a token, at most 256 tokens, digest t5-")


def test_t5_errors_are_one_sentence(t5: Path, tmp_path: Path) -> None:
    def refused(spec: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            build_text_encoder(spec).encode(["a dog"])
        assert "\n" not in str(caught.value) and str(caught.value).startswith("data.text_encoder=t5")

    refused(f"t5:{tmp_path / 'none'}", r"config\.json is not there")
    copy = tmp_path / "copy"
    shutil.copytree(t5, copy)
    refused(f"t5:{copy}", r"tokenizer\.json is not there, copy the tokenizer\.json \(from spiece\.model: ")
    (copy / "tokenizer.json").write_text("{}")
    refused(f"t5:{copy}", r"is no tokenizer, copy it again")
    shutil.copy(t5.parent / "tokenizer_3" / "tokenizer.json", copy)
    (copy / "model.safetensors").write_bytes(b"nothing")
    refused(f"t5:{copy}", "cannot be loaded, copy the folder again")
    refused(f"t5@1:{copy}", "use 2 tokens or more")
    (copy / "config.json").write_text('{"model_type": "bert"}')
    refused(f"t5:{copy}", "is a bert model: name the folder of a T5 or UMT5 encoder")


def test_two_encoders_are_joined_token_by_token(clip: Path, t5: Path) -> None:
    spec = f"open_clip:{clip}+t5@12:{t5}"
    encoder = build_text_encoder(spec)
    first, second = build_text_encoder(f"open_clip:{clip}"), build_text_encoder(f"t5@12:{t5}")
    assert (encoder.dim, encoder.max_tokens) == (24, 32)
    parts = zip(encoder.encode(CAPTIONS), first.encode(CAPTIONS), second.encode(CAPTIONS), strict=True)
    for both, a, b in parts:
        assert torch.equal(both[: len(a)], a) and torch.equal(both[len(a) :, :16], b)
        assert len(both) == len(a) + len(b) and not both[len(a) :, 16:].any()
    swapped = build_text_encoder(f"t5@12:{t5}+open_clip:{clip}")
    assert swapped.fingerprint() != encoder.fingerprint()


def test_large_files_are_hashed_in_blocks(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    size = 1 << 27
    with path.open("wb") as file:
        file.truncate(size)
    before = files_digest([path])
    changes = {0: True, size - 1: True, 100_000: False}  # the last is between the first blocks
    for number, (position, seen) in enumerate(changes.items()):
        changed = tmp_path / str(number)
        with changed.open("wb") as file:
            file.truncate(size)
            file.seek(position)
            file.write(b"x")
        assert (files_digest([changed]) != before) == seen


def test_real_format_encoders_through_encode_and_loader(clip: Path, tmp_path: Path) -> None:
    tiny_autoencoder("AutoencoderKL").save_pretrained(tmp_path / "vae")
    scene_shards.main(["--out", str(tmp_path / "images"), "--num-images", "6", "--image-size", "16"])
    data = DataConfig(
        source="shards",
        images=str(tmp_path / "images"),
        latents=str(tmp_path / "latents"),
        image_size=16,
        codec=f"diffusers:{tmp_path / 'vae'}",
        text_encoder=f"open_clip:{clip}",
    )
    assert encode_folder.encode(encode_folder.build_encoder(data))
    dataset = open_dataset(TrainConfig(data=data))
    sample = dataset.read(0)
    drawn = scenes.training_scene(0, 0)
    rgb = torch.tensor(scenes.render(drawn, 16)).permute(2, 0, 1)[None].float() / 127.5 - 1
    torch.testing.assert_close(sample.latent, build_codec(data.codec).encode(rgb)[0], atol=2e-3, rtol=2e-3)
    expected = build_text_encoder(data.text_encoder).encode([drawn.caption])[0]
    torch.testing.assert_close(sample.text.float(), expected, atol=2e-3, rtol=2e-3)
