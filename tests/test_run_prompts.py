"""Which prompts a run is scored on: the built-in scenes by default if it learned from them; captions of its data."""

import json
from pathlib import Path

import pytest

from eval.demo.prompts import demo_prompts
from eval.run import main, parse
from eval.watch import parse as parse_watch
from trainer.config import ConfigError, load_config, save_config
from trainer.data import encode
from trainer.data.demo import scene_shards
from trainer.data.demo.scenes import all_captions, held_out_scenes, training_scene


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that is to learn from 40 scenes, in shards of 16."""
    images, latents, folder = (tmp_path / name for name in ("images", "latents", "run"))
    scene_shards.main(["--out", str(images), "--num-images", "40", "--shard-size", "16"])
    overrides = [f"run_dir={folder}", "data.source=shards", f"data.images={images}", f"data.latents={latents}"]
    encode.main(["debug", *overrides, "data.text=online"])
    folder.mkdir()
    save_config(load_config("debug", overrides), folder / "config.yaml")
    return folder


def test_prompts_follow_the_data(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse([str(run)]).prompts == demo_prompts(0, 40)
    assert len(parse_watch([str(run), "--suite", "geneval", "--detector", "embedded"]).prompts) == 48
    step = run / "checkpoints" / "step_00000003"
    step.mkdir(parents=True)
    assert parse([str(step)]).prompt_set == "demo"

    learned = {training_scene(0, index).caption for index in range(40)}
    options = ["--suite", "clip", "--prompts"]
    every = parse([str(run), *options, "captions"])
    assert {prompt.text for prompt in every.prompts} == learned and len(every.prompts) == len(learned)
    assert every.score.out == run / "eval" / "captions" and every.score.detector != "embedded"
    few = [prompt.text for prompt in parse([str(run), *options, "captions:5"]).prompts]
    assert len(set(few)) == 5 and learned.issuperset(few)
    assert {training_scene(0, index).caption for index in range(16)}.issuperset(few) is False, "of all shards"
    watched = parse_watch([str(run), "--num-prompts", "4", *options, "captions"])
    assert len(watched.prompts) == 4 and watched.prompt_set == "captions"

    list_file = next((tmp_path / "latents").glob("*.samples.json"))
    content = json.loads(list_file.read_text())
    content["captions"][0] = "a photograph of a street in Lisbon"
    list_file.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stop:
        main([str(run)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert f"--prompts is missing: {run} learned from data of its own, not from the built-in scenes: name gen" in error
    assert parse([str(run), "--prompts", "demo"]).prompts, "who names them has them"
    with pytest.raises(ConfigError, match=r"--prompts is missing: .*learned from data of its own"):
        parse_watch([str(run), "--suite", "clip"])
    for spec, words in (("captions:x", "the number must be 1 or more"), ("captions:0", "must be 1 or more")):
        with pytest.raises(ConfigError, match=words):
            parse([str(run), "--suite", "clip", "--prompts", spec])
    list_file.write_text("{")
    with pytest.raises(ConfigError, match=r"samples\.json cannot be read: run python -m trainer\.data\.encode again"):
        parse([str(run), "--suite", "clip", "--prompts", "captions"])


def test_what_cannot_be_known_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--prompts is missing: .* has no config\.yaml, so its data are not known"):
        parse([str(tmp_path), "--out", str(tmp_path / "out")])
    save_config(load_config("debug"), tmp_path / "config.yaml")
    with pytest.raises(
        ConfigError, match=r"--prompts is missing: .* learned from synthetic data, which has no captions"
    ):
        parse([str(tmp_path)])
    with pytest.raises(ConfigError, match="absent does not exist: give a run folder"):
        parse([str(tmp_path / "absent")])


def test_captions_of_all_scenes_are_known() -> None:
    scenes = [training_scene(1, index) for index in range(300)] + held_out_scenes(0, 30)
    assert all_captions().issuperset(scene.caption for scene in scenes)
    assert "a cat on a chair" not in all_captions()
