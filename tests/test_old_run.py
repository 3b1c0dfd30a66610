"""A checkpoint and an export that an earlier version wrote still load, and a run goes on from them as it did then.

`old_run.tar.xz` holds `run`, stopped after step 4 of 8 on two processes (ep_size 2, ZeRO-3, fp32), and `export`, its
bf16 average, both written by commit 7f1cb14. The numbers below are what that commit gave on one x86 CPU.
"""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests_launcher import Launcher, metrics

from trainer.checkpoint.__main__ import main
from trainer.checkpoint.export_reader import read_export, read_export_config
from trainer.checkpoint.reader import read_ema

RESUMED = {  # step: (loss, norm of the gradients)
    5: (2.013211250305176, 0.22273321379855254),
    6: (1.9725981950759888, 0.09162711110854739),
    7: (2.00785756111145, 0.08435741190834227),
    8: (2.0056328773498535, 0.08372381342650073),
}
FROM_EXPORT = {1: (1.9840458631515503, 0.11940524716778789), 2: (1.99040687084198, 0.10143447716770282)}
MODEL = ["model.dim=16", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "moe.num_experts=4"]
EXPORT_FILES = ("model-00001-of-00001.safetensors", "model.safetensors.index.json")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The unpacked archive: `run` and `export`."""
    with tarfile.open(Path(__file__).with_name("old_run.tar.xz")) as archive:
        safe: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 brought it
        archive.extractall(tmp_path, **safe)
    return tmp_path


def go_on(run_dir: Path, *settings: str, processes: int) -> None:
    """Train in a run folder, on `processes` processes that share the experts, with a global batch of 8."""
    parallel = [f"parallel.ep_size={processes}", f"train.micro_batch_size={8 // processes}"]
    program = ["-m", "trainer.train", "debug", f"run_dir={run_dir}", *MODEL, *parallel, *settings]
    done = Launcher().run(*program, processes=processes)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-9000:]


def check_losses(run_dir: Path, expected: dict[int, tuple[float, float]]) -> None:
    """Compare loss and gradient norm of every step; another CPU adds in another order."""
    found = {line["step"]: (line["loss"], line["grad_norm"]) for line in metrics(run_dir)}
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=5e-6), step


@pytest.mark.parametrize("name", ["run", "export"])
def test_old_files_are_whole(old: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(old / name)])
    assert stop.value.code == 0
    assert "whole" in capsys.readouterr().out


def test_old_checkpoint_exports_to_the_same_bytes(old: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", str(old / "run"), str(old / "again")])
    assert stop.value.code == 0
    for file in EXPORT_FILES:
        assert (old / "again" / file).read_bytes() == (old / "export" / file).read_bytes(), file
    now, then = (json.loads((old / name / "config.json").read_text()) for name in ("again", "export"))
    assert {key: now[key] for key in now if now[key] != then.get(key)} == {
        "format": 3, "encoders": {}, "config": {**then["config"], "run_dir": Path(then["config"]["run_dir"]).name}
    }  # fmt: skip


def test_old_export_is_read(old: Path) -> None:
    config = read_export_config(old / "export", checksums=True)
    assert config.step == 4 and config.weights == "ema" and config.config["moe"]["num_experts"] == 4
    weights, average = read_export(old / "export"), read_ema(old / "run" / "checkpoints" / "step_00000004")
    stored = load_file(old / "export" / "model-00001-of-00001.safetensors")
    assert weights.keys() == average.keys() == stored.keys() and len(weights) == 46
    for name, value in weights.items():
        assert torch.equal(value, average[name].bfloat16().float()) and torch.equal(value, stored[name].float())
    total = sum(float(value.double().abs().sum()) for value in weights.values())
    assert total == pytest.approx(2533.0793362716213, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_old_run_goes_on(old: Path, processes: int) -> None:
    go_on(old / "run", "train.max_steps=8", "train.checkpoint_every=4", processes=processes)
    check_losses(old / "run", RESUMED)
    state = json.loads((old / "run" / "checkpoints" / "step_00000008" / "state.json").read_text())
    assert state["data"]["samples_seen"] == 64
    log = (old / "run" / "train.log").read_text()
    assert "resuming from" in log and "passed over" not in log


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_starts_from_the_old_export(old: Path, processes: int) -> None:
    shutil.rmtree(old / "run")
    go_on(old / "run", "train.max_steps=2", f"init_from={old / 'export'}", processes=processes)
    check_losses(old / "run", FROM_EXPORT)
