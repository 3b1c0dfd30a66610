"""Validation loss against a loop; a watched run, by the commands that a user types."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests_launcher import Launcher

from eval import run as score_run
from eval.validation_loss import TIMES, fixed_noise, fixed_samples, validation_loss
from eval.watch import finished_steps, log_file, main, parse
from trainer.config import ConfigError, load_config
from trainer.data import encode
from trainer.data.dataset import open_dataset
from trainer.data.demo import scene_shards
from trainer.pipeline import Pipeline


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """The debug model with its first weights, on its synthetic data."""
    config = load_config("debug", ["model.patch_size=4"])
    info = replace(open_dataset(config).info, codec="pixel", text_encoder="minilm")
    return Pipeline(config, info, 0, None)


def test_validation_loss_equals_a_loop_and_is_repeatable(pipeline: Pipeline) -> None:
    dataset = open_dataset(pipeline.config)
    batches = fixed_samples(dataset, 10, 4)
    assert [len(batch.latent_BCHW) for batch in batches] == [4, 4, 2]
    found = validation_loss(pipeline, batches)
    assert list(found) == [*(f"t{time:g}" for time in TIMES), "mean"]
    errors = []
    with torch.inference_mode():
        for batch in fixed_samples(dataset, 10, 1):
            x0, x1 = batch.latent_BCHW, fixed_noise(batch)
            t_B = torch.tensor([0.3])
            velocity, _ = pipeline.model(0.7 * x0 + 0.3 * x1, t_B, batch.text_BLD, batch.text_mask_BL)
            errors.append(float((velocity.float() - x1 + x0).square().mean()))
    assert found["t0.3"] == pytest.approx(sum(errors) / 10, rel=1e-5)
    assert found["mean"] == pytest.approx(sum(found[f"t{time:g}"] for time in TIMES) / 5)
    assert validation_loss(pipeline, fixed_samples(dataset, 10, 4)) == found


def test_settings_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        ([str(tmp_path / "absent")], "does not exist: give the folder of a run"),
        ([str(tmp_path), "--seconds", "0"], "--seconds is 0"),
        ([str(tmp_path), "--num-prompts", "0"], "--num-prompts is 0"),
        ([str(tmp_path), "--suite", "fid"], "--reference is missing"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert len(parse([str(tmp_path), "--num-prompts", "7"]).prompts) == 7
    with pytest.raises(ConfigError, match="unknown"):
        parse([str(tmp_path), "--suite", "best"])


def test_a_cut_off_line_is_no_finished_step(tmp_path: Path) -> None:
    log_file(tmp_path).parent.mkdir(parents=True)
    log_file(tmp_path).write_text('{"step": 10, "x": 1}\n{"step": 2')
    assert finished_steps(tmp_path) == {10}
    assert finished_steps(tmp_path / "none") == set()


@pytest.mark.slow
def test_a_run_is_watched_and_scored_on_a_file_of_prompts(tmp_path: Path, launcher: Launcher) -> None:
    run, images, latents = (tmp_path / name for name in ("run", "images", "latents"))
    overrides = [
        f"run_dir={run}", "data.source=shards", f"data.images={images}", f"data.latents={latents}",
        "train.max_steps=4", "train.checkpoint_every=2", "diffusion.sampling_steps=2", "model.patch_size=4",
    ]  # fmt: skip
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    real = tmp_path / "real"
    scene_shards.main(["--out", str(images), "--num-images", "64"])
    encode.main(["debug", *overrides])
    done = launcher.run("-m", "trainer.train", "debug", *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    main([str(run), "--loss-samples", "8"])
    lines = [json.loads(line) for line in log_file(run).read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(0 < line["validation_loss/mean"] < 10 for line in lines)
    assert len(list((run / "tensorboard" / "eval").iterdir())) == 2
    real.mkdir()
    for i in range(2):
        (real / f"{i}.png").write_bytes(_png(i))
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--samples", "2", "--suite", "fid", "--reference", str(real)]
    score_run.main([str(run), *options])
    report = json.loads((run / "eval" / "prompts" / "report.json").read_text())
    assert report["step"] == 4 and report["pictures"] == 4 and report["sampling"]["checkpoint_step"] == 4
    assert report["results"]["fid"]["fid"] > 0 and "bias" in report["results"]["fid"]["note"]


def _png(value: int) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (60 * value, 90, 120)).save(buffer, "png")
    return buffer.getvalue()
