"""The real command line: resume, parity over processes, launchers, refusals of a changed run."""

import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests_launcher import metrics

from trainer.checkpoint.folder import fault, find_checkpoint, list_checkpoints, newest_whole
from trainer.config import ConfigError
from trainer.distributed import World, check_devices
from trainer.engine.zero_state import prepare_moments
from trainer.telemetry.reporter import truncate_metrics

MODULE = ("-m", "trainer.train", "debug")


def stable(run_dir: Path) -> list[tuple[float, ...]]:
    """What must not change between an unbroken and a resumed run; the speed may."""
    return [(m["step"], m["loss"], m["grad_norm"], m["learning_rate"], m["moe/1/coverage_0"]) for m in metrics(run_dir)]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One unbroken run of one process, global batch 8."""
    from tests_launcher import Launcher

    run_dir = tmp_path_factory.mktemp("single") / "run"
    done = Launcher().run(*MODULE, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr[-3000:]
    return run_dir


def test_run_folder_has_its_files(single: Path) -> None:
    for name in ("config.yaml", "ds_config.json", "metrics.jsonl", "train.log", "checkpoints/latest"):
        assert (single / name).is_file(), name
    assert list((single / "tensorboard").iterdir())
    assert (single / "checkpoints/latest").read_text().strip() == "step_00000020"
    assert not list((single / "checkpoints").glob("*.tmp"))
    assert [m["step"] for m in metrics(single)] == list(range(1, 21))
    assert set(metrics(single)[0]) >= {"step", "loss", "grad_norm", "learning_rate", "images_per_second"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes,overrides",
    [
        (2, ["parallel.ep_size=2", "train.micro_batch_size=4"]),
        (4, ["parallel.ep_size=2", "train.micro_batch_size=2"]),
        (4, ["parallel.ep_size=4", "train.micro_batch_size=1", "train.gradient_accumulation_steps=2"]),
        (
            2,
            [
                "parallel.ep_size=2",
                "train.micro_batch_size=4",
                "train.activation_checkpointing=true",
                "data.num_workers=1",
            ],
        ),
    ],
)
def test_any_number_of_processes_prints_the_same_losses(
    launcher: Any, single: Path, tmp_path: Path, processes: int, overrides: list[str]
) -> None:
    done = launcher.run(*MODULE, f"run_dir={tmp_path / 'run'}", *overrides, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    for expected, got in zip(metrics(single), metrics(tmp_path / "run"), strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_killed_runs_resume_and_equal_the_unbroken_ones_bitwise(launcher: Any) -> None:
    done = launcher.run(
        "tests/fault_injection.py", "--trials", "6", "--seed", "1", "--stages", "1", "2", "3", timeout=900
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "nothing lost in 6 blows" in done.stdout


@pytest.mark.slow
def test_stop_signal_saves_and_a_later_start_continues(launcher: Any, single: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = launcher.start(*MODULE, f"run_dir={run_dir}", "train.checkpoint_every=0")
    while not (run_dir / "metrics.jsonl").exists() or not metrics(run_dir):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert "stop signal" in (run_dir / "train.log").read_text()
    assert launcher.run(*MODULE, f"run_dir={run_dir}").returncode == 0
    assert stable(run_dir) == stable(single)


@pytest.mark.slow
def test_changed_runs_are_refused(single: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "train.micro_batch_size=4": "global batch of 8, this run has 4",
        "model.dim=32": "model.dim is 32 but",
        "moe.num_experts=4": "moe.num_experts is 4 but",
        "seed=1": "seed is 1 but",
        "optim.name=sgd": "optim.name is sgd but",
        "data.image_size=16": "is not the data set that",
    }
    from trainer.train import main

    for override, words in cases.items():
        before = sorted(str(p) for p in single.rglob("*"))
        with pytest.raises(SystemExit) as error:
            main(["debug", f"run_dir={single}", override])
        assert error.value.code == 2 and words in capsys.readouterr().err, override
        assert sorted(str(p) for p in single.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepspeed", "mpirun"])
def test_other_launchers_print_the_same_losses(launcher: Any, single: Path, tmp_path: Path, name: str) -> None:
    import subprocess
    import sys

    from tests_launcher import ROOT

    program = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip(f"{name} is not installed")
    run = [f"run_dir={tmp_path / 'run'}", "parallel.ep_size=2", "train.micro_batch_size=4"]
    if name == "deepspeed":
        command = [program, "--num_gpus", "2", "--module", "trainer.train", "debug", *run]
    else:
        command = [program, "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable, *MODULE, *run]
    environment = launcher.environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for expected, got in zip(metrics(single), metrics(tmp_path / "run"), strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_broken_checkpoints_are_seen_and_passed_over(
    single: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(single, run_dir)
    folder = run_dir / "checkpoints"
    newest = list_checkpoints(folder)[-1]
    assert fault(newest) == ""
    shard = newest / "rank_00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert "has a wrong checksum" in fault(newest)
    shard.write_bytes(content[:-5])
    assert "bytes instead of" in fault(newest)
    shard.unlink()
    assert "is missing" in fault(newest)
    found = newest_whole(list_checkpoints(folder))
    assert found is not None and found.name == "step_00000010"
    with pytest.raises(ConfigError, match="is not whole"):
        find_checkpoint(newest)
    with pytest.raises(ConfigError, match="no such run folder"):
        find_checkpoint(tmp_path / "absent")


def test_metrics_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    truncate_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_steps_between_reports_compute_the_same_without_statistics(launcher: Any, single: Path, tmp_path: Path) -> None:
    done = launcher.run(*MODULE, f"run_dir={tmp_path / 'run'}", "train.log_every=5")
    assert done.returncode == 0, done.stderr[-3000:]
    every = {m["step"]: m for m in metrics(single)}
    found = metrics(tmp_path / "run")
    assert [m["step"] for m in found] == [5, 10, 15, 20]
    for m in found:
        same = [key for key in m if key == "grad_norm" or key.startswith("moe/")]
        assert len(same) > 10 and all(m[key] == every[m["step"]][key] for key in same)


@pytest.mark.parametrize(
    "local_rank,local_size,refused", [(0, 2, False), (1, 2, False), (0, 3, True), (2, 0, True), (1, 0, False)]
)
def test_a_node_needs_a_gpu_for_each_process(
    monkeypatch: pytest.MonkeyPatch, local_rank: int, local_size: int, refused: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    world = World(rank=5, local_rank=local_rank, size=8, local_size=local_size)
    if not refused:
        check_devices(world)
        return
    with pytest.raises(ConfigError, match="3 processes on this node and 2 GPUs: start one process per GPU"):
        check_devices(world)


def test_restored_optimizer_state_lies_beside_its_tensors() -> None:
    """Fused AdamW on a GPU takes its counter from there only; here the other device is `meta`."""
    flat = torch.nn.Parameter(torch.empty(4, device="meta"))
    inner = SimpleNamespace(state={flat: {}})
    engine = SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner, fp32_partitioned_groups_flat=[flat]))
    prepare_moments(engine, ["exp_avg", "exp_avg_sq"], 7)
    state = inner.state[flat]
    assert state.keys() == {"exp_avg", "exp_avg_sq", "step"}
    assert {value.device.type for value in state.values()} == {"meta"}
    assert {value.dtype for value in state.values()} == {torch.float32}
