"""Validation loss against a loop; a watched run, by the commands that a user types."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reducing_metrics import frechet_from_features
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests_launcher import Launcher

from eval import run as score_run
from eval.networks.inception import InceptionEncoder
from eval.pictures.image_files import read_picture
from eval.validation_loss import fixed_noise, fixed_samples, validation_loss
from eval.watch import finished_steps, log_file, main, parse
from trainer.config import ConfigError, load_config
from trainer.data import encode
from trainer.data.dataset import open_dataset
from trainer.data.demo import scene_shards
from trainer.data.latents.samples import LatentDataset
from trainer.diffusion.model import EcDit, ModelShape
from trainer.pipeline import Pipeline
from trainer.randomness import keyed_generator


@torch.inference_mode()
def slow_losses(pipeline: Pipeline, dataset: LatentDataset, count: int) -> dict[str, float]:
    """Error of the velocity noise - data, sample by sample and time by time."""
    errors: dict[str, list[float]] = {}
    for batch in fixed_samples(dataset, count, 1):
        x0, x1 = batch.latent_BCHW, fixed_noise(batch)
        for tenth in (1, 3, 5, 7, 9):
            x = (10 - tenth) / 10 * x0 + tenth / 10 * x1
            t_B = torch.tensor([tenth / 10])
            velocity, _ = pipeline.model(x, t_B, batch.text_BLD, batch.text_mask_BL)
            error = velocity.float() - x1 + x0
            errors.setdefault(f"t0.{tenth}", []).append(float((error * error).mean()))
    means = {name: sum(values) / len(values) for name, values in errors.items()}
    return {**means, "mean": sum(means.values()) / 5}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """The debug model with random weights, as its first ones would answer nothing, on its synthetic data."""
    config = load_config("debug", ["model.patch_size=4"])
    info = replace(open_dataset(config).info, codec="pixel", text_encoder="minilm")
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: value.shape[-1] ** -0.5 * torch.randn(value.shape, generator=generator)
        for name, value in EcDit(config.model, config.moe, ModelShape.of(info)).named_parameters()
    }
    return Pipeline(config, info, 0, weights)


def test_validation_loss_equals_a_loop_and_is_repeatable(pipeline: Pipeline) -> None:
    dataset = open_dataset(pipeline.config)
    batches = fixed_samples(dataset, 10, 4)
    assert [len(batch.latent_BCHW) for batch in batches] == [4, 4, 2]
    numbers = [k * len(dataset) // 10 for k in range(10)]
    assert [int(n) for batch in batches for n in batch.index_B] == numbers and len(set(numbers)) == 10
    found = validation_loss(pipeline, batches)
    assert found == pytest.approx(slow_losses(pipeline, dataset, 10), rel=1e-5)
    assert list(found) == ["t0.1", "t0.3", "t0.5", "t0.7", "t0.9", "mean"]
    assert validation_loss(pipeline, fixed_samples(dataset, 10, 4)) == found


def test_a_sample_has_one_noise_for_ever_and_its_own(pipeline: Pipeline) -> None:
    dataset = open_dataset(pipeline.config)
    noise = torch.cat([fixed_noise(batch) for batch in fixed_samples(dataset, 10, 3)])
    assert noise.shape == (10, *dataset.read(0).latent.shape)
    assert all(not torch.equal(noise[i], noise[j]) for i in range(10) for j in range(i))
    for row, batch in zip(noise, fixed_samples(dataset, 10, 1), strict=True):
        number = int(batch.index_B[0])
        alone = torch.randn(row.shape, generator=keyed_generator(0, number, "validation"))
        assert torch.equal(row, alone)
    assert abs(float(noise.mean())) < 0.05 and float(noise.std()) == pytest.approx(1, abs=0.05)


def test_settings_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        ([str(tmp_path / "absent")], "does not exist: give the folder of a run"),
        ([str(tmp_path), "--seconds", "0"], "--seconds is 0"),
        ([str(tmp_path), "--num-prompts", "0"], "--num-prompts is 0"),
        ([str(tmp_path), "--prompts", "demo", "--suite", "fid"], "--reference is missing"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert len(parse([str(tmp_path), "--prompts", "demo", "--num-prompts", "7"]).prompts) == 7
    assert not parse([str(tmp_path)]).prompts, "the validation loss needs none"
    with pytest.raises(ConfigError, match="unknown"):
        parse([str(tmp_path), "--prompts", "demo", "--suite", "best"])


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
    for line in lines:
        trained = Pipeline.load(run / "checkpoints" / f"step_{line['step']:08d}")
        for name, value in slow_losses(trained, open_dataset(trained.config), 8).items():
            assert line[f"validation_loss/{name}"] == pytest.approx(value, rel=1e-5)
    assert lines[0]["validation_loss/mean"] != lines[1]["validation_loss/mean"]
    assert len(list((run / "tensorboard" / "eval").iterdir())) == 2
    events = EventAccumulator(str(run / "tensorboard" / "eval")).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("eval/validation_loss/mean")]
    assert logged == [(line["step"], pytest.approx(line["validation_loss/mean"], rel=1e-6)) for line in lines]
    real.mkdir()
    for i in range(2):
        (real / f"{i}.png").write_bytes(_png(i))
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--samples", "2", "--suite", "fid", "--reference", str(real)]
    score_run.main([str(run), *options])
    report = json.loads((run / "eval" / "prompts" / "report.json").read_text())
    assert report["step"] == 4 and report["pictures"] == 4 and report["sampling"]["checkpoint_step"] == 4
    assert "4 pictures bias FID upwards" in report["results"]["fid"]["note"]
    drawn = sorted((run / "eval" / "prompts" / "pictures").glob("ema_*/*/samples/*.png"))
    encoder = InceptionEncoder("torch-fidelity")
    inputs = [encoder.prepare(read_picture(path)) for path in [*drawn, *sorted(real.iterdir())]]
    features = encoder.encode(torch.stack(inputs))
    expected = frechet_from_features(features[:4], features[4:])
    assert len(drawn) == 4 and report["results"]["fid"]["fid"] == pytest.approx(expected, rel=1e-4)


def _png(value: int) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (60 * value, 90, 120)).save(buffer, "png")
    return buffer.getvalue()
