"""docs/train-256px.md, run: its commands are taken from the page itself, so that it cannot say what does not work.

Way b runs from its list of URLs to its report, in a folder of its own with the paths that the page names. What is
replaced is in SIZES and REPLACED; what cannot run here, or is another test's, in NOT_RUN: it is compared with what the
code knows. Of way a, which needs a cluster, all that can be is parsed and planned.
"""

import importlib
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from picture_server import PictureServer
from safetensors.torch import save_file
from tests_launcher import ROOT, Launcher, metrics

from eval.run import build_parser
from eval.weights_table import TABLE
from trainer.config import load_config, save_config
from trainer.data import download
from trainer.encoders import catalog
from trainer.plan.__main__ import parse
from trainer.plan.command import plan

diffusers = pytest.importorskip("diffusers")
open_clip = pytest.importorskip("open_clip")

WAY_A, WAY_B = "Way a: a cluster", "Way b: one node, or one GPU"
RECIPE, TINY, CLIP = "ec_dit_b_8e", "tiny.yaml", "ViT-tiny-guide"
REPLACED = {
    "torchrun --nproc-per-node 8": "python",  # one process
    "ViT-L-14-quickgelu:models/weights/ViT-L-14.pt": "models/clip",  # a tiny one of random weights
    "--min-image-size 256 --processes 16": "--min-image-size 32 --processes 1",
    f" {RECIPE}": f" {TINY}",  # the same recipe with SIZES; the run's folder keeps its name
    "--prompts geneval --suite clip,geneval": "--prompts prompts.txt --suite clip --clip ViT-tiny-guide:models/tiny.pt",
}
SIZES = [
    "data.image_size=32", "data.text_encoder=open_clip:models/clip", "data.num_workers=0", "model.dim=32",
    "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=2", "train.micro_batch_size=4", "train.max_steps=2",
    "train.log_every=1", "train.keep_every=0", "train.precision=fp32", "optim.warmup_steps=1",
    "diffusion.sampling_steps=2", "train.compile=false", "moe.num_experts=4",
]  # fmt: skip
NOT_RUN = ("hf download", "hf auth", "make .venv", "export", "source", "python -m eval.weights fetch")
TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 24, "heads": 3, "layers": 2},
}


def blocks(title: str) -> list[list[str]]:
    """The commands of each fenced block below a heading of the page, continued lines as one."""
    section = (ROOT / "docs" / "train-256px.md").read_text().split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    fenced = re.findall(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", " ").splitlines() for block in fenced]


def commands(title: str) -> list[str]:
    return [line for block in blocks(title) for line in block]


def plans(title: str) -> list[dict[str, Any]]:
    """What each plan below a heading reports."""
    return [plan(parse(shlex.split(line)[3:]))[0] for line in commands(title) if "trainer.plan" in line]


def test_what_is_fetched_is_what_the_lists_say() -> None:
    known = {encoder.fetch for encoder in (*catalog.CODECS, *catalog.TEXT_ENCODERS)}
    (small,) = [line for line in commands(WAY_B) if line.startswith("hf download")]
    assert small in known
    (large,) = [line for line in commands(WAY_A) if line.startswith("hf download")]
    both = [set(shlex.split(fetch)) for fetch in known if fetch.startswith(" ".join(large.split()[:3]))]
    assert len(both) == 2 and set(shlex.split(large)) == set.union(*both)
    assert not [line for line in commands("Before both") if "fetch" in line and line.split()[-1] not in TABLE]
    for title in (WAY_A, WAY_B):
        checked = [line.split()[-1] for line in commands(title) if "trainer.encoders check" in line]
        recipe = load_config("ec_dit_xl_8e" if title == WAY_A else RECIPE).data
        assert checked == [recipe.codec, recipe.text_encoder]


def test_jobs_of_the_cluster_are_what_the_scripts_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "urls.parquet").symlink_to(write_list(tmp_path / "list.parquet", ["http://x"]))
    found = []
    for line in commands(WAY_A):
        if "sbatch" not in line:
            assert line.startswith((*NOT_RUN, "python -m trainer.encoders", "python -m trainer.plan"))
            continue
        job = re.fullmatch(r"(?:\w+=\$\((.*)\)|(.*))", line)
        assert job is not None
        line = job[1] or job[2]
        assert line.startswith("sbatch ")
        words = shlex.split(line)
        at = next(number for number, word in enumerate(words) if word.endswith(".sbatch"))
        assert (ROOT / words[at]).is_file() and all(word.startswith("--") for word in words[1:at])
        script, arguments = Path(words[at]).stem, words[at + 1 :]
        found.append(script)
        if script == "download":  # as the script calls it; what is asked for img2dataset does not start
            with pytest.raises(SystemExit):
                download.main([arguments[0], "--out", *arguments[1:], "--python", "/bin/false"])
            printed = capsys.readouterr()
            assert "--image-size 256: data.image_size=256 of" in printed.out and "does not start" in printed.err
            images = arguments[1]
        elif script == "eval":
            assert build_parser().parse_args(arguments).checkpoint == Path(load_config("ec_dit_xl_8e").run_dir)
        else:
            assert load_config(arguments[0], arguments[1:]).data.images == images
            nodes = re.findall(r"--nodes=(\d+)", line)[0]
            assert plan(parse([*arguments, "--nodes", nodes]))[0]["configured"]["fits"]
    assert found == ["download", "encode", "train", "eval", "train", "eval"]


def test_numbers_are_those_of_the_plan() -> None:
    page = (ROOT / "docs" / "train-256px.md").read_text()
    rows = re.findall(r"^\| ([ab], .*) \|$", page, re.MULTILINE)
    found = plans("Where the numbers are from")
    assert len(rows) == len(found)
    for row, report in zip(rows, found, strict=True):
        mine = report["configured"]
        _, seconds, speed, memory, steps, hours = (cell.strip() for cell in row.split("|"))
        assert mine["fits"] and seconds == f"{mine['step_seconds']:.3f}"
        assert speed == f"{mine['images_per_second']:,.0f}" and memory == f"{mine['peak_bytes'] / 1e9:.1f}"
        assert hours == f"{mine['step_seconds'] * int(steps.replace(',', '')) / 3600:.0f} h"
    for report in (found[0], found[2]):
        total, active = (f"{report['parameters'][name] / 1e6:,.0f}M" for name in ("total", "active"))
        assert f"{total} parameters, {active} activated" in page
    memory = [f"{report['configured']['peak_bytes'] / 1e9:.0f} GB" for report in found]
    assert f"| memory of a GPU | {memory[0]} | {memory[2]}; one GPU {memory[3]} |" in page
    assert found[2]["global_batch_size"] == found[3]["global_batch_size"] == found[4]["global_batch_size"]


def test_one_gpu_learns_what_a_node_does() -> None:
    node, *others = [line for line in commands(WAY_B) if "trainer.train" in line]
    batch = load_config(RECIPE).global_batch_size(8)
    assert node.endswith(f"--nproc-per-node 8 -m trainer.train {RECIPE}") and len(others) == 2
    for line in others:
        _, _, _, recipe, *overrides = shlex.split(line)
        assert load_config(recipe, overrides).global_batch_size(1) == batch


@pytest.fixture
def server() -> Iterator[PictureServer]:
    running = PictureServer()
    yield running
    running.close()


def write_list(path: Path, urls: list[str]) -> Path:
    """As LAION's lists are."""
    pq.write_table(pa.table({"URL": urls, "TEXT": [f"picture {i}" for i in range(len(urls))]}), path)
    return path


def write_encoders(models: Path) -> None:
    """Tiny, of random weights: SDXL's VAE in small, CLIP as a folder and as a file."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    widths = {"block_out_channels": (4, 8, 8, 8), "norm_num_groups": 2, "latent_channels": 4}
    diffusers.AutoencoderKL(**blocks, **widths).save_pretrained(models / "sdxl_vae")
    (models / "clip").mkdir()
    (models / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CLIP}))
    (models / f"{CLIP}.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(models / f"{CLIP}.json")
    state = open_clip.create_model(CLIP).state_dict()
    torch.save(state, models / "tiny.pt")
    save_file({name: value.contiguous() for name, value in state.items()}, models / "clip" / "model.safetensors")


def run_command(line: str, folder: Path) -> None:
    """In this process; in its own where DeepSpeed leaves things behind."""
    for old, new in REPLACED.items():
        line = line.replace(old, new)
    python, dash, module, *arguments = shlex.split(line)
    assert (python, dash) == ("python", "-m")
    if module == "trainer.train":
        command, environment = [sys.executable, dash, module, *arguments], Launcher().environment()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return
    is_folder = (ROOT / module.replace(".", "/")).is_dir()
    try:
        importlib.import_module(f"{module}.__main__" if is_folder else module).main(arguments)
    except SystemExit as end:
        assert not end.code, line


@pytest.mark.slow
def test_way_b_leads_from_urls_to_a_report(
    server: PictureServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = ["jpg"] * 96 + ["png", "webp", "tiny.png", "missing"]  # the last but one is smaller than the crop
    write_list(tmp_path / "urls.parquet", [server.url(seed, kind) for seed, kind in enumerate(kinds)])
    write_encoders(tmp_path / "models")
    (tmp_path / "prompts.txt").write_text("a cat on a blue background\ntwo dogs\n")
    monkeypatch.chdir(tmp_path)
    save_config(load_config(RECIPE, SIZES), Path(TINY))
    fetch, work, *_ = blocks(WAY_B)
    for line in [*fetch, *work]:
        if not line.startswith(NOT_RUN):
            run_command(line, tmp_path)
    said = capsys.readouterr().out
    assert f"--image-size 32: data.image_size=32 of {TINY} needs 32" in said
    assert re.search(r"98  pictures from 100 URLs", said) and "1  image too small" in said
    assert "4 channels, factor 8, digest" in said and "data.text_encoder=open_clip:models/clip" in said
    assert "dataset.json: 98 samples" in said and Path("latents_b.html").is_file()
    run = Path("runs") / RECIPE
    assert [row["step"] for row in metrics(run)] == [1, 2] and math.isfinite(metrics(run)[-1]["loss"])
    report = json.loads((run / "eval" / "prompts" / "report.json").read_text())
    assert report["step"] == 2 and math.isfinite(report["results"]["clip"]["score"]["cosine"])
    assert "CLIP score" in (run / "eval" / "prompts" / "report.html").read_text()
