"""Prompt files, the COCO list, and the commands that score pictures: whole, killed, on several ranks, damaged."""

import csv
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import DESK, PHONE, find_browser, width_in_browser
from PIL import Image
from tests_launcher import Launcher

from eval import coco
from eval.pages.numbers import flat_numbers
from eval.pictures.geneval_prompts import OFFICIAL_SHA256
from eval.pictures.image_files import picture_path, write_picture
from eval.pictures.prompt_files import read_prompts
from eval.pictures.prompts import metadata_lines, prompts_sha256
from eval.score import main
from eval.scoring.job import ScoreConfig
from trainer.config import ConfigError


def test_published_prompt_files_are_read(tmp_path: Path) -> None:
    official = tmp_path / "evaluation_metadata.jsonl"
    official.write_text(metadata_lines(read_prompts("geneval")))
    assert prompts_sha256(read_prompts(str(official))) == OFFICIAL_SHA256
    parti = tmp_path / "PartiPrompts.tsv"
    parti.write_text("Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tx\na red car\tVehicles\tBasic\t\n")
    assert [(p.text, p.tag) for p in read_prompts(str(parti))] == [("bond", "Abstract"), ("a red car", "Vehicles")]
    dpg = tmp_path / "dpg_bench.csv"
    with dpg.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [["item_id", "text", "question"], ["p0", "a, b", "q1"], ["p0", "a, b", "q2"], ["p1", "c", "q"]]
        )
    assert [(p.id, p.text) for p in read_prompts(str(dpg))] == [("p0", "a, b"), ("p1", "c")]
    folder = tmp_path / "dpg"
    folder.mkdir()
    (folder / "x1.txt").write_text("a long prompt\n")
    assert [(p.id, p.text) for p in read_prompts(str(folder))] == [("x1", "a long prompt")]
    second = tmp_path / "geneval2.jsonl"
    second.write_text(json.dumps({"prompt": "four cats", "vqa_list": [["q", "a"]], "atom_count": 3}) + "\n")
    assert read_prompts(str(second))[0].metadata["vqa_list"] == [["q", "a"]]
    lines = tmp_path / "lines.txt"
    lines.write_text("one\n\ntwo\n")
    before = {p.text: p.id for p in read_prompts(str(lines))}
    lines.write_text("zero\ntwo\n")
    assert read_prompts(str(lines))[1].id == before["two"]


def test_coco_list_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "val"
    folder.mkdir()
    images = [{"id": i, "file_name": f"{i:03d}.jpg"} for i in range(9)]
    captions = [
        {"id": 10 * i + k, "image_id": i, "caption": f"picture {i}\nnumber {k}"} for i in range(8) for k in (0, 1)
    ]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": captions[::-1]}))
    out = tmp_path / "list.jsonl"
    coco.main(["list", str(path), "--count", "6", "--seed", "1", "--out", str(out)])
    said, first = capsys.readouterr().out, out.read_text()
    rows = [json.loads(line) for line in first.splitlines()]
    assert len({row["image_id"] for row in rows}) == 6 and "sha256" in said
    assert all(row["prompt"] == f"picture {row['image_id']} number {row['caption_id'] % 10}" for row in rows)
    path.write_text(json.dumps({"images": images, "annotations": captions}))
    coco.main(["list", str(path), "--count", "6", "--seed", "1", "--out", str(out)])
    assert out.read_text() == first
    assert [p.id for p in read_prompts(str(out))] == [row["id"] for row in rows]
    for row in rows[:-1]:
        Image.new("L", (50, 30), 99).save(folder / row["file"])
    with pytest.raises(ConfigError, match="1 pictures are not in"):
        coco.write_pictures(rows, folder, tmp_path / "small", 16)
    (folder / rows[-1]["file"]).write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="cannot be read"):
        coco.write_pictures(rows, folder, tmp_path / "small", 16)
    Image.new("RGB", (20, 70)).save(folder / rows[-1]["file"])
    coco.write_pictures(rows, folder, tmp_path / "small", 16)
    assert coco.write_pictures(rows, folder, tmp_path / "small", 16) == 0
    with Image.open(tmp_path / "small" / rows[0]["file"].replace("jpg", "png")) as image:
        assert (image.size, image.mode) == ((16, 16), "RGB")
    with pytest.raises(ConfigError, match="--count is 60"):
        coco.build_list({"images": images, "annotations": captions}, 60, 0)


def test_settings_that_cannot_work_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECDIT_WEIGHTS", str(tmp_path / "none"))
    out = tmp_path / "out"
    np.savez(tmp_path / "clean.npz", mu=np.zeros(3), sigma=np.eye(3), convention="clean")
    (tmp_path / "p.txt").write_text("a cat\n")
    statistics, prompts = str(tmp_path / "clean.npz"), str(tmp_path / "p.txt")
    for argv, message in (
        (["--suite", "fido"], "--suite fido is unknown: choose from fid, cmmd"),
        (["--suite", ""], "--suite is empty"),
        (["--suite", "fid"], "--reference is missing"),
        (["--suite", "fid", "--reference", str(tmp_path / "no")], "does not exist"),
        (["--suite", "fid", "--reference", statistics], "use --convention clean"),
        (["--suite", "fid", "--convention", "best"], "convention best is unknown"),
        (["--suite", "clip", "--clip", "ViT-L-14:openai"], "eval.weights fetch clip-vit-l-14-openai"),
        (["--suite", "geneval", "--detector", "x"], "--detector x is unknown"),
        (["--suite", "fid", "--samples", "0"], "--samples is 0"),
        (["--suite", "fid", "--min-score", "0.01"], "--min-score is 0.01: use 0.05"),
        (["--suite", "fid", "--prompts", "demo"], "belongs to eval.run"),
        (["--suite", "fid", "--true-pictures", str(tmp_path)], "--true-pictures needs --prompts"),
        (["--suite", "fid", "--prompts", prompts, "--true-pictures", "no"], "--true-pictures no is not a folder"),
        (["--suite", "fid", "--prompts", prompts, "--true-pictures", "embedded"], "1 prompts are no built-in scenes"),
        (["--suite", "geneval", "--detector", "embedded", "--prompts", prompts, "--min-score", "0.5"], "own threshold"),
        (["--suite", "geneval", "--detector", "yolov3-tiny", "--prompts", prompts], "yolov3-tiny"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(tmp_path), "--out", str(out), *argv])
        error = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and message in error and len(error.splitlines()) == 1
    assert not out.exists()
    with pytest.raises(ConfigError, match="use clip or nearest"):
        ScoreConfig(suites=("fid",), out=out, colors="hsv")


def test_numbers_are_flat_and_without_protocol() -> None:
    results = {
        "fid": {"fid": 3, "kid": {"mean": 0.5, "seed": 2020}, "card": {"pictures": 9}, "skipped": {}, "note": "x"}
    }
    assert flat_numbers(results) == {"fid/fid": 3.0, "fid/kid/mean": 0.5}


def _draw_sets(folder: Path, count: int) -> list[str]:
    """Two folders of smooth pictures, of which the first has GenEval's layout, and its prompts."""
    draw = np.random.default_rng(0)
    for i in range(2 * count):
        small = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        picture = torch.from_numpy(np.array(small.resize((32, 32), Image.Resampling.BICUBIC)))
        path = picture_path(folder / "drawn", i, 0) if i < count else folder / "real" / f"{i}.png"
        write_picture(path, picture)
    (folder / "prompts.txt").write_text("".join(f"picture {i}\n" for i in range(count)))
    return [str(folder / "drawn"), "--prompts", str(folder / "prompts.txt"), "--suite", "fid", "--reference",
            str(folder / "real")]  # fmt: skip


def _numbers(out: Path) -> dict[str, float]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return flat_numbers(report["results"])


@pytest.mark.slow
def test_a_killed_scoring_ends_like_a_whole_one_and_ranks_agree(
    tmp_path: Path, launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _draw_sets(tmp_path, 7)
    whole, killed, two = (tmp_path / name for name in ("whole", "killed", "two"))
    main([*arguments, "--out", str(whole)])
    process = launcher.start("-m", "eval.score", *arguments, "--out", str(killed))
    deadline = time.monotonic() + 120
    while not list(killed.rglob("shard_*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "report.json").exists()
    main([*arguments, "--out", str(killed)])
    assert _numbers(killed) == _numbers(whole)
    done = launcher.run("-m", "eval.score", *arguments, "--out", str(two), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, value in _numbers(whole).items():
        assert _numbers(two)[name] == pytest.approx(value, rel=1e-6, abs=1e-6)
    if find_browser():
        for width in (PHONE, DESK):
            assert width_in_browser(whole / "report.html", width, tmp_path) <= width
    text = (whole / "report.html").read_text()
    assert "<script" not in text and 'src="http' not in text and "FID" in text
    assert (whole / "report.csv").read_text().startswith("name,value\nfid/fid,")
    picture_path(tmp_path / "drawn", 3, 0).unlink()
    with pytest.raises(SystemExit):
        main([*arguments, "--out", str(tmp_path / "three")])
    assert "1 of 7 pictures are missing" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("yolo")
def test_geneval_with_a_real_detector_by_command(tmp_path: Path) -> None:
    prompts = read_prompts("geneval")[:3] + [p for p in read_prompts("geneval") if p.tag == "colors"][:2]
    (tmp_path / "set.jsonl").write_text(metadata_lines(prompts))
    for i in range(5):
        write_picture(picture_path(tmp_path / "drawn", i, 0), torch.full((64, 64, 3), 40 * i, dtype=torch.uint8))
    out = tmp_path / "out"
    command = [str(tmp_path / "drawn"), "--prompts", str(tmp_path / "set.jsonl"), "--suite", "geneval", "--detector",
               "yolov3-tiny", "--colors", "nearest", "--out", str(out)]  # fmt: skip
    main(command)
    report = json.loads((out / "report.json").read_text())["results"]["geneval"]
    assert report["overall"]["value"] == 0 and report["card"]["comparable"] == "approximate"
    assert report["card"]["departures"][0] == "detector yolov3-tiny"
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and rows[0]["reason"].startswith("expected")
    first = (out / "results.jsonl").read_text()
    shutil.rmtree(out / "colors")
    main(command)
    assert (out / "results.jsonl").read_text() == first


@pytest.mark.slow
@pytest.mark.usefixtures("yolo")
def test_any_closed_set_has_controls(tmp_path: Path, photographs: dict[str, torch.Tensor]) -> None:
    rows = [
        {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": f"a photo of a {name}"}
        for name in ("cup", "motorcycle")
    ]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i, picture in enumerate(photographs.values()):
        write_picture(picture_path(tmp_path / "true", i, 0), picture)
        write_picture(picture_path(tmp_path / "drawn", i, 0), photographs["coffee"])
    out = tmp_path / "out"
    main([
        str(tmp_path / "drawn"), "--prompts", str(tmp_path / "set.jsonl"), "--suite", "geneval",
        "--detector", "yolov3-tiny", "--true-pictures", str(tmp_path / "true"), "--out", str(out),
    ])  # fmt: skip
    found = json.loads((out / "report.json").read_text())["results"]["geneval"]
    assert found["overall"]["value"] == 0.5
    assert {name: values["overall"] for name, values in found["controls"].items()} == {
        "chance": 0, "shuffled": 0.5, "ceiling": 1,
    }  # fmt: skip
    assert "Grey ticks are the controls" in (out / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("yolo")
def test_a_killed_detection_ends_like_a_whole_one(
    tmp_path: Path, launcher: Launcher, photographs: dict[str, torch.Tensor]
) -> None:
    asked = [p for p in read_prompts("geneval") if {"cup", "red"} & set(p.text.split())]
    prompts = list({prompt.text: prompt for prompt in asked}.values())[:40]
    (tmp_path / "set.jsonl").write_text(metadata_lines(prompts))
    for i in range(len(prompts)):
        part = photographs["coffee"][2 * i : 2 * i + 300, 3 * i : 3 * i + 400]
        write_picture(picture_path(tmp_path / "drawn", i, 0), part.contiguous())
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [str(tmp_path / "drawn"), "--prompts", str(tmp_path / "set.jsonl"), "--suite", "geneval", "--detector",
               "yolov3-tiny", "--colors", "nearest", "--out"]  # fmt: skip
    main([*command, str(whole)])

    def num_lines() -> int:
        return sum(path.read_text().count("\n") for path in killed.glob("detections/*/part_*.jsonl"))

    process = launcher.start("-m", "eval.score", *command, str(killed))
    deadline = time.monotonic() + 120
    while num_lines() < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= num_lines() < len(prompts) and not (killed / "report.json").exists()
    main([*command, str(killed)])
    results = [json.loads(line) for line in (whole / "results.jsonl").read_text().splitlines()]
    assert any("cup" in json.loads(row["details"]) for row in results)
    assert _numbers(killed) == _numbers(whole)
    assert (killed / "results.jsonl").read_text() == (whole / "results.jsonl").read_text()
