"""Pictures, prompts and results as people have them: read right, or refused in a sentence."""

import io
import os
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eval import coco, report, run, score, watch
from eval.files import training_records
from eval.pages.sections import _thumbnail
from eval.pictures.image_files import folder_files, left_out, read_picture
from eval.pictures.prompt_files import read_prompts
from eval.pictures.protocol import sampling_card
from eval.suites import reference_statistics
from trainer.config import ConfigError, load_config
from trainer.data.images.decode import BadPictureError, read_rgb

INPUTS = Path(__file__).parent / "inputs"
BAD_PROMPTS = tomllib.loads((INPUTS / "prompts.toml").read_text())["refused"]
RAMP = np.arange(0, 256, dtype=np.uint8).reshape(8, 32)


def upright(value: int) -> tuple[Image.Image, Image.Exif]:
    """A picture and the EXIF data that turn it."""
    tagged = Image.Exif()
    tagged[0x0112] = value
    return Image.fromarray(RAMP).convert("RGB"), tagged


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "avif", "gif", "jp2"])
def test_scores_read_pictures_as_training_does(suffix: str, tmp_path: Path) -> None:
    exact = suffix not in ("webp", "avif", "jp2")
    wide = Image.fromarray(RAMP).convert("RGB")
    path = tmp_path / f"a.{suffix}"
    wide.save(path, **({} if exact else {"quality": 100}))  # type: ignore[arg-type]
    picture = read_picture(path)
    assert picture.shape == (8, 32, 3)
    assert np.abs(picture[..., 0].numpy().astype(int) - RAMP).max() <= (0 if exact else 12)
    assert np.array_equal(picture.numpy(), np.asarray(read_rgb(path.read_bytes())))


def test_deep_clear_and_turned_pictures_are_scored_as_they_look(tmp_path: Path) -> None:
    deep, clear, turned = (tmp_path / name for name in ("deep.png", "clear.png", "turned.jpg"))
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(deep)
    assert read_picture(deep)[..., 1].float().mean() == pytest.approx(RAMP.mean())
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(clear)
    assert bool((read_picture(clear) == 255).all())
    picture, tagged = upright(6)
    picture.save(turned, exif=tagged, quality=100)
    assert read_picture(turned).shape == (32, 8, 3) and _thumbnail(turned)[1] == (8, 32)
    assert int(read_picture(turned)[0, -1, 0]) < 8  # a quarter turn to the right: the first pixel is top right


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged tags
@pytest.mark.parametrize("suffix", ["png", "jpeg", "tiff", "webp", "avif", "gif", "bmp", "tga", "dds", "psd", "ico"])
def test_damaged_pictures_of_any_kind_are_one_error(suffix: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(RAMP).convert("RGB").save(buffer, "png" if suffix == "psd" else suffix)
    content = bytearray(buffer.getvalue())
    draw = np.random.default_rng(0)
    for number in range(40):
        changed = content.copy()
        for place in draw.integers(0, len(changed), 6):
            changed[place] = draw.integers(256)
        cut = bytes(changed[: draw.integers(1, len(changed))] if number % 2 else changed)
        try:
            assert read_rgb(cut).mode == "RGB"
        except BadPictureError as error:
            assert str(error)
    (tmp_path / f"a.{suffix}").write_bytes(b"\0" * 40)
    with pytest.raises(ConfigError, match=rf"picture .*a\.{suffix} cannot be read \(.+\): delete it"):
        read_picture(tmp_path / f"a.{suffix}")


def test_a_folder_is_read_whole_and_what_is_left_out_is_named(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "pictures"
    for path in (elsewhere, folder / "b"):
        path.mkdir(parents=True)
    for name in ("a.TIF", "b/c.gif", "b/d.avif", "../elsewhere/e.jfif", "b/f.png"):
        Image.fromarray(RAMP).convert("RGB").save(folder / name, "png")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "g.png").symlink_to(elsewhere / "e.jfif")
    for name in ("captions.txt", "h.heic", "b/i.HEIC", "plain", ".hidden.png"):
        (folder / name).touch()
    names = [path.relative_to(folder).as_posix() for path in folder_files(folder)]
    assert names == ["a.TIF", "b/c.gif", "b/d.avif", "b/f.png", "g.png", "linked/e.jfif"]
    (said,) = left_out(folder)
    assert said.endswith("no pictures by their suffixes: 2 .heic, 1 .txt, 1 no suffix.")
    assert left_out(folder / "b" / "..") and not left_out(elsewhere)
    (folder / "b" / "up").symlink_to(folder)
    with pytest.raises(ConfigError, match="b/up is a link to a folder that it lies in"):
        folder_files(folder)
    (folder / "b" / "up").unlink()
    if os.geteuid():
        (folder / "b").chmod(0)
        with pytest.raises(ConfigError, match="b cannot be listed"):
            folder_files(folder)
        (folder / "b").chmod(0o700)


def test_a_single_colour_is_read_as_it_is(tmp_path: Path) -> None:
    Image.new("P", (3, 2), 0).save(tmp_path / "a.png")
    assert torch.equal(read_picture(tmp_path / "a.png"), torch.zeros(2, 3, 3, dtype=torch.uint8))


@pytest.mark.parametrize("case", BAD_PROMPTS, ids=lambda case: case["file"])
def test_bad_prompt_files_are_one_sentence(case: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / case["file"]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(case["content"].encode(case.get("encoding", "utf-8")))
    with pytest.raises(ConfigError) as refusal:
        read_prompts(str(path if path.parent == tmp_path else path.parent))
    assert case["says"] in str(refusal.value) and "\n" not in str(refusal.value)


def test_prompts_that_cannot_be_had_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text(f"prompt\n{'a' * 131_073}\n")
    for spec, message in (
        (str(tmp_path / "long.csv"), r"line 2 ends no row of a table \(field larger than field limit"),
        (str(tmp_path / "absent.txt"), "is not a file"),
        (str(tmp_path), "is empty: give at least one"),
        ("geneval:x", "the seed must be a number"),
        ("geneval:\u00b2", "the seed must be a number"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_prompts(spec)


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.jsonl"])
def test_marks_and_rare_line_breaks_do_not_change_prompts(name: str, tmp_path: Path) -> None:
    texts = ["a cat\u2028on a mat", "caf\u00e9\u0085\U0001f600", "\u732b"]
    header, row = {"txt": ("", "{}"), "jsonl": ("", '{{"prompt": "{}"}}')}.get(name[2:], ("prompt\n", "{}"))
    path = tmp_path / name
    path.write_bytes((header + "".join(row.format(text) + "\r\n" for text in texts)).encode("utf-8-sig"))
    assert [prompt.text for prompt in read_prompts(str(path))] == texts


@pytest.mark.parametrize(
    "line",
    ["null", "[]", "3", '{"loss": 1}', '{"step": null}', '{"step": 2, "loss": null}', '{"step": 2, "loss": "x"}'],
)
def test_damaged_metrics_are_one_sentence(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 0.5}}\n{line}\n{{"step": 3')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl has a damaged line .*: delete it"):
        training_records(tmp_path)
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 3')
    assert [record["step"] for record in training_records(tmp_path)] == [1]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        training_records(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "null", "[]", "{}", '{"run": "a", "step": 1, "results": null}', '{"run": "a", "step": "x", "results": {}}',
     '{"run": "a", "step": null, "results": {}}', '{"run": "a", "step": 1, "results": {"fid": [1]}}',
     '{"run": "a", "step": 1, "results": {"fid": {"card": 3}}}'],
)  # fmt: skip
def test_damaged_reports_are_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ConfigError, match=r"report\.json is no report of eval\.run"):
        report.read_scores(tmp_path)


def test_results_cannot_go_where_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "eval").touch()
    file, folder, other = (str(tmp_path / name) for name in ("file", "run", "run/eval"))
    for main, argv, says in (
        (score.main, [folder, "--suite", "clip", "--out", file], f"--out {file}: {file} is not a folder"),
        (score.main, [folder, "--suite", "clip", "--out", f"{file}/a/b"], f"{file} is not a folder"),
        (run.main, [folder, "--prompts", "demo"], f"{other}: {other} is not a folder"),
        (watch.main, [folder], f"{other}/watch: {other} is not a folder"),
        (report.main, ["compare", folder, folder, "--out", folder], f"--out {folder} is a folder: name a file"),
        (coco.main, ["list", file, "--out", folder], f"--out {folder} is a folder: name a file"),
        (coco.main, ["pictures", file, folder, "--out", file], f"--out {file}: {file} is not a folder"),
        (reference_statistics.main, [folder, "--out", f"{file}/a.npz"], f"{file} is not a folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and says in error and error.count("\n") == 1


def test_the_sampling_card_names_router_and_times() -> None:
    card = sampling_card(load_config("debug", ["diffusion.sampling_steps=25"]), 1, "ema", [], 1)
    assert card["time_grid"] == "equal: 1, 0.96 ... 0.04, 0" and card["router"] == "expert_choice in pools of image"
    settings = ["moe.router=diffmoe", "moe.pool=batch", "moe.sampling_choice=gate", "diffusion.time_grid=diffusers"]
    card = sampling_card(load_config("debug", settings), 1, "ema", [], 1)
    assert card["router"] == "diffmoe in pools of batch, tokens by gate" and card["time_grid"].endswith("... 0.001, 0")
    with pytest.raises(ConfigError, match=r"is for moe\.router=diffmoe, but moe\.router is"):
        load_config("debug", ["moe.sampling_choice=gate"])
