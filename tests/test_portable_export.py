"""An export in other hands: encoders that lie elsewhere, no path of the machine it was made on, a card, a hub."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import numpy as np
import pytest
import torch
import xxhash
from checkpoint_samples import INFO, model_tensors, write_checkpoint
from safetensors.torch import save_file

from trainer import Pipeline
from trainer.checkpoint.__main__ import main
from trainer.checkpoint.export_reader import read_export_config
from trainer.checkpoint.init_from import check_init
from trainer.checkpoint.model_card import model_card
from trainer.checkpoint.portable import portable_config
from trainer.checkpoint.state import read_state
from trainer.config import ConfigError, TrainConfig, config_from_dict, config_to_dict, load_config
from trainer.data.latents.samples import LatentInfo
from trainer.diffusion.model import ModelShape
from trainer.encoders.minilm import PACKAGE
from trainer.encoders.places import paths_in, short_names, short_settings
from trainer.encoders.vae import SmallVae
from trainer.files import package_file, write_json
from trainer.telemetry.flops import training_flops

TINY = ["model.dim=16", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "moe.num_experts=4"]


def make_vae(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(SmallVae().state_dict(), path)


def make_run(folder: Path, codec: str, text_encoder: str) -> tuple[TrainConfig, LatentInfo]:
    info = replace(
        INFO, codec=codec, text_encoder=text_encoder, channels=8, mean=[0.1] * 8, std=[0.5] * 8, samples="abc"
    )
    home = folder.parent
    config = load_config("debug", [
        *TINY, f"run_dir={folder}", "data.source=shards", f"data.mix={{{home}/a/latents: 1, {home}/b/latents: 3}}",
        "data.bucket_block=8", f"data.images={home}/images", f"data.stage_dir={home}/stage", f"data.codec={codec}",
        f"data.text_encoder={text_encoder}", f"init_from={home}/exports/older", "diffusion.sampling_steps=2",
        "data.image_size=32", f"parallel.deepspeed_config={home}/zero.json",
    ])  # fmt: skip
    tensors = model_tensors(config, info, 2)
    write_checkpoint(folder, config, info, {"weight": tensors, "ema": tensors})
    return config, info


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A machine with a run, its own codec, and the text encoder of the demo."""
    make_vae(tmp_path / "home" / "models" / "mine.safetensors", 0)
    make_run(tmp_path / "home" / "mine", f"vae:{tmp_path}/home/models/mine.safetensors", "minilm@2")
    return tmp_path / "home"


def export(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["export", *map(str, arguments)])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_an_export_draws_where_nothing_of_its_origin_is_left(home: Path, tmp_path: Path) -> None:
    report = {
        "step": 3, "summary": "240 pictures", "headlines": {"fid": ["fid/fid 12.5", "fid: KID not computed, few"]},
        "sampling": {"steps": 2}, "results": {"fid": {"fid": 12.5, "card": {"reference": f"{home}/real/coco"}}},
    }  # fmt: skip
    write_json(home / "mine/eval/geneval/report.json", report)
    write_json(home / "mine/eval/step_00000002/report.json", {**report, "step": 2, "summary": "of another step"})
    (expected,) = Pipeline.load(home / "mine")("a cat")
    assert export(home / "mine", home / "out", "--dtype", "fp32") == 0
    fresh = tmp_path / "fresh"
    shutil.move(home / "out", fresh)
    shutil.rmtree(home)
    assert Pipeline.load(fresh)("a cat")[0].tobytes() == expected.tobytes()
    for path in fresh.rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), path

    saved = read_export_config(fresh, checksums=True)
    config = config_from_dict(saved.config)
    assert (config.run_dir, config.init_from) == ("mine", "older")
    assert (config.data.mix, config.data.images) == ({"a/latents": 1, "b/latents": 3}, "images")
    assert (saved.data_info.codec, config.data.codec) == ("vae:mine.safetensors", "vae:mine.safetensors")
    assert saved.encoders["text_encoder"].digest.endswith("-layer2")
    card = (fresh / "README.md").read_text()
    assert card.startswith("---\n") and "\npipeline_tag: text-to-image\n" in card and card.isascii()
    assert "| steps | 3, global batch 32, from older |" in card and "`a/latents (1), b/latents (3)`" in card
    assert f"digest `{saved.encoders['codec'].digest}`, in `encoders/mine.safetensors`" in card
    assert "- fid/fid 12.5\n- fid: KID not computed, few\n" in card and '"reference": "coco"' in card
    assert "another step" not in card and card.count("FILL IN") > 5

    (fresh / "README.md").write_text("mine, with a licence")  # the card is there to be edited
    shutil.move(fresh / "encoders", tmp_path / "others")
    with pytest.raises(
        ConfigError, match=r"needs vae:mine\.safetensors, but .*encoders/mine\.safetensors is not there"
    ):
        Pipeline.load(fresh)
    assert Pipeline.load(fresh, encoders=tmp_path / "others")("a cat")[0].tobytes() == expected.tobytes()
    make_vae(tmp_path / "others/mine.safetensors", 1)
    with pytest.raises(ConfigError, match=r"learned with vae:mine\.safetensors of digest vae-\w+, but the one that is"):
        Pipeline.load(fresh, encoders=str(tmp_path / "others"))


def test_the_card_counts_the_flops_of_masked_and_whole_pictures(home: Path) -> None:
    """Of ten steps four saw half of the 16 tokens; a global batch is of 100 pictures."""
    source = home / "mine/checkpoints/step_00000003"
    state = read_state(source)
    masked = {**state.config, "diffusion": {**state.config["diffusion"], "mask_ratio": 0.5, "unmask_at_step": 4}}
    state = replace(state, step=10, data=replace(state.data, samples_seen=1000), config=masked)
    config, shape = config_from_dict(masked), ModelShape.of(state.data_info)
    half, whole = (training_flops(config.model, config.moe, shape, tokens, 24) for tokens in (8, 16))
    card = model_card(source, state, {}, weights="ema", dtype="bf16")
    assert f"| training FLOPs | {400 * half + 600 * whole:.3g} (products" in card and "| samples seen | 1,000," in card


def test_plain_libraries_read_it_without_this_package(home: Path, tmp_path: Path) -> None:
    assert export(home / "mine", tmp_path / "out", "--dtype", "fp32", "--shard-gb", 2e-5) == 0
    program = (
        "import json, sys, numpy; from safetensors.numpy import load_file\n"
        "index = json.load(open('model.safetensors.index.json'))['weight_map']\n"
        "files = {name: load_file(name) for name in set(index.values())}\n"
        "tensors = {name: files[file][name] for name, file in index.items()}\n"
        "assert len(files) > 1 and sum(map(len, files.values())) == len(tensors)\n"
        "assert json.load(open('config.json'))['model_type'] == 'ec_dit'\n"
        "assert not {'torch', 'trainer', 'moe'} & set(sys.modules)\n"
        "print(repr(float(sum(numpy.abs(tensor.astype(float)).sum() for tensor in tensors.values()))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=tmp_path / "out", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    state = Pipeline.load(tmp_path / "out").model.state_dict()
    assert float(done.stdout) == pytest.approx(sum(float(value.double().abs().sum()) for value in state.values()))


def test_encoders_of_others_are_named_and_not_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A text encoder in a folder; nothing of it is computed here, so its weights may be anything."""
    t5 = tmp_path / "models" / "t5_xxl"
    write_json(t5 / "config.json", {"model_type": "t5", "d_model": 384})
    shutil.copy(package_file(PACKAGE, "model/tokenizer.json"), t5 / "tokenizer.json")
    (t5 / "model.safetensors").write_bytes(b"weights")
    make_vae(tmp_path / "models" / "mine.safetensors", 0)
    config, info = make_run(tmp_path / "run", f"vae:{tmp_path}/models/mine.safetensors", f"t5@20:{t5}")
    moved = shutil.move(tmp_path / "models", tmp_path / "moved")
    assert export(tmp_path / "run", tmp_path / "out") == 2
    assert "name by --encoders the folder that has it, or leave out by --no-digests" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert export(tmp_path / "run", tmp_path / "out", "--encoders", moved) == 0
    content = json.loads((tmp_path / "out" / "config.json").read_text())["encoders"]["text_encoder"]
    assert content["setting"] == "t5@20:t5_xxl" and content["places"] == ["encoders/t5_xxl"]
    assert [path.name for path in (tmp_path / "out" / "encoders").iterdir()] == ["mine.safetensors"]
    Pipeline.load(tmp_path / "out", encoders=moved)

    # A run goes on from it with the same encoder elsewhere, and with no other.
    elsewhere = replace(info, codec=f"vae:{moved}/mine.safetensors", text_encoder=f"t5@20:{moved}/t5_xxl")
    check_init(tmp_path / "out", config, elsewhere)
    (Path(moved) / "t5_xxl" / "model.safetensors").write_bytes(b"others")
    with pytest.raises(
        ConfigError, match=r"data.text_encoder is t5@20:t5_xxl of digest \S+ but init_from=.* with t5@20"
    ):
        check_init(tmp_path / "out", config, elsewhere)
    with pytest.raises(ConfigError, match="but the one that is here has"):
        Pipeline.load(tmp_path / "out", encoders=moved)
    shutil.copytree(tmp_path / "out" / "encoders", tmp_path / "models")
    assert export(tmp_path / "run", tmp_path / "blind", "--no-digests") == 0
    Pipeline.load(tmp_path / "blind", encoders=moved)


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["/a/b/vae", "x/t5/"]) == {"/a/b/vae": "vae", "x/t5/": "t5"}
    assert short_names(["/a/b/vae", "/c/vae", "/a/b/vae"]) == {"/a/b/vae": "b/vae", "/c/vae": "c/vae"}
    chain = "open_clip:ViT-L-14:/m/a+b/clip.pt+t5@120:/m/c+t5:/n/c+minilm@1"
    assert paths_in(chain) == ["/m/a+b/clip.pt", "/m/c", "/n/c"] and paths_in("minilm@1+pixel") == []
    short = short_settings("diffusers:/sd3/vae", chain)
    assert short == ["diffusers:sd3/vae", "open_clip:ViT-L-14:a+b/clip.pt+t5@120:m/c+t5:n/c+minilm@1"]
    assert short_settings(*short) == short and short_settings("pixel", "open_clip:/m/x") == ["pixel", "open_clip:x"]


def test_an_export_of_an_earlier_format_can_have_its_encoders_elsewhere(home: Path, tmp_path: Path) -> None:
    assert export(home / "mine", tmp_path / "out", "--dtype", "fp32") == 0
    path = tmp_path / "out" / "config.json"
    content: dict[str, Any] = json.loads(path.read_text())
    content["data_info"]["codec"] = content["config"]["data"]["codec"] = f"vae:{home}/models/mine.safetensors"
    del content["encoders"]
    manifest = json.loads((tmp_path / "out" / "MANIFEST.json").read_text())
    text = json.dumps({**content, "format": 2})
    path.write_text(text)
    manifest["files"]["config.json"] = {"size": len(text), "xxh3_128": xxhash.xxh3_128_hexdigest(text.encode())}
    (tmp_path / "out" / "MANIFEST.json").write_text(json.dumps(manifest))
    shutil.rmtree(tmp_path / "out" / "encoders")
    expected = np.asarray(Pipeline.load(tmp_path / "out")("a cat")[0])
    shutil.move(home / "models", tmp_path / "moved")
    assert np.array_equal(
        np.asarray(Pipeline.load(tmp_path / "out", encoders=tmp_path / "moved")("a cat")[0]), expected
    )


class RecordingHub:
    """In place of the hub's client, which would need its server."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append((repo_id, options))

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> str:
        if repo_id == "me/full":
            raise RuntimeError("413 Payload too large\nmore")
        self.calls.append((repo_id, {"files": sorted(path.name for path in Path(folder_path).iterdir())}))
        return f"https://hub/{repo_id}"


def test_it_is_pushed_with_the_hubs_own_client(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", RecordingHub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for repo, words in (("mine", "is no name of a repository: use OWNER/NAME"), ("me/mine", "needs a login: run hf")):
        assert export(home / "mine", tmp_path / "out", "--push", repo) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "not a real one")
    assert export(home / "mine", tmp_path / "out", "--push", "me/mine") == 0
    assert "https://hub/me/mine: private if it is new" in capsys.readouterr().out
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {"README.md", "config.json", "encoders", "model.safetensors.index.json"} < set(files)
    assert RecordingHub.calls == [("me/mine", {"private": True, "exist_ok": True}), ("me/mine", {"files": files})]
    assert export(home / "mine", tmp_path / "two", "--push", "me/full") == 2
    error = capsys.readouterr().err
    assert re.search(r"failed \(413 Payload too large\): the export is in .*two, so try again by hf upload", error)
    assert error.count("\n") == 1 and (tmp_path / "two" / "config.json").is_file()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert export(home / "mine", tmp_path / "three", "--push", "me/mine") == 2
    assert "needs the package huggingface_hub: run pip install" in capsys.readouterr().err


def test_an_export_names_no_place_that_a_run_was_logged_to() -> None:
    config = config_to_dict(load_config("debug", ["train.wandb=team/a", "train.mlflow=http://host:5000"]))
    assert {key: portable_config(config)["train"][key] for key in ("wandb", "mlflow")} == {"wandb": "", "mlflow": ""}
    assert config["train"]["wandb"] == "team/a"
