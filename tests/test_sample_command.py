"""`trainer.sample` and `Pipeline` as others call them: what is drawn, into which files, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_samples import INFO, model_tensors, write_checkpoint
from PIL import Image

from trainer import Pipeline
from trainer.config import ConfigError, load_config
from trainer.data.latents.samples import LatentInfo
from trainer.diffusion.draw_options import DrawOptions
from trainer.formats.picture_file import PictureFiles, enlargement, read_settings
from trainer.sample import main

TINY = [
    "model.dim=16", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "moe.num_experts=4",
    "data.image_size=8", "diffusion.sampling_steps=3", "diffusion.guidance_scale=4",
]  # fmt: skip
SIZES = [[8, 8], [4, 16], [12, 16]]
BUCKETS = LatentInfo(**{**INFO.__dict__, "buckets": SIZES})
PROMPTS = ["a cat on a mat", "two dogs"]


def make_run(folder: Path, *overrides: str) -> Path:
    config = load_config("debug", [*TINY, f"run_dir={folder}", *overrides])
    tensors = model_tensors(config, BUCKETS, 2)
    write_checkpoint(folder, config, BUCKETS, {"weight": tensors, "ema": tensors})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("sample") / "mine")


@pytest.fixture(scope="module")
def pipe(run: Path) -> Pipeline:
    return Pipeline.load(run, device="cpu")


def sample(run: Path, *arguments: object) -> None:
    main([str(run), *map(str, arguments)])


def pixels(picture: Image.Image | Path) -> np.ndarray[Any, Any]:
    opened = Image.open(picture) if isinstance(picture, Path) else picture
    return np.asarray(opened.convert("RGB")).astype(int)


def difference(a: Image.Image | Path, b: Image.Image | Path) -> float:
    return float(np.abs(pixels(a) - pixels(b)).mean())


def test_each_picture_is_a_file_that_says_how_it_was_drawn(
    run: Path, pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeff\n two dogs \r\n\n", encoding="utf-8")
    words = ["--prompt", PROMPTS[0], "--prompts", tmp_path / "prompts.txt", "--num", 2, "--seed", 5, "--scale", 1]
    sample(run, *words, "--out", tmp_path / "new" / "png", "--batch-size", 3)
    names = ["0000_a-cat-on-a-mat_5", "0000_a-cat-on-a-mat_6", "0001_two-dogs_5", "0001_two-dogs_6"]
    assert sorted(path.name for path in (tmp_path / "new" / "png").iterdir()) == [f"{name}.png" for name in names]
    expected = pipe(PROMPTS, num_images=2, seed=5)
    for number, name in enumerate(names):
        file = tmp_path / "new" / "png" / f"{name}.png"
        assert difference(file, expected[number]) <= 1, "rounding of batched matmuls is one level at most"
        found = read_settings(file)
        assert found["prompt"] == PROMPTS[number // 2] and found["seed"] == 5 + number % 2
    assert len({picture.tobytes() for picture in expected}) == 4
    assert {key: found[key] for key in found if key != "weights_digest"} == {
        "prompt": "two dogs", "seed": 6, "model": "mine", "negative_prompt": "", "solver": "euler", "steps": 3,
        "time_grid": "equal", "time_shift": 1.0, "guidance": 4.0, "guidance_interval": [0.0, 1.0], "height": 8,
        "width": 8, "step": 3, "weights": "ema", "dtype": "fp32",
    }  # fmt: skip
    assert Image.open(file).info["Description"] == "two dogs"  # type: ignore[attr-defined]
    for kind, name in (("webp", "WEBP"), ("jpg", "JPEG")):
        sample(run, *words, "--out", tmp_path / kind, "--format", kind)
        file = tmp_path / kind / f"{names[3]}.{kind}"
        assert Image.open(file).format == name and read_settings(file) == found
        assert difference(file, expected[3]) < 40
    capsys.readouterr()
    main(["--read", str(file)])
    assert json.loads(capsys.readouterr().out) == found


def test_a_grid_is_one_file_and_tiny_pictures_are_enlarged(run: Path, pipe: Pipeline, tmp_path: Path) -> None:
    grid = tmp_path / "grid.png"
    sample(run, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--num", 2, "--grid", "--out", grid)
    found, expected = pixels(grid), [pixels(picture) for picture in pipe(PROMPTS, num_images=2)]
    assert found.shape == (2 * 128, 2 * 128, 3)
    rows = [np.concatenate(expected[i : i + 2], axis=1) for i in (0, 2)]
    assert np.abs(found[::16, ::16] - np.concatenate(rows)).max() <= 1 and (found[::16] == found[15::16]).all()
    assert read_settings(grid)["prompts"] == PROMPTS
    one = tmp_path / "one.jpg"
    sample(run, "--prompt", "\u732b", "--height", 4, "--out", one)
    assert Image.open(one).size == (16 * 8, 4 * 8) and read_settings(one)["prompt"] == "\u732b"
    assert [enlargement(*size) for size in ((32, 32), (127, 20), (128, 8), (512, 512))] == [4, 2, 1, 1]
    name = PictureFiles(out=Path("x"), kind="webp", is_file=False).path(3, "\u732b", 7)
    assert name == Path("x/0003_7.webp")


def test_a_call_takes_what_a_run_may_have_otherwise(pipe: Pipeline) -> None:
    (plain,) = pipe("a cat", seed=3)
    assert plain.mode == "RGB" and plain.size == (8, 8)
    assert pipe("a cat", seed=3, steps=3, guidance=4.0, solver="euler", height=8)[0].tobytes() == plain.tobytes()
    options: list[dict[str, Any]] = [
        {"steps": 5}, {"guidance": 1.0}, {"solver": "heun"}, {"negative_prompt": "a dog"}, {"seed": 4}
    ]  # fmt: skip
    drawn = [plain, *(pipe("a cat", **{"seed": 3, **changed})[0] for changed in options)]
    assert min(difference(a, b) for i, a in enumerate(drawn) for b in drawn[:i]) > 0.2
    assert pipe("a cat", width=8)[0].size == (8, 8) and pipe("a cat", height=4)[0].size == (16, 4)
    assert pipe("a cat", height=12, width=16)[0].size == (16, 12) and pipe([]) == []
    assert difference(pipe("a cat", seed=2, num_images=2)[1], plain) <= 1, "picture k has the noise of seed + k"
    alone = pipe.generate(["a cat"], [3], options=DrawOptions(negative_prompt="a dog", guidance=1.5))
    empty, dog, cat = (pipe.text_encoder.encode([text])[0] for text in ("", "a dog", "a cat"))
    assert not torch.equal(empty, dog) and not torch.equal(dog, cat)
    assert not torch.equal(alone, pipe.generate(["a cat"], [3], options=DrawOptions(guidance=1.5)))


def test_pictures_that_share_a_pool_say_so(tmp_path: Path, pipe: Pipeline) -> None:
    run = make_run(tmp_path / "shared", "moe.pool=batch")
    shared = Pipeline.load(run, device="cpu", dtype="bf16")
    assert shared.pictures_touch() and not pipe.pictures_touch()
    assert next(shared.model.parameters()).dtype == torch.bfloat16
    sample(run, "--prompt", "a cat", "--num", 2, "--batch-size", 2, "--dtype", "fp32", "--out", tmp_path / "out")
    alone, together = Pipeline.load(run)("a cat"), sorted((tmp_path / "out").iterdir())
    assert [read_settings(path)["drawn_together"] for path in together] == [2, 2]
    first = np.asarray(Image.open(together[0]).resize((8, 8), Image.Resampling.NEAREST)).astype(int)
    assert np.abs(first - pixels(alone[0])).mean() > 0.2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: to compare its pictures with a CPU's")
def test_a_gpu_draws_what_a_cpu_draws(run: Path, pipe: Pipeline) -> None:
    for device in (None, "cuda", f"cuda:{torch.cuda.device_count() - 1}"):
        on_gpu = Pipeline.load(run, device=device)
        assert on_gpu.device.type == "cuda"
        assert all(difference(a, b) < 1 for a, b in zip(on_gpu(PROMPTS), pipe(PROMPTS), strict=True))


CAT = ["--prompt", "a cat"]
REFUSED: list[tuple[list[str], str]] = [
    ([], "--prompt is missing: say what to draw, or name a file of captions by --prompts"),
    ([*CAT, "--steps", "0"], "--steps is 0: use 1 to 10000"),
    ([*CAT, "--guidance", "nan"], "--guidance is nan: use 0 to 1000"),
    ([*CAT, "--batch-size", "0"], "--batch-size is 0: use 1 to 10000"),
    ([*CAT, "--guidance", "1", "--negative-prompt", "a dog"], "the negative prompt does nothing without guidance"),
    ([*CAT, "--negative-prompt", "\u200b"], "--negative-prompt has"),
    (
        [*CAT, "--height", "9"],
        "height 9 and width any is none of the sizes (height x width) that this model was trained",
    ),
    ([*CAT, "--width", "16"], "is more than one of the sizes (height x width) that this model was trained on: choose"),
    ([*CAT, "--height", "8", "--width", "16"], "choose from 8x8, 4x16, 12x16"),
    ([*CAT, "--device", "tpu"], "device is tpu: use cpu, cuda or cuda:N"),
    ([*CAT, "--device", "cuda:99"], "device is cuda:99, but there are"),
    ([*CAT, "--num", "2", "--out", "a.png"], "is one file, but there are 2 pictures: name a folder, or add --grid"),
    ([*CAT, "--grid", "--out", "folder"], "a grid is one file, so name a .png, .jpg or .webp"),
    ([*CAT, "--out", "a.png", "--format", "jpg"], "does not end in .jpg: leave out --format, or change the name"),
    ([*CAT, "--out", "gone/a.png"], "there is no folder gone, so make it or name another"),
    ([*CAT, "--out", "file"], "is not a folder: name another place"),
    (["--prompts", "gone.txt"], "--prompts gone.txt cannot be read (No such file or directory): name a text file"),
    (["--prompts", "file"], "--prompts file has no captions: write one on each line"),
    (["--read", "file"], "file does not say how it was drawn: name a picture of trainer.sample"),
]


@pytest.mark.parametrize("arguments,words", REFUSED, ids=lambda value: str(value)[-40:])
def test_what_cannot_be_drawn_is_one_sentence(
    run: Path, tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        sample(run, *arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1, error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_call_refuses_likewise(pipe: Pipeline) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"prompt": "\u200b"}, "the prompt has"), ({"num_images": 0}, "num_images is 0"), ({"seed": -1}, "seed is -1"),
        ({"batch_size": 0}, "batch_size is 0"), ({"solver": "dpm"}, "solver is dpm: choose from euler, heun"),
        ({"steps": 0}, "steps is 0"), ({"guidance": -1.0}, "guidance is -1"),
    ]  # fmt: skip
    for arguments, words in refused:
        with pytest.raises(ConfigError, match=words):
            pipe(**{"prompt": "a cat", **arguments})
    with pytest.raises(ConfigError, match="dtype is fp16: use bf16 or fp32"):
        Pipeline.load("nowhere", dtype="fp16")
