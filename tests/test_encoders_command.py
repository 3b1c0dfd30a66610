"""`trainer.encoders list` and `check`: what is known, and whether an encoder's files are right before they are used."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainer.encoders import build, catalog
from trainer.encoders.__main__ import main
from trainer.encoders.check import setting_of
from trainer.encoders.vae import SmallVae


def test_known_encoders_are_settings_that_the_registry_reads(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    printed = capsys.readouterr().out
    for known, registered in ((catalog.CODECS, build.CODECS), (catalog.TEXT_ENCODERS, build.TEXT_ENCODERS)):
        for encoder in known:
            setting = encoder.setting.split(",")[0]
            assert any(re.fullmatch(entry.pattern, setting) for entry in registered), setting
            assert encoder.setting in printed and encoder.licence in printed
            folder = setting.rpartition(":")[2]
            assert "--local-dir" not in encoder.fetch or folder.startswith(encoder.fetch.split()[-1])


def test_check_tries_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def check(encoder: str) -> str:
        main(["check", encoder])
        return capsys.readouterr().out

    assert check("dct").startswith("data.codec=dct\n16 channels, factor 4, digest dct-")
    found = check("minilm@2")
    assert (
        "384 values a token, at most 64 tokens, digest minilm-" in found
        and "has 8 tokens, the empty caption 2" in found
    )
    weights = SmallVae().state_dict()
    save_file(weights, tmp_path / "vae.safetensors")
    assert float(re.findall(r"PSNR of ([\d.]+) dB", check(f"vae:{tmp_path}/vae.safetensors"))[0]) < 25, "not trained"
    assert re.findall(r"PSNR of ([\d.]+) dB", check("pixel")) == ["120.0"]

    save_file(
        {name: torch.full_like(value, torch.nan) for name, value in weights.items()}, tmp_path / "nan.safetensors"
    )
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    for arguments, words in (
        ([f"vae:{tmp_path}/nan.safetensors"], "gives values that are not finite: copy its weights again"),
        ([f"vae:{tmp_path}/gone.safetensors"], "names a file that is not there"),
        ([str(tmp_path / "bert")], "has a bert model, which is no codec or text encoder known here"),
        ([str(tmp_path)], "config.json is not there, copy the model's config.json, or open_clip_config.json to it"),
        (["nowhere"], "nowhere is no folder, nor a setting of data.codec or data.text_encoder: name one of these"),
        ([], "check needs an encoder: name a folder, or a setting such as"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["check", *arguments])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "content", "kind"),
    [
        ("config.json", {"_class_name": "AutoencoderKL"}, "diffusers"),
        ("vae/config.json", {"_class_name": "AutoencoderDC"}, "diffusers"),
        ("config.json", {"model_type": "umt5"}, "t5"),
        ("open_clip_config.json", {}, "open_clip"),
    ],
)
def test_a_folder_is_known_by_what_lies_in_it(file: str, content: dict[str, str], kind: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(json.dumps(content))
    assert (
        setting_of(str(tmp_path)) == f"{kind}:{tmp_path}" and setting_of(f"{kind}:{tmp_path}") == f"{kind}:{tmp_path}"
    )
